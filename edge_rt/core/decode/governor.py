"""How many threads to compute with: as many as there are CPUs nobody else uses, asked again and again.

ggml's threads spin at barriers. Beside one busy neighbour on two cores, two threads are far slower than one: 38 against 57 tokens/s
beside a plain loop, 0.3 against 53 beside a second OpenMP program. Results do not depend on the number of threads.

It is to react within ten tokens when a neighbour comes or goes. One that goes shows only in what the system counts, so that is looked at
often; one that comes shows in the time of a step first, and then it is looked at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

PERIOD = 0.08
"""Seconds between looks at the machine: /proc/stat counts in hundredths. Two are eight tokens of a small model beside a neighbour."""
_FIRST = 0.05
"""Seconds before the first look: a prompt that comes right after opening should not meet a busy neighbour unprepared."""
_SOONEST = 0.03
"""Seconds after which a step that took ``_SLOW`` times as long as others is looked into."""
_SLOW = 1.5
_SMOOTHING = 0.5


class Reading(NamedTuple):
    """CPU seconds used so far: by everyone on the CPUs this process may use, and by this process."""

    at: float
    everyone: float
    ourselves: float


def read_cpus(cpus: Collection[int] = ()) -> Reading | None:
    """A reading of /proc/stat, None where there is none. ``cpus``: look at these alone, not at all this process may use."""
    try:
        with open("/proc/stat", "rb") as file:
            lines = file.read().split(b"\n")
    except OSError:
        return None
    usable = {b"cpu%d" % n for n in cpus or os.sched_getaffinity(0)}
    ticks = 0
    for line in lines:
        fields = line.split()
        if fields and fields[0] in usable:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
            ticks += user + nice + system + irq + softirq + steal
    return Reading(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())


class Governor:
    """Chooses between 1 and ``most`` threads. ``threads`` is cheap enough to ask before every step."""

    def __init__(self, most: int, read: Callable[[], Reading | None] = read_cpus) -> None:
        self._most, self._read = most, read
        self._threads = most
        self._others = 0.0  # CPUs others keep busy, smoothed
        self._last = read() if most > 1 else None
        self._wait = _FIRST
        self._asked: float | None = None
        self._usual = 0.0  # seconds from step to step, with so many threads

    def threads(self) -> int:
        """The number of threads for the next step."""
        if self._last is None:
            return self._threads
        now, slow = time.monotonic(), self._slow(time.monotonic())
        since = now - self._last.at
        if since >= self._wait or (slow and since >= _SOONEST):
            self._look(slow)
        return self._threads

    def _slow(self, now: float) -> bool:
        """Whether the last step took much longer than those before it. Pauses between requests do too, and cost a look."""
        took, self._asked = now - self._asked if self._asked is not None else 0.0, now
        if not took:
            return False
        if not self._usual:
            self._usual = took
        slow = took > _SLOW * self._usual
        self._usual += (min(took, 2 * self._usual) - self._usual) / 8
        return slow

    def _look(self, slow: bool) -> None:
        assert self._last is not None, "a first look was taken"
        now = self._read()
        if now is None:
            return
        elapsed = now.at - self._last.at
        if elapsed > 0:
            busy = (now.everyone - self._last.everyone - (now.ourselves - self._last.ourselves)) / elapsed
            # A long gap tells more about the present than what was before it; and a slow step has a cause.
            weight = 1.0 - _SMOOTHING ** (elapsed / self._wait)
            weight = max(weight, 0.7) if slow and busy > self._others else weight
            self._others += weight * (max(0.0, busy) - self._others)
            threads = min(self._most, max(1, round(self._most - self._others)))
            if threads != self._threads:
                self._threads, self._usual = threads, 0.0
        self._last, self._wait = now, PERIOD
