"""Holds a power cap and a temperature limit, and gets as many tokens a second out of them as can be kept up."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from edge_rt.power.thermal import Thermal

if TYPE_CHECKING:
    from edge_rt.device_profile import Health

# What happened in a stretch of time: steps that were taken, and readings of the device.

Kind = Literal["decode", "prompt"]
"""What a step does. Reading a prompt takes other power than writing does, and gains more from threads."""


class Reading(NamedTuple):
    """What is believed of a device's words. ``computing``: a step was under way."""

    power: float | None
    temperature: float | None
    throttled: bool
    computing: bool


def reading(found: Health, most: float, highest: float, computing: bool) -> Reading:
    """``most``: watts above which it is nonsense. ``highest``: Hz that the device could have at other times."""
    throttled = bool(found.throttled) or bool(found.most and found.most < 0.97 * highest)
    return Reading(_sane(found.power, 0.0, most), _sane(found.temperature, -60.0, 250.0), throttled, computing)


def _sane(value: float | None, low: float, high: float) -> float | None:
    return value if value is not None and math.isfinite(value) and low <= value <= high else None


@dataclass(slots=True)
class ReadingWindow:
    """Since ``start``, in seconds of some clock: busy seconds by kind and threads, (seconds, tokens) of the steps that ended, and what was
    read.
    """

    start: float
    busy: dict[tuple[Kind, int], float] = field(default_factory=dict)
    ended: dict[tuple[Kind, int], tuple[float, float]] = field(default_factory=dict)
    looks: int = 0
    throttled: int = 0
    temperatures: list[float] = field(default_factory=list)
    powers: list[tuple[float, bool]] = field(default_factory=list)

    def step(self, kind: Kind, threads: int, seconds: float, tokens: float, now: float) -> None:
        """A step ended now; what of it was before the window was not busy time of this one."""
        if now > self.start:
            before = self.ended.get((kind, threads), (0.0, 0.0))
            self.ended[kind, threads] = (before[0] + seconds, before[1] + tokens)
            self.under_way(kind, threads, seconds, now)

    def under_way(self, kind: Kind, threads: int, seconds: float, now: float) -> None:
        """A step has been computed for so long."""
        if (inside := min(seconds, now - self.start)) > 0:
            self.busy[kind, threads] = self.busy.get((kind, threads), 0.0) + inside

    def rate(self, kind: Kind, threads: int) -> float | None:
        """Tokens that a busy second made."""
        seconds, tokens = self.ended.get((kind, threads), (0.0, 0.0))
        return tokens / seconds if seconds else None

    def look(self, one: Reading) -> None:
        """Something was read."""
        self.looks += 1
        self.throttled += one.throttled
        if one.power is not None:
            self.powers.append((one.power, one.computing))
        if one.temperature is not None:
            self.temperatures.append(one.temperature)

    def temperature(self) -> float | None:
        """The mean."""
        return sum(self.temperatures) / len(self.temperatures) if self.temperatures else None

    def power(self, elapsed: float) -> float | None:
        """The mean, in watts.

        A sensor that tells the power of the moment tells one of two values, as we compute or rest, and a mean of some readings is far off
        if steps were met more often than they are. How often is known, so that is put right (a control variate), as far as what was read
        differs between steps and rests: not at all, where sensors tell means themselves.
        """
        n = len(self.powers)
        if not n:
            return None
        mean = sum(power for power, _ in self.powers) / n
        computing = [power for power, computing in self.powers if computing]
        if not computing or len(computing) == n:
            return mean
        resting = [power for power, computing in self.powers if not computing]
        differ = sum(computing) / len(computing) - sum(resting) / len(resting)
        share = min(1.0, sum(self.busy.values()) / elapsed)
        return mean - max(0.0, differ) * (len(computing) / n - share)


class Sustained(NamedTuple):
    """What was asked for and what was measured, over the last ``seconds`` in which there was work. None: not known.

    ``cap``: watts, ``limit``: degrees Celsius, as asked. ``tokens_per_second``: written, rests included. ``power``: the mean, watts.
    ``temperature``: now, ``hottest``: the highest of those seconds. ``threads``, ``duty``: now, for writing. ``throttled``: the share of
    the time in which the device throttled. ``problem``: why the limits may not be held, "" if they are.
    """

    cap: float | None = None
    limit: float | None = None
    tokens_per_second: float | None = None
    power: float | None = None
    temperature: float | None = None
    hottest: float | None = None
    threads: int = 0
    duty: float = 1.0
    throttled: float = 0.0
    seconds: float = 0.0
    problem: str = ""


class Past(NamedTuple):
    """A stretch of work: seconds of it, those of writing, tokens written, watt seconds and seconds in which power was told, and the highest
    temperature. ``throttled``: seconds.
    """

    seconds: float
    writing: float
    tokens: float
    energy: float
    metered: float
    throttled: float
    hottest: float


class PowerHistory:
    """The last so many ``seconds`` of work."""

    def __init__(self, seconds: float) -> None:
        self._most = seconds
        self._past: deque[Past] = deque()
        self._seconds = 0.0
        self._work = self._writing = self._tokens = 0.0

    def step(self, kind: Kind, seconds: float, tokens: float) -> None:
        """A step was taken, in so many seconds with its rest."""
        self._work += seconds
        if kind == "decode":
            self._writing, self._tokens = self._writing + seconds, self._tokens + tokens

    def look(self, one: Reading, passed: float) -> None:
        """Something was read, ``passed`` seconds of work after the last reading."""
        work = self._work
        if not work and not passed:
            return
        metered = 0.0 if one.power is None else passed
        hottest = -math.inf if one.temperature is None else one.temperature
        self._past.append(Past(work, self._writing, self._tokens, (one.power or 0.0) * metered, metered, work * one.throttled, hottest))
        self._seconds += work
        self._work = self._writing = self._tokens = 0.0
        while self._seconds - self._past[0].seconds > self._most:
            self._seconds -= self._past.popleft().seconds

    def total(self) -> Past:
        """All of it together."""
        if not self._past:
            return Past(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -math.inf)
        columns = list(zip(*self._past, strict=True))
        return Past._make([*map(sum, columns[:-1]), max(columns[-1])])


# Holds a power cap and a temperature limit, and gets as many tokens a second out of them as can be kept up.
#
# It chooses how many threads compute and for which share of the time (``duty``: after a step that took t seconds nothing is computed for
# t * (1 / duty - 1) seconds). Computing faster than a cap allows gains nothing: what was ahead has to be waited for, and firmware that
# throttles an overheated chip gives up more than was won.
#
# The model is kept simple, so that it can be learnt while tokens are made:
#
# - power is what the board draws at rest, plus ``heat`` watts while n threads compute: rest + duty * heat[n]. Each window of some seconds
#   at one number of threads is a measurement of ``heat[n]`` and of the tokens that a busy second makes. The best number of threads is that
#   with the most tokens a second at the duty that the cap leaves it. Those not yet tried are tried, for a few seconds each, once the cap
#   binds; those that were measured seldom and may be better, again.
# - what was drawn too much is saved again over ``PAYBACK`` seconds (integral correction), so the mean comes out right though heat differs
#   from step to step, and though readings are late or noisy.
# - how warm heat makes the device is learnt too (thermal.py); the heat allowed is what brings the temperature to the limit, and no further,
#   within ``HORIZON`` seconds. Where power is not told, heat is a guess after the number of threads, in shares of the most.
# - a chip that throttles says that the limit was too high: it is lowered below the temperature at which that began.
#
# ``look`` is called on a thread of its own at uneven intervals (pace.py): a reading at the end of each step would see a board that never
# rests.

WINDOW, SETTLE = 2.5, 2.5
"""Seconds of a measurement, and before one after the number of threads has changed: readings may be as late as that."""
STALE = 6.0
"""Seconds without a reading after which there is none."""
LEAST, CAUTIOUS = 0.05, 0.4
"""The smallest duty, and that until the first measurement where there is a power cap or the limit is ``NEAR``."""
PAYBACK, HORIZON = 20.0, 20.0
MARGIN, NEAR = 1.0, 15.0
"""Degrees below the limit: that are aimed at, as sensors tell whole degrees, and in which a chip at full work may get in seconds."""
TRUST = 0.5
"""How far a measurement moves what was believed."""
SWITCH = 1.06
"""By which factor other threads must be better before they are taken."""
AGAIN = 60.0
"""Seconds between two tries of threads that were measured before."""
REMEMBERED = 120.0
"""Seconds of work that ``report`` speaks of."""
UNCORE = 0.7
"""Of the heat of one thread: what the rest of the chip and the memory add, however many there are. A guess until it is measured."""


class Setting(NamedTuple):
    """Threads to compute with, and for which share of the time (above 0, up to 1)."""

    threads: int
    duty: float


@dataclass(slots=True)
class _Known:
    """Of a kind of step with a number of threads: tokens that a busy second makes, heat (watts above rest, or a share of the most), and how
    often it was measured.
    """

    rate: float
    heat: float
    times: int = 1


class PowerController:
    """Chooses settings. ``look`` may be called on another thread than the rest."""

    def __init__(
        self, health: Callable[[], Health], *, power: float | None, celsius: float | None, most: int, fixed: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``power``: watts at most, ``celsius``: degrees at most, None: any. ``most``: threads. ``fixed``: no fewer either."""
        self._health, self._cap, self._limit, self._clock = health, power, celsius, clock
        self._most = most
        self._candidates = [most] if fixed else _candidates(most)
        self._known: dict[Kind, dict[int, _Known]] = {"decode": {}, "prompt": {}}
        self._threads: dict[Kind, int] = {"decode": most, "prompt": most}
        self._lock = threading.Lock()
        self._metered = False  # power is told: heat is in watts
        self._rest: float | None = None  # watts at rest
        self._debt = 0.0  # watt seconds drawn beyond the cap
        self._allowed = math.inf  # heat that the temperature allows
        self._spared = 1.0  # the share of the heat allowed that is used, after throttling that no temperature explains
        self._target = math.inf if celsius is None else celsius - MARGIN
        self._thermal: Thermal | None = None
        self._highest, self._onset = 0.0, None  # type: float, float | None  # Hz that it could have; degrees when it began to throttle
        now = clock()
        self._window, self._slice = ReadingWindow(now + 1.0), ReadingWindow(now)
        self._tried = self._looked = now
        self._told = {"power": now, "temperature": now}
        self._temperature: float | None = None
        self._throttles = self._computing = self._absurd = False
        self._step: tuple[Kind, int, float] = ("decode", most, now)  # that is under way, or was last
        self._ended = -math.inf  # of the last step
        self._cycle = 0.0  # seconds from step to step
        self._held, self._safe = Setting(self._candidates[0], CAUTIOUS), False  # what to do without readings; whether it was measured
        self._blind = self._hopeless = ""  # why limits may not be held: no readings, or nothing helps
        self._over = 0  # windows in a row in which the least was too much
        self._history = PowerHistory(REMEMBERED)
        self._news: list[str] = []

    # ---- what the engine asks and tells ------------------------------------------------------------------------------

    def choose(self, kind: Kind, bound: int) -> Setting:
        """The setting for a step, with ``bound`` threads at most."""
        with self._lock:
            return self._setting(kind, bound)

    def begins(self, kind: Kind, threads: int) -> None:
        """A step begins."""
        self._step, self._computing = (kind, threads, self._clock()), True

    def took(self, kind: Kind, threads: int, seconds: float, tokens: float, rested: float = 0.0) -> None:
        """A step has ended that took so long, after so many seconds of rest that were due before it."""
        with self._lock:
            now = self._ended = self._clock()
            self._computing = False
            self._cycle += (TRUST if self._cycle else 1.0) * (seconds + rested - self._cycle)
            self._history.step(kind, seconds + rested, tokens)
            for one in (self._window, self._slice):
                one.step(kind, threads, seconds, tokens, now)

    def _setting(self, kind: Kind, bound: int) -> Setting:
        if self._blind:
            return Setting(min(self._held.threads, bound), self._held.duty)
        threads = min(self._threads[kind], bound)
        return Setting(threads, self._duty(kind, threads))

    def _duty(self, kind: Kind, threads: int) -> float:
        if not any(self._known.values()):
            near = self._temperature is not None and self._temperature > self._target - NEAR
            return CAUTIOUS if near or self._cap is not None else 1.0
        return min(1.0, max(LEAST, self._budget() / self._expected(kind, threads).heat))

    def _budget(self) -> float:
        """Heat that may be made now, on average."""
        allowed = self._allowed
        if self._cap is not None and self._rest is not None:
            allowed = min(allowed, max(0.0, self._cap - self._rest - self._debt / PAYBACK))
        return allowed * self._spared

    def _expected(self, kind: Kind, threads: int) -> _Known:
        """What is known of a number of threads, or may be expected of it after the nearest that was seen."""
        curve = self._known[kind] or self._known["decode" if kind == "prompt" else "prompt"]
        if threads in curve:
            return curve[threads]
        if not curve:
            return _Known(threads**0.7, (UNCORE + threads) / (UNCORE + self._most))
        seen = min(curve, key=lambda other: (abs(other - threads), other))
        return _Known(curve[seen].rate * (threads / seen) ** 0.7, curve[seen].heat * (UNCORE + threads) / (UNCORE + seen))

    def _most_heat(self) -> float:
        """With all threads, all the time."""
        return max((known.heat for curve in self._known.values() for known in curve.values()), default=1.0)

    # ---- readings ----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Ask how the device is, and go by it."""
        computing, found = self._computing, self._health()
        with self._lock:
            self._highest = max(self._highest, found.most or 0.0)
            most = 3 * ((self._rest or 0.0) + self._most_heat()) if self._metered and any(self._known.values()) else 1e5
            absurd = found.power is not None and found.power > most
            # Once is a counter that wrapped, twice in a row is true.
            one = reading(found, most if absurd and not self._absurd else 1e5, self._highest, computing)
            self._absurd = absurd
            self._read(one, self._clock())

    def _read(self, one: Reading, now: float) -> None:
        passed, self._looked = now - self._looked, now
        if one.throttled and not self._throttles:
            self._onset = one.temperature
        self._throttles = one.throttled
        if one.power is not None:
            self._told["power"] = now
            if not self._metered:
                self._metered, self._rest, self._thermal = True, min(one.power, (self._cap or math.inf) / 2), None
            if self._cap is not None and self._working(now):
                self._debt = min(max(self._debt + (one.power - self._cap) * min(passed, 1.0), -self._cap), 4 * self._cap)
        if one.temperature is not None:
            self._told["temperature"], self._temperature = now, one.temperature
        self._history.look(one, min(passed, STALE) if self._working(now) else 0.0)
        if passed > 2 * STALE:  # nobody has looked, as there was nothing to do
            self._pause(passed, now)
        self._slice.look(one)
        if now >= self._window.start:
            self._window.look(one)
        self._check_readings(now)
        if now - self._slice.start >= max(WINDOW, self._cycle):
            self._steer(now)
        if now - self._window.start >= self._needed():
            self._control(now)

    def _working(self, now: float) -> bool:
        return self._computing or now - self._ended < max(1.0, 2 * self._cycle)

    def _pause(self, passed: float, now: float) -> None:
        """What was measured before a pause goes on after it with fresh windows."""
        if self._thermal is not None:
            self._thermal.passed(passed, self._rest or 0.0, None)
        self._debt = max(0.0, self._debt - passed * 0.2 * (self._cap or 0.0))
        self._window, self._slice = ReadingWindow(now), ReadingWindow(now)

    def _needed(self) -> float:
        """Seconds that a window must have: some steps with their rests; more the first time, where a rest makes the readings differ."""
        if not any(self._known.values()):
            return max(0.6 * WINDOW, 3 * self._cycle)
        fresh = self._threads["decode"] not in self._known["decode"] and self._metered
        return max(2 * WINDOW if fresh else WINDOW, 3 * self._cycle)

    def _check_readings(self, now: float) -> None:
        """Without the readings that a limit needs, the last setting that held it stays, and that is said."""
        wanted = [name for name, limit in (("power", self._cap), ("temperature", self._limit)) if limit is not None]
        missing = [name for name in wanted if now - self._told[name] > STALE]
        if missing and not self._blind:
            held, why = self._held, "which held the limit" if self._safe else "as nothing was measured yet"
            self._blind = f"the device tells no {' and no '.join(missing)} any more"
            count = f"{held.threads} thread{'s' * (held.threads > 1)}"
            self._news.append(f"{self._blind}; going on with {count} for {held.duty:.0%} of the time, {why}")
        elif self._blind and not missing:
            self._news.append("the device tells its readings again, and the limits are held by them")
            self._blind = ""
            self._window = ReadingWindow(now)

    # ---- control -----------------------------------------------------------------------------------------------------

    def _steer(self, now: float) -> None:
        """A slice of time has ended: correct the heat that is allowed."""
        past, elapsed = self._over_now(self._slice, now), now - self._slice.start
        self._slice = ReadingWindow(now)
        heat = sum(seconds / elapsed * self._expected(*key).heat for key, seconds in past.busy.items())
        if self._metered:
            power = past.power(elapsed)
            heat = heat + (self._rest or 0.0) if power is None else power
        temperature, often = past.temperature(), past.throttled > past.looks / 4
        if temperature is not None and self._thermal is None:
            self._thermal = Thermal(40.0 / max(heat, 1.0 if self._metered else 0.3))
        if self._thermal is not None:
            self._thermal.passed(elapsed, heat, None if often and not self._metered else temperature)
        if self._onset is not None:
            self._target, self._onset = min(self._target, self._onset - 2 * MARGIN), None
        if self._thermal is not None and self._target < math.inf:
            most = self._most_heat()
            wanted = self._thermal.heat_for(self._target, HORIZON) - (self._rest or 0.0)
            self._allowed = min(max(LEAST * most, wanted), 1.5 * most)
        if often and (temperature is None or temperature < self._target):
            self._spared = max(LEAST, 0.9 * self._spared)
        else:
            self._spared = min(1.0, 1.01 * self._spared)

    def _over_now(self, window: ReadingWindow, now: float) -> ReadingWindow:
        """With the step that is under way."""
        if self._computing:
            kind, threads, began = self._step
            window.under_way(kind, threads, now - began, now)
        return window

    def _control(self, now: float) -> None:
        """A window has ended: learn from it, and choose the threads for the next."""
        window, elapsed = self._over_now(self._window, now), now - self._window.start
        busy = sum(window.busy.values())
        self._window = ReadingWindow(now)
        power = window.power(elapsed)
        if busy < 0.01 * elapsed:
            if power is not None and not self._working(now):
                self._rest = min(power, (self._cap or math.inf) / 2)
            return
        (kind, threads), most = max(window.busy.items(), key=lambda entry: entry[1])
        throttled = window.throttled > window.looks / 4
        if self._blind or most < 0.9 * busy or (throttled and threads not in self._known[kind]):
            return
        self._learn((kind, threads), window, power, min(1.0, busy / elapsed), throttled)
        if throttled:
            return
        self._judge(window, power, Setting(threads, min(1.0, busy / elapsed)))
        before, self._threads[kind] = self._threads[kind], self._best(kind, now)
        if before != self._threads[kind]:
            self._window = ReadingWindow(now + SETTLE)

    def _learn(self, key: tuple[Kind, int], window: ReadingWindow, power: float | None, share: float, throttled: bool) -> None:
        """What a window says of a number of threads. A device that throttles is slower than it is at other times, and cooler."""
        kind, threads = key
        rate, expected, curve = window.rate(kind, threads), self._expected(kind, threads).heat, self._known[kind]
        heat = expected
        if rate is None:
            return
        if power is not None and self._rest is not None:
            self._rest = min(self._rest, 0.97 * power)
            heat = max(power - self._rest, 1e-3) / share
            if any(self._known.values()):  # what little work says of much is far from sure
                heat = min(max(heat, 0.5 * expected), 2 * expected)
                heat = expected + min(1.0, 2 * share) * (heat - expected)
        elif self._metered:
            return
        known = curve.get(threads)
        if known is None:
            curve[threads] = _Known(rate, heat)
        elif throttled:
            known.heat = max(known.heat, heat)
        else:
            slower = 1 + TRUST * (rate / known.rate - 1)  # a longer context, or a hotter chip, is slower with any number of threads
            for other in curve.values():
                other.rate *= slower
            known.times += 1
            known.heat += max(0.2, 1 / known.times) * (heat - known.heat)

    def _judge(self, window: ReadingWindow, power: float | None, setting: Setting) -> None:
        """Note a setting that held the limits, and whether the least does not."""
        temperature = window.temperature()
        cold = self._limit is None or (temperature is not None and temperature <= self._limit)
        within = cold and (self._cap is None or (power is not None and power <= 1.02 * self._cap))
        if within and not window.throttled:
            self._held, self._safe = setting, True
        self._over = 0 if within or self._duty("decode", setting.threads) > LEAST else self._over + 1
        if within:
            self._hopeless = ""
        elif self._over == 4 and not self._hopeless:
            if cold:
                what = f"the cap of {self._cap:g} W cannot be held: the device draws {power or 0:.1f} W with hardly anything to compute"
            else:
                now = f"the device has {temperature or 0:.0f} with hardly anything to compute"
                what = f"the limit of {self._limit:g} degrees cannot be held: {now}"
            self._hopeless = what
            self._news.append(f"{what}; raise it, or see what else runs")

    def _best(self, kind: Kind, now: float) -> int:
        """The number of threads to go on with: one that was not tried yet and is promising, or the best."""
        budget, current, curve = self._budget(), self._threads[kind], self._known[kind]

        def rate(threads: int, hope: float = 0.0) -> float:
            known = self._expected(kind, threads)
            return known.rate * min(1.0, max(LEAST, budget * (1 + hope) / known.heat))

        if current not in curve:  # it was bounded by others
            return current
        best = max((n for n in self._candidates if n in curve), key=rate)
        if budget >= curve[best].heat and best == self._most:
            return best
        if untried := [n for n in self._candidates if n not in curve and rate(n) > 0.75 * rate(best)]:
            return max(untried, key=rate)
        if self._metered and now - self._tried > AGAIN:
            hopes = {n: rate(n, 0.4 / curve[n].times) for n in self._candidates if n in curve and n != best}
            if hopes and hopes[hope := max(hopes, key=lambda n: hopes[n])] > rate(best):
                self._tried = now
                return hope
        return best if rate(best) > SWITCH * rate(current) else current

    # ---- reports -----------------------------------------------------------------------------------------------------

    def news(self) -> list[str]:
        """What a person should know and was not yet told."""
        with self._lock:
            news, self._news = self._news, []
            return news

    def report(self) -> Sustained:
        """What was asked and what was measured."""
        with self._lock:
            past, setting = self._history.total(), self._setting("decode", self._most)
            hottest = past.hottest if past.hottest > -math.inf else None
            return Sustained(
                self._cap, self._limit, past.tokens / past.writing if past.tokens else None,
                past.energy / past.metered if past.metered else None, self._temperature, hottest, setting.threads, setting.duty,
                past.throttled / past.seconds if past.seconds else 0.0, past.seconds, self._blind or self._hopeless,
            )  # fmt: skip


def _candidates(most: int) -> list[int]:
    """Numbers of threads worth a try: all small ones, and fewer of the large."""
    return [n for n in range(1, most + 1) if n <= 4 or n == most or (n % 2 == 0 and n <= 8) or n % 4 == 0]
