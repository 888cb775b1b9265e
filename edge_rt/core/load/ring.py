"""A ring of slots: a little memory in which all streamed weights take turns, each at its own address.

A slot's pages are moved in the page table to where a unit's weights belong, filled from the file, and moved on: nothing is
released or taken again. Files are read around the page cache (O_DIRECT): no copy, no reclaim, hardly any CPU time. Pages are
huge where the system has them: disks fill memory that lies together up to three times as fast as scattered pages.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise

from edge_rt.core.load.units import Span
from edge_rt.native import ggml, memory

REQUEST = 8 * 1024 * 1024
"""Bytes a read asks for at most: the kernel sends its parts to the disk all at once, so one thread keeps the disk busy."""


class Source:
    """Reads an open file around the page cache where its file system can; else through it, leaving nothing there."""

    def __init__(self, fd: int) -> None:
        """``fd`` stays the caller's. Raises OSError if there are too many open files."""
        direct = _open_direct(fd)
        self.direct = direct is not None
        self._fd = os.dup(fd) if direct is None else direct

    def read(self, target: memoryview, offset: int) -> None:
        """Fill ``target`` (bytes) from a file offset; address, offset and size in whole pages. Raises OSError."""
        done = 0
        while done < len(target):
            count = os.preadv(self._fd, [target[done : done + REQUEST]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the file ends early")
            if not self.direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, offset + done, count, os.POSIX_FADV_DONTNEED)
            done += count

    def close(self) -> None:
        """Close."""
        os.close(self._fd)


def _open_direct(fd: int) -> int | None:
    """The very file ``fd`` has open, opened again with O_DIRECT; None where that is unknown or refused."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, memory.PAGE) as page:
            os.preadv(direct, [page], memory.PAGE)  # some file systems refuse only now, or want larger blocks than pages
    except OSError:
        os.close(direct)
        return None
    return direct


class Ring:
    """``slots`` runs of ``size`` bytes (whole pages), lent to parts of mapped files. Not thread-safe.

    Where pages cannot be moved, a slot is memory taken anew for every turn: the same budget, more work for the system.
    """

    def __init__(self, slots: int, size: int) -> None:
        """Memory is taken when slots are filled. Raises OutOfMemory."""
        self._size, self._moves = size, memory.can_move()
        self._homes = [memory.map_large(size) for _ in range(slots)] if self._moves else []
        self._cuts: list[set[int]] = [set() for _ in range(slots)]  # where spans end: a run between cuts moves as a whole
        self._lent: list[tuple[Span, ...]] = [()] * slots
        self._taken: set[int] = set()
        self._sources: dict[int, Source] = {}
        self._overlaid: list[Span] = []

    def overlay(self, spans: Sequence[Span], slot: int) -> None:
        """Say that parts of files (whole pages, ``size`` bytes at most) will use a slot; they show zeros until they are filled.

        Raises OutOfMemory, OSError.
        """
        position = 0
        for span in spans:
            if span.fd not in self._sources:
                self._sources[span.fd] = Source(span.fd)
            memory.map_anonymous(span.size, span.address)
            self._overlaid.append(span)
            position += span.size
            self._cuts[slot].add(position)

    def fill(self, spans: Sequence[Span], slot: int) -> int:
        """Lend a slot to what was overlaid, and read it from its file; returns bytes read. Raises OSError."""
        if self._moves and slot not in self._taken:  # while it is at home: there huge pages fit
            memory.fill_zero(self._homes[slot], self._size)
            self._taken.add(slot)
        self._lend(slot, spans)
        for span in spans:
            self._sources[span.fd].read(ggml.memory_at(span.address, span.size), span.offset)
        return sum(span.size for span in spans)

    def clear(self) -> None:
        """Give the memory back until slots are filled again."""
        for slot in range(len(self._lent)):
            self._lend(slot, ())
        for home in self._homes:
            memory.map_anonymous(self._size, home)
            memory.advise(home, self._size, "hugepage")
        self._taken.clear()

    def close(self) -> None:
        """Show the files' own pages again, and give the memory back."""
        for span in self._overlaid:
            memory.map_file(span.fd, span.size, span.offset, span.address)
        for home in self._homes:
            memory.unmap(home, self._size)
        for source in self._sources.values():
            source.close()

    def _lend(self, slot: int, spans: Sequence[Span]) -> None:
        """Move a slot's pages from where they are to ``spans``, and what is too much of them home."""
        old, self._lent[slot] = self._lent[slot], tuple(spans)
        if not self._moves:
            for span in old:
                memory.map_anonymous(span.size, span.address)
            return
        home = self._homes[slot]
        before = {position: (address, size) for position, address, size in self._pieces(slot, old)}
        for position, address, size in self._pieces(slot, spans):
            source, _ = before.pop(position, (home + position, size))
            if source != address:
                memory.move(source, address, size)
        for position, (address, size) in before.items():
            memory.move(address, home + position, size)

    def _pieces(self, slot: int, spans: Sequence[Span]) -> Iterator[tuple[int, int, int]]:
        """(position in the slot, address, size) of the runs that move as a whole."""
        start = 0
        for span in spans:
            end = start + span.size
            for a, b in pairwise(sorted({start, end} | {cut for cut in self._cuts[slot] if start < cut < end})):
                yield a, span.address + a - start, b - a
            start = end
