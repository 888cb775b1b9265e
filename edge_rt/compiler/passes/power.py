"""What can be kept up: threads and their share of the time under a power cap, and the temperature that is to be held."""

from __future__ import annotations

from edge_rt.compiler import cost
from edge_rt.compiler.plan import Situation, threads_told
from edge_rt.deployment import Gain, Pass, Plan, PowerSetting
from edge_rt.errors import OptionError

MARGIN = 5.0
"""Degrees below the temperature from which the device slows itself down: firmware gives up more speed than the margin costs."""


def apply(plan: Plan, situation: Situation) -> Plan:
    """Choose threads by tokens a second that are sustained under the cap, not by those of the first second. Raises OptionError."""
    profile, cap = situation.target.profile, situation.goals.power
    celsius = None if profile.hottest is None else profile.hottest - MARGIN
    if cap is None:
        return plan._replace(power=PowerSetting(None, celsius, situation.threads(plan)))
    if profile.idle_power is None or profile.power is None:
        raise OptionError(f"--power cannot be planned for {situation.target.name}: what it draws is not known; leave it out")
    if cap <= profile.idle_power:
        raise OptionError(f"--power {cap:g} is no more than {situation.target.name} draws at rest ({profile.idle_power:g} W); raise it")
    numbers = range(1, situation.target.threads + 1)
    rate, threads, duty = max(sustained(plan._replace(threads=n), situation, cap) for n in numbers)
    burst, _, _ = sustained(plan, situation, cap)
    own = threads if profile.kind == "cpu" and threads < situation.target.threads else 0
    after = plan._replace(threads=own, power=PowerSetting(cap, celsius, threads, round(duty, 3)))
    of = threads_told(threads) if profile.kind == "cpu" else "the card"
    what = f"{cap:g} W held by {of} at work {duty:.0%} of the time: {rate:.1f} tokens/s sustained"
    return after._replace(gains=(*after.gains, Gain("power", what, token=rate / burst)))


def sustained(plan: Plan, situation: Situation, cap: float) -> tuple[float, int, float]:
    """(tokens a second, threads, share of the time at work) that a plan's threads keep up under a cap of so many watts."""
    n, idle = situation.threads(plan), situation.target.profile.idle_power or 0.0
    watts = cost.power(situation.target, n) or 0.0
    duty = min(1.0, (cap - idle) / max(watts - idle, 1e-9))
    return duty / situation.token(plan), n, duty


PASS = Pass("power", "threads, their share of the time and a temperature that can be kept up", apply)
