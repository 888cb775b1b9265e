"""Keeps a computation on some CPUs: the fast cores of a processor that has slow ones beside them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection


class Affinity:
    """A context manager: until it ends, the calling thread and the threads started meanwhile run on ``cpus`` alone; () changes nothing.

    Threads inherit the affinity of the one that starts them, so this reaches ggml's, whoever makes them: OpenMP starts a team in its first
    parallel region and keeps it, ggml without OpenMP starts threads for each graph. The caller itself is where it may be for the
    rest of its work: it belongs to the program that embeds edge-rt.
    """

    def __init__(self, cpus: Collection[int]) -> None:
        self.cpus = frozenset(cpus) if hasattr(os, "sched_setaffinity") else frozenset()  # macOS and Windows have no such call
        self._before: set[int] | None = None

    def __enter__(self) -> None:
        if self.cpus:
            # Not allowed now: Android takes CPUs from programs in the background, and gives them back.
            with contextlib.suppress(OSError):
                before = os.sched_getaffinity(0)
                os.sched_setaffinity(0, self.cpus)
                self._before = before

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            with contextlib.suppress(OSError):  # as above: CPUs of before may be gone
                os.sched_setaffinity(0, self._before)
            self._before = None


def fitting(cpus: Collection[int], threads: int | None) -> tuple[int, ...]:
    """The CPUs to keep to: () if the user asks for more threads than these have room for, or this process may not use all of them."""
    if threads is not None and threads > len(cpus):
        return ()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    return tuple(cpus) if allowed.issuperset(cpus) else ()
