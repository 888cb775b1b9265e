"""Fair timing: contenders take turns, medians are compared pair by pair, and a busy machine is noticed."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BUSY = 0.2
"""CPUs' worth of other programs' work from which on figures are not to be trusted."""
WIDE = 0.05
"""Spread of a ratio (IQR / median) above which more rounds are measured."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of a sample and its relative spread (inter-quartile range / median; 0 for a single value)."""

    median: float
    spread: float


def spread(values: Sequence[float]) -> Spread:
    """Median and spread. Raises ValueError for no values."""
    if not values:
        raise ValueError("there is no median of nothing")
    median = statistics.median(values)
    if len(values) < 2 or not median:
        return Spread(median, 0.0)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, (high - low) / abs(median))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours / theirs, round by round. Raises ValueError if the rounds do not match."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def widest(samples: Mapping[str, Sequence[float]]) -> float:
    """The largest spread of a ratio between the first contender and another."""
    first, *others = samples.values()
    return max((spread(ratios(first, other)).spread for other in others), default=spread(first).spread)


def interleave(
    contenders: Mapping[str, Callable[[], float]], *, rounds: int, most: int, deadline: float, wide: float = WIDE
) -> dict[str, list[float]]:
    """Measure contenders in turn: at least ``rounds`` rounds, up to ``most`` while the ratios spread more than ``wide``.

    Every other round runs backwards, so that a machine that gets slower favours nobody. One round before them does not count.
    After ``deadline`` (``time.monotonic``) no further round begins, except the first two.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for measure in contenders.values():
        measure()
    for number in range(most):
        if number >= rounds and widest(samples) <= wide:
            break
        if number >= 2 and time.monotonic() > deadline:
            break
        order = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in order:
            samples[name].append(contenders[name]())
    return samples


# ---- is the machine quiet? -------------------------------------------------------------------------------------------


def busy_cpus(seconds: float = 1.0) -> float:
    """CPUs' worth of work by all programs while this one sleeps; the load average of a minute where there is no /proc/stat."""
    if not Path("/proc/stat").exists():
        return os.getloadavg()[0]
    before, started = _busy_seconds(), time.monotonic()
    time.sleep(seconds)
    return (_busy_seconds() - before) / (time.monotonic() - started)


def _busy_seconds() -> float:
    """Seconds all CPUs together have worked, for others' virtual machines (steal) included."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(patience: float) -> str | None:
    """Wait up to ``patience`` seconds for other programs to calm down; a warning if they do not."""
    end = time.monotonic() + patience
    while (busy := busy_cpus()) > BUSY:
        if time.monotonic() > end:
            return f"other programs used {busy:.1f} CPUs when this was measured: do not trust it"
        print(f"waiting: other programs use {busy:.1f} CPUs", file=sys.stderr)
        time.sleep(min(5.0, max(0.0, end - time.monotonic())))
    return None
