"""How many threads to compute with: as many as there are CPUs nobody else uses, asked again and again.

ggml's threads spin at barriers. Beside one busy neighbour on two cores, two threads are far slower than one: 41 against 87 tokens/s
beside a plain loop, 0.3 against 53 beside a second OpenMP program. Results do not depend on the number of threads.

It is to react within ten tokens when a neighbour comes or goes. One that comes is felt: our threads are ready to run and have no CPU,
which Linux counts for each thread in nanoseconds (``run_delay``, sched-stats.rst). One that goes is only seen, in /proc/stat, which counts
in hundredths of a second: while fewer threads compute than could, it is looked at often.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import NamedTuple

FELT = 0.04
"""Seconds over which waiting is counted: three tokens of a small model beside a neighbour."""
WAITED = 0.25
"""Share of that time for which threads must have waited, all together. Less costs less than a thread gives."""
LOOK, SELDOM = 0.01, 0.25
"""Seconds between looks at /proc/stat: while fewer threads compute than could or waiting cannot be felt, and else."""
SPAN = 0.03
"""Seconds that a look goes back at least: three hundredths can be told from one."""
FREE = 0.35
"""How much of a CPU others may use for a thread more to compute on it; from half of one on it is given up."""
_FIRST = 0.05
"""Seconds before the first look: a prompt that comes right after opening should not meet a busy neighbour unprepared."""
_SOON, _CALMEST = 0.15, 2.0
"""If threads that were taken back had to be given up again that soon, the next look goes back twice as far, at most so many seconds; if
they lasted longer, half as far.
"""


class Reading(NamedTuple):
    """CPU seconds used so far: by everyone on the CPUs this process may use (counted from any moment), and by this process."""

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
    now, idle, counted = time.monotonic(), 0, 0
    for line in lines:
        fields = line.split()
        if fields and fields[0] in usable:
            idle += int(fields[4]) + int(fields[5])
            counted += 1
    # What is not idle is used, or stolen. Used time is sampled; idle time is measured where the tick stops, and only told in hundredths.
    return Reading(now, counted * now - idle / os.sysconf("SC_CLK_TCK"), time.process_time())


def read_waiting() -> dict[int, float] | None:
    """Seconds that each thread which may compute was ready to run and had no CPU, by its id; None where the system does not tell.

    These are the caller and all that Python did not start: who else waits here may wait for our own threads.
    """
    python = {thread.native_id for thread in threading.enumerate()} - {threading.get_native_id()}
    found = {}
    try:
        for name in os.listdir("/proc/self/task"):
            if (thread := int(name)) not in python:
                with open(f"/proc/self/task/{name}/schedstat", "rb") as file:
                    found[thread] = int(file.read().split()[1]) * 1e-9
    except (OSError, IndexError):  # no such kernel, or a thread that ended meanwhile
        return None
    return found if any(found.values()) else None


class Governor:
    """Chooses between 1 and ``most`` threads. ``threads`` is cheap enough to ask before every step."""

    def __init__(
        self,
        most: int,
        read: Callable[[], Reading | None] = read_cpus,
        waiting: Callable[[], dict[int, float] | None] = read_waiting,
    ) -> None:
        self._most, self._read, self._waiting = most, read, waiting
        self._threads = most
        first = read() if most > 1 else None
        self._seen = deque([] if first is None else [first])
        self._next = first.at + _FIRST if first else 0.0
        self._calm = SPAN
        self._raised = 0.0
        self._felt = waiting() if first else None
        self._felt_at = first.at if first else 0.0

    def threads(self) -> int:
        """The number of threads for the next step."""
        if self._seen:
            now = time.monotonic()
            felt = self._threads > 1 and now - self._felt_at >= FELT and self._waited(now)
            if (felt or now >= self._next) and (seen := self._read()) is not None:
                self._choose(min(self._free(seen), self._threads - 1 if felt else self._most), seen)
        return self._threads

    def _waited(self, now: float) -> bool:
        """Whether our threads had to wait since it was last asked."""
        before, since = self._felt, now - self._felt_at
        self._felt, self._felt_at = self._waiting(), now
        if before is None or self._felt is None:
            return False
        return sum(seconds - before.get(thread, 0.0) for thread, seconds in self._felt.items()) >= WAITED * since

    def _free(self, now: Reading) -> int:
        """As many threads as others leave CPUs: fewer if they used more of late, more only if they have been calm for longer."""
        while len(self._seen) > 1 and now.at - self._seen[1].at >= self._calm:
            self._seen.popleft()
        for span in (SPAN, self._calm):
            before = next((one for one in reversed(self._seen) if now.at - one.at >= span), None)
            if before is None:
                break
            others = (now.everyone - before.everyone - (now.ourselves - before.ourselves)) / (now.at - before.at)
            free = min(self._most, max(1, round(self._most - others)))
            if free < self._threads:
                return free
            if span == self._calm:
                return max(self._threads, min(free, int(self._most - others + FREE)))
        return self._threads

    def _choose(self, threads: int, seen: Reading) -> None:
        """So many from now on; what was read before tells of others beside another number of threads."""
        if threads > self._threads:
            self._raised = seen.at
        elif threads < self._threads:
            lasted = seen.at - self._raised
            patience = 2 * self._calm if lasted < _SOON else SPAN if lasted > _CALMEST else self._calm / 2
            self._calm = min(_CALMEST, max(SPAN, patience))
        if threads != self._threads:
            self._threads = threads
            self._seen.clear()
            self._felt, self._felt_at = self._waiting(), seen.at
        self._seen.append(seen)
        self._next = seen.at + (SELDOM if threads == self._most and self._felt is not None else LOOK)
