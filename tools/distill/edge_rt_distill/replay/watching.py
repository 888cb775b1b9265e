"""Reads every half second what the server's processes hold and what the machine takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.hooks import CpuSensors
from edge_rt_distill.replay.live import Tally
from edge_rt_distill.replay.results import Reading

if TYPE_CHECKING:
    import psutil

EVERY = 0.5
_LOOK_AGAIN = 10
"""Readings after which it is looked for new processes: that takes longer than a reading, and time from who sends the requests."""


class Held(NamedTuple):
    """``memory``: bytes of all processes, None: all are gone. ``pss``: proportional set sizes, in which a page that several processes
    share counts once; else resident set sizes. ``gone``: how many processes have ended."""

    memory: int | None
    pss: bool = True
    gone: int = 0


def family(pid: int) -> list[psutil.Process]:
    """A process and all its children, none if it is gone."""
    import psutil

    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def held(processes: Sequence[psutil.Process]) -> Held:
    """What processes hold together."""
    import psutil

    sizes, pss = [], True
    for process in processes:
        try:
            own = _pss(process)
            sizes.append(process.memory_info().rss if own is None else own)
            pss = pss and own is not None
        except psutil.Error:
            continue
    return Held(sum(sizes) if sizes else None, pss, len(processes) - len(sizes))


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
        self._family: list[psutil.Process] = []
        self._complete = False
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
        if self._pid is not None and (not self._complete or len(self.readings) % _LOOK_AGAIN == 0):
            self._family = family(self._pid)
        found = held(self._family)
        self._complete = bool(self._family) and not found.gone
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
