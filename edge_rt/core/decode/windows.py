"""What happened in a stretch of time: steps that were taken, and readings of the device."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from edge_rt.device_profile import Health

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
class Window:
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


class History:
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
