"""Reads every half second what the server's processes hold and what the machine takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.hooks import CpuSensors
from edge_rt_distill.replay.live import Tally
from edge_rt_distill.replay.results import Reading

if TYPE_CHECKING:
    import psutil

EVERY = 0.5


class Held(NamedTuple):
    """``memory``: bytes of a process and its children, None: it is gone. ``pss``: proportional set sizes, in which a page that several
    processes share counts once; else resident set sizes."""

    memory: int | None
    pss: bool = True


def held(pid: int) -> Held:
    """Of a process and all its children."""
    import psutil

    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return Held(None)
    total, found, pss = 0, False, True
    for process in processes:
        try:
            own = _pss(process)
            total += process.memory_info().rss if own is None else own
            found, pss = True, pss and own is not None
        except psutil.Error:  # it has ended just now
            continue
    return Held(total if found else None, pss)


def _pss(process: psutil.Process) -> int | None:
    """None where the system does not tell it, or not to us."""
    import psutil

    try:
        return getattr(process.memory_full_info(), "pss", None)
    except psutil.AccessDenied:
        return None


class Watch:
    """Readings of one run."""

    def __init__(self, pid: int | None, now: Callable[[], float], tally: Tally, root: Path = Path("/")) -> None:
        """``root``: of a recorded tree of the system's files."""
        self._pid, self._now, self._tally = pid, now, tally
        self._sensors = CpuSensors(root)
        self._joules: float | None = None
        self._last = 0.0
        self._pss = True
        self.readings: list[Reading] = []

    async def go_on(self) -> None:
        """Read until cancelled."""
        await asyncio.to_thread(self._sensors.health)  # counters tell what was taken since the last look
        self._last = self._now()
        while True:
            await self.read()
            await asyncio.sleep(EVERY)

    async def read(self) -> None:
        """Once. It takes milliseconds for gigabytes, so it is done on a thread."""
        reading = await asyncio.to_thread(self._read)
        self.readings.append(reading)
        self._tally.reading = reading

    def _read(self) -> Reading:
        found = Held(None) if self._pid is None else held(self._pid)
        self._pss &= found.pss
        power, at = self._sensors.health().power, self._now()
        if power is not None:
            self._joules = (self._joules or 0.0) + power * (at - self._last)
        self._last = at
        return Reading(at, found.memory, self._joules)

    @property
    def unknown(self) -> list[str]:
        """What could not be read, as sentences for people."""
        found = []
        if self._pid is None:
            found.append("memory is not read, as the server's process is not known; name it with --pid")
        elif not self._pss:
            found.append("memory is the sum of resident sets, as the system does not tell what processes share")
        if self._joules is None:
            found.append("the energy that the machine takes cannot be read here")
        return found
