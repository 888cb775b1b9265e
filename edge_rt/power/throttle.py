"""The pace of an engine's steps: with how many threads each is computed, and how long nothing is before it.

The governor says how many CPUs others leave free. Where there are limits of power or temperature, the sustainer chooses within that, and
rests are taken before steps: what a step owes is waited for when the next one comes, so that its tokens are out already, and time in which
nobody asked anything counts.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING

from edge_rt.power.governor import Governor, read_cpus

if TYPE_CHECKING:
    from edge_rt.device_profile import Limits
    from edge_rt.power.controller import Kind, PowerController, Sustained

PERIOD = 0.2
"""Seconds between two looks at the device, more or less."""
NAP = 0.25
"""Seconds after which a rest says that it goes on."""
IDLE = 10.0
"""Seconds without a step after which nobody looks at the device."""


class StepThrottle:
    """For one engine. One thread takes the steps; ``report`` and ``news`` may be asked on any."""

    def __init__(self, threads: int | None, available: int, limits: Limits | None = None, cpus: Collection[int] = ()) -> None:
        """``threads``: as the user fixed it, else up to ``available``. ``cpus``: on these alone, () on any."""
        self._fixed = threads
        self._governor = Governor(available, partial(read_cpus, cpus)) if threads is None else None
        self._sustainer: PowerController | None = None
        self._watch: _Watch | None = None
        if limits is not None:
            from edge_rt.power.controller import PowerController  # few ask for it, and all would wait for it

            most = threads or available
            self._sustainer = PowerController(
                limits.health, power=limits.power, celsius=limits.celsius, most=most, fixed=threads is not None
            )
            self._watch = _Watch(self._sustainer.look)
        self._ended = self._due = self._began = time.monotonic()
        self._rested = 0.0
        self._threads, self._duty = threads or available, 1.0
        self._ahead: dict[int, int] = {}

    @property
    def limited(self) -> bool:
        """Whether there are limits to hold."""
        return self._sustainer is not None

    def before(self, kind: Kind, moved: Callable[[], None]) -> int:
        """Wait until the next step may be taken; the threads for it. ``moved`` is called while it waits."""
        bound = self._fixed if self._governor is None else self._governor.threads()
        assert bound is not None, "without a governor it is fixed"
        if self._sustainer is None or self._watch is None:
            return bound
        self._watch.wake()
        while (left := self._due - time.monotonic()) > 0:
            time.sleep(min(NAP, left))
            moved()
        self._threads, self._duty = self._sustainer.choose(kind, bound)
        self._began = time.monotonic()
        self._rested = max(0.0, min(self._due, self._began) - self._ended)
        self._sustainer.begins(kind, self._threads)
        return self._threads

    def after(self, kind: Kind, tokens: int) -> None:
        """The step is over, of so many tokens. To be called where there are limits."""
        if self._sustainer is None:
            return
        self._ended = time.monotonic()
        seconds = max(1e-6, self._ended - self._began)
        self._sustainer.took(kind, self._threads, seconds, tokens, self._rested)
        self._due = self._ended + seconds * (1 / self._duty - 1)

    def written(self, fed: Iterable[tuple[int, int, int]]) -> int:
        """Tokens that a step adds to answers, of its (sequence, cells, tokens): those fed, but for wrong drafts of the step before."""
        total = 0
        for sequence, cells, tokens in fed:
            total += tokens - max(0, self._ahead.pop(sequence, cells) - cells)
            if tokens > 1:
                if len(self._ahead) > 256:  # of sequences that ended
                    self._ahead.clear()
                self._ahead[sequence] = cells + tokens
        return max(0, total)

    def report(self) -> Sustained | None:
        """What was asked for and measured, None without limits."""
        return None if self._sustainer is None else self._sustainer.report()

    def news(self) -> list[str]:
        """What a person should know and was not yet told."""
        return [] if self._sustainer is None else self._sustainer.news()

    def close(self) -> None:
        """Look no more."""
        if self._watch is not None:
            self._watch.close()


class _Watch:
    """A thread that looks at the device while steps are taken, at uneven intervals: even ones may keep step with the rests."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._awake, self._over = threading.Event(), threading.Event()
        self._until = 0.0
        look()  # before anything is computed
        self._thread = threading.Thread(target=self._run, name="edge-rt health", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """A step is about to be taken."""
        self._until = time.monotonic() + IDLE
        if not self._awake.is_set():
            self._awake.set()

    def close(self) -> None:
        """Stop; the thread ends at once, or after the reading that it is at."""
        self._over.set()
        self._awake.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        uneven = random.Random()
        while not self._over.is_set():
            self._awake.wait()
            if self._over.wait(PERIOD * uneven.uniform(0.7, 1.3)):
                return
            self._look()
            if time.monotonic() > self._until:
                self._awake.clear()
                if time.monotonic() <= self._until:  # a step came in between
                    self._awake.set()
