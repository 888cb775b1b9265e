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
    """Since ``start``, in seconds of some clock: busy seconds and tokens by kind and threads, and sums of what was read."""

    start: float
    busy: dict[tuple[Kind, int], float] = field(default_factory=dict)
    tokens: dict[tuple[Kind, int], float] = field(default_factory=dict)
    looks: int = 0
    throttled: int = 0
    temperatures: list[float] = field(default_factory=list)
    powers: list[tuple[float, bool]] = field(default_factory=list)

    def step(self, kind: Kind, threads: int, seconds: float, tokens: float, now: float) -> None:
        """A step ended now. What of it was before the window does not count."""
        inside = min(seconds, now - self.start)
        if inside > 0:
            key = (kind, threads)
            self.busy[key] = self.busy.get(key, 0.0) + inside
            self.tokens[key] = self.tokens.get(key, 0.0) + tokens * inside / seconds

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

    def look(self, one: Reading) -> None:
        """Something was read; it stands for the steps since the last reading."""
        work = self._work
        if not work:
            return
        metered = 0.0 if one.power is None else work
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
        *sums, hottest = zip(*self._past, strict=True)
        return Past._make([*map(sum, sums), max(hottest)])
