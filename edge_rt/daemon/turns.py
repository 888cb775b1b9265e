"""Steps by turns: workers of several models share the CPUs, and two that compute at once are slower than one after the other.

(Threads of a graph wait for each other at every node, spinning; one that is kept from its CPU keeps all of them. Two 135M models at
once on two CPUs gave a third of the tokens that they gave by turns.)
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from types import TracebackType

LATELY = 1.0
"""Seconds that one who was met counts as being there."""
_DOOR, _ROOM = 0, 1


def shared() -> int | None:
    """A descriptor that workers inherit, None where the system has no locks of this kind, or no place for their file."""
    try:
        import fcntl  # noqa: F401 - whether there is one

        descriptor, path = tempfile.mkstemp(prefix="edge-rt-turns-")
        os.unlink(path)
    except (ImportError, OSError) as error:
        logging.getLogger("edge_rt.daemon").warning("models do not compute by turns: %s", error)
        return None
    return descriptor


class Turns:
    """A context: inside it, no other process with the same descriptor is.

    Two locks on bytes of a file, as a door and a room: who waits holds the door, so the one that leaves the room cannot be back before
    the next is in. The locks are a process's own (fcntl(2), F_SETLKW) and end with it, however it ends.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.waiting = False
        """Somebody else has the turn."""
        self._met = float("-inf")

    @property
    def crowded(self) -> bool:
        """Whether somebody else computes just now, too."""
        return time.monotonic() - self._met < LATELY

    def __enter__(self) -> None:
        import fcntl

        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _DOOR)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _ROOM)
        except OSError:
            self.waiting = True
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, _DOOR)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, _ROOM)
            self.waiting, self._met = False, time.monotonic()
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _DOOR)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import fcntl

        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _ROOM)
