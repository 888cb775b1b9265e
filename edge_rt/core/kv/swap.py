"""Cells of evicted segments on disk, so that a segment comes back as if it had never left, without being computed again.

They are the user's words in another form: the directory is private, and goes with the session.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from edge_rt import config

LIMIT = 256 << 20
"""Bytes a session may keep; beyond, the oldest go, and their segments are computed again when they come back."""


class KVSwap:
    """Exported cells by where their tokens stand and what they are. Where nothing can be written, nothing is kept."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._folder: Path | None = None
        self._remove: weakref.finalize[..., KVSwap] | None = None

    def put(self, start: int, tokens: Sequence[int], cells: bytes) -> bool:
        """Keep the cells of tokens that stand at ``start``; False if they are too large or the disk says no."""
        if len(cells) > self._limit:
            return False
        name = _name(start, tokens)
        try:
            (self._place() / name).write_bytes(cells)
        except OSError:  # full or read-only: the segment will be computed again, which is slower and no loss
            return False
        self._sizes[name] = len(cells)
        self._sizes.move_to_end(name)
        while sum(self._sizes.values()) > self._limit:
            self._drop(next(iter(self._sizes)))
        return True

    def take(self, start: int, tokens: Sequence[int]) -> bytes | None:
        """The cells, which are then no longer kept; None if they are not there."""
        name = _name(start, tokens)
        if name not in self._sizes:
            return None
        with contextlib.suppress(OSError):
            found = (self._place() / name).read_bytes()
            self._drop(name)
            return found
        return None

    def close(self) -> None:
        """Forget everything."""
        self._sizes.clear()
        if self._remove:
            self._remove()

    def _place(self) -> Path:
        """The session's folder, made when it is first needed."""
        if self._folder is None:
            parent = config.cache_dir() / "evicted"
            parent.mkdir(parents=True, exist_ok=True)
            _forget_the_dead(parent)
            self._folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def _drop(self, name: str) -> None:
        del self._sizes[name]
        with contextlib.suppress(OSError):
            (self._place() / name).unlink()


def _name(start: int, tokens: Sequence[int]) -> str:
    """The same only for the same tokens at the same place of the history."""
    import hashlib

    digest = hashlib.blake2b(b"".join(int(token).to_bytes(4, "little") for token in tokens), digest_size=16)
    return f"{start}-{digest.hexdigest()}"


def _forget_the_dead(parent: Path) -> None:
    """Remove what processes left that ended without cleaning up."""
    for folder in parent.iterdir():
        pid = folder.name.split("-")[0]
        if not pid.isdigit() or int(pid) == os.getpid():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # it lives, and is someone else's
