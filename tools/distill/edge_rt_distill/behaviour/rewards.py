"""The reward of an answer: what it gets for the sample's checks times whether it stops; or what the user's function says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from edge_rt.hooks import DataError, OptionError
from edge_rt_distill.data.answers import Answer
from edge_rt_distill.data.checks import score
from edge_rt_distill.data.samples import Sample
from edge_rt_distill.named import find

ALWAYS: tuple[dict[str, Any], ...] = ({"kind": "ends"}, {"kind": "no_loops"})
"""Asked of every answer: one that has all that was required and then goes on for ever is of no use."""


class Reward(NamedTuple):
    """``value`` 0 to 1, and ``parts``: check -> what it gave (a kind's second check is ``KIND 2``)."""

    value: float
    parts: dict[str, float]


RewardFunction = Callable[[Sample, str, bool], Reward]


def checks_of(sample: Sample) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    """The checks of ``sample`` (if it has none: that the answer is in its language), and those of ``ALWAYS`` that are not among them."""
    own = sample.checks or (({"kind": "language", "is": sample.language},) if sample.language else ())
    named = {check["kind"] for check in own}
    return own, tuple(check for check in ALWAYS if check["kind"] not in named)


def reward(sample: Sample, answer: str, ended: bool) -> Reward:
    """What ``answer`` is worth. ``ended``: the model ended its turn by itself. An empty answer is worth nothing.

    The weighted mean of the sample's checks times the mean of ``ALWAYS``: stopping in time does not make up for a wrong answer, and a
    right one that never stops is worth half.
    """
    given = Answer(answer, ended)
    if not score({"kind": "not_empty"}, given):
        return Reward(0.0, {"not_empty": 0.0})
    parts: dict[str, float] = {}
    value = 1.0
    for checks in checks_of(sample):
        total = weights = 0.0
        for check in checks:
            got, weight = score(check, given), float(check.get("weight", 1))
            count = sum(name.split(" ")[0] == check["kind"] for name in parts)
            parts[f"{check['kind']} {count + 1}" if count else check["kind"]] = got
            total, weights = total + weight * got, weights + weight
        if checks:
            value *= total / weights if weights else 0.0
    return Reward(value, parts)


def load_reward(name: str) -> RewardFunction:
    """The function ``MODULE:FUNCTION``; "" is ``reward``. It takes (sample, answer, ended) and returns a Reward or a number 0 to 1.

    Raises ``OptionError`` if there is none. What the function returns is checked at each call: ``DataError`` if it is no reward.
    """
    if not name:
        return reward
    function = find(name, "reward", "MODULE:FUNCTION, as in my_rewards:polite")
    if not callable(function):
        raise OptionError(f"the reward {name} is not a function; name one that takes (sample, answer, ended)")

    def checked(sample: Sample, answer: str, ended: bool) -> Reward:
        result = function(sample, answer, ended)
        if isinstance(result, (int, float)) and not isinstance(result, bool):
            result = Reward(float(result), {name.partition(":")[2]: float(result)})
        if not isinstance(result, Reward) or not math.isfinite(result.value) or not 0 <= result.value <= 1:
            raise DataError(f"the reward {name} returned {result!r} for sample {sample.id}; it must be a Reward or a number from 0 to 1")
        return result

    return checked
