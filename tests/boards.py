"""Boards with a clock of their own, for tests of what holds power and temperature: heat, thermal mass, firmware that throttles, sensors.

Heat goes from the chip over one or two thermal masses to the air, each a first-order system (their rises add up: a Foster network, as
data sheets give it). Writing is bounded by memory for a share of its time, which a lower clock does not lengthen.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edge_rt.hardware.profile import Health

TICK = 0.05
"""Seconds of one step of the simulation."""


class Mass(NamedTuple):
    """A thermal mass: degrees by watt, and seconds to 63 % of them."""

    resistance: float
    seconds: float


class Firmware(NamedTuple):
    """What it does from some temperature on: it lowers the clock, by ``rate`` of the full speed a second and down to ``slow`` of it, until
    it is ``back`` degrees cooler; then it raises it again.
    """

    above: float
    slow: float
    back: float = 0.3
    rate: float = 0.2


@dataclass
class Board:
    """``speeds``: tokens a second by threads (1, 2, ...). ``watts``: beyond ``rest`` by threads. ``memory``: the share of time that the
    clock does not change. ``late``: seconds that readings are old. ``noise``: standard deviations of (watts, degrees). ``step``: degrees
    that the sensor tells. ``volts``: power falls with the clock to this exponent. ``gone``: between which times no readings come.
    """

    speeds: Sequence[float]
    watts: Sequence[float]
    rest: float
    masses: Sequence[Mass] = (Mass(5.0, 60.0),)
    ambient: float = 25.0
    firmware: Firmware | None = None
    memory: float = 0.3
    volts: float = 1.0
    tells_power: bool = True
    tells_temperature: bool = True
    late: float = 0.0
    noise: tuple[float, float] = (0.0, 0.0)
    step: float = 0.0
    gone: tuple[float, float] = (1e9, 1e9)
    seed: int = 0
    now: float = 0.0
    clock: float = 1.0
    energy: float = 0.0
    rises: list[float] = field(default_factory=list)
    power: float = 0.0
    throttled: bool = False
    history: deque[tuple[float, Health]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.power = self.rest
        self.rises = [mass.resistance * self.rest for mass in self.masses]
        self.hottest = self.temperature

    @property
    def threads(self) -> int:
        return len(self.speeds)

    @property
    def temperature(self) -> float:
        return self.ambient + sum(self.rises)

    def token_seconds(self, threads: int) -> float:
        """How long a token takes now."""
        return (self.memory + (1 - self.memory) / self.clock) / self.speeds[threads - 1]

    def run(self, seconds: float, threads: int, tick: Callable[[float], float] = lambda passed: 1e9) -> None:
        """Let time pass with so many threads at work. ``tick`` is called after each step, with its seconds, and says when it is due."""
        end, due = self.now + seconds, tick(0.0)
        while self.now < end - 1e-9:
            passed = min(TICK, end - self.now, max(1e-6, due - self.now))
            self.power = self.rest + (self.watts[threads - 1] * self.clock**self.volts if threads else 0.0)
            self.energy += self.power * passed
            for i, mass in enumerate(self.masses):
                self.rises[i] += (mass.resistance * self.power - self.rises[i]) * min(1.0, passed / mass.seconds)
            self.now += passed
            self.hottest = max(self.hottest, self.temperature)
            if (firmware := self.firmware) is not None:
                if self.temperature >= firmware.above:
                    self.throttled = True
                elif self.temperature < firmware.above - firmware.back:
                    self.throttled = False
                self.clock += passed * (-firmware.rate if self.throttled else firmware.rate)
                self.clock = min(1.0, max(firmware.slow, self.clock))
            due = tick(passed)

    def health(self) -> Health:
        """What the sensors tell."""
        watts, degrees = (self._random.gauss(0, one) if one else 0.0 for one in self.noise)
        temperature = self.temperature + degrees
        if self.step:
            temperature = round(temperature / self.step) * self.step
        now = Health(
            temperature if self.tells_temperature else None, self.power + watts if self.tells_power else None, 1.5e9 * self.clock,
            1.5e9, ("it is too hot",) if self.clock < 0.99 else (),
        )  # fmt: skip
        self.history.append((self.now, now))
        while len(self.history) > 1 and self.history[1][0] <= self.now - self.late:
            self.history.popleft()
        return Health() if self.gone[0] <= self.now < self.gone[1] else self.history[0][1]


class Run(NamedTuple):
    """What a run did, after its first ``skip`` seconds: tokens a second, the mean power, the share of time throttled, the highest
    temperature, the highest mean power of a minute, changes of threads, and the threads at the end. ``first``: the highest before.
    """

    rate: float
    power: float
    throttled: float
    hottest: float
    minute: float
    changes: int
    threads: int
    first: float


def drive(board: Board, sustainer: object | None, seconds: float, skip: float, period: float = 0.2, kind: str = "decode") -> Run:
    """Write on a board for so long: with a sustainer, or without one as fast as it goes."""
    due, jitter = board.now, random.Random(board.seed)
    tokens, throttled, start, energy_at_skip, changes, before, threads = 0.0, 0.0, board.now, 0.0, 0, 0, board.threads
    energies: list[tuple[float, float]] = []

    def tick(passed: float) -> float:
        nonlocal due, throttled
        if board.now >= due - 1e-9:
            due = board.now + period * jitter.uniform(0.7, 1.3)
            energies.append((board.now, board.energy))
            if sustainer is not None:
                sustainer.look()  # type: ignore[attr-defined]
        if board.now - start >= skip and board.clock < 0.99:
            throttled += passed
        return due

    rested, seen_skip = 0.0, False
    while board.now - start < seconds:
        if not seen_skip and board.now - start >= skip:
            seen_skip, tokens, energy_at_skip, changes = True, 0.0, board.energy, 0
            started, first_hottest, board.hottest = board.now, board.hottest, board.temperature
        threads, duty = (board.threads, 1.0) if sustainer is None else sustainer.choose(kind, board.threads)  # type: ignore[attr-defined]
        changes += threads != before
        before = threads
        took = board.token_seconds(threads)
        if sustainer is not None:
            sustainer.begins(kind, threads)  # type: ignore[attr-defined]
        board.run(took, threads, tick)
        tokens += 1
        if sustainer is not None:
            sustainer.took(kind, threads, took, 1, rested)  # type: ignore[attr-defined]
        rested = took * (1 / duty - 1)
        board.run(rested, 0, tick)
    worst, first = 0.0, 0
    for at, energy in energies:
        while at - energies[first][0] > 60:
            first += 1
        if at - energies[first][0] > 59 and energies[first][0] - start > skip:
            worst = max(worst, (energy - energies[first][1]) / (at - energies[first][0]))
    passed = board.now - started
    power = (board.energy - energy_at_skip) / passed
    return Run(tokens / passed, power, throttled / passed, board.hottest, worst, changes, threads, first_hottest)


def best(board: Board, budget: float) -> float:
    """The most tokens a second that so many watts at the full clock, the board's rest included, can make by threads and duty."""
    return max(speed * min(1.0, max(0.0, budget - board.rest) / watts) for speed, watts in zip(board.speeds, board.watts, strict=True))
