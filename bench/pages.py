"""Pages of files: drop them from memory, see what is there, and how fast the disk gives them back."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from pathlib import Path

from edge_rt.native import memory

_CHUNK = 2 << 20


def resident(path: Path) -> float:
    """Fraction of a file that is in memory (mincore). Raises RuntimeError where the system cannot say."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        found = memory.resident_bytes(memory.address_of(mapped), len(mapped))
        if found is None:
            raise RuntimeError("this system does not say what is in memory")
        return min(1.0, found / len(mapped))


def drop(*paths: Path) -> None:
    """Drop files from memory. Raises RuntimeError if more than 1 % stays: another process has it mapped, or the system cannot."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if (left := resident(path)) > 0.01:
            raise RuntimeError(f"{left:.0%} of {path.name} stays in memory; close what uses it")


def warm(*paths: Path) -> None:
    """Read files, so that all of them is in memory."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            scratch = bytearray(_CHUNK)
            while file.readinto(scratch):
                pass


def bandwidth(path: Path, limit: int = 1 << 30) -> float:
    """Bytes a second of sequential reads of 2 MB from disk: the better of through and around the page cache (O_DIRECT)."""
    drop(path)
    rates = [_read_rate(path, 0, limit)]
    drop(path)
    with contextlib.suppress(OSError):  # a file system without direct reads: the other figure stands alone
        rates.append(_read_rate(path, os.O_DIRECT, limit))
    return max(rates)


def _read_rate(path: Path, flags: int, limit: int) -> float:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        with mmap.mmap(-1, _CHUNK) as scratch:  # page-aligned, as direct reads need it
            size = min(limit, os.fstat(descriptor).st_size) // _CHUNK * _CHUNK
            started, position = time.perf_counter(), 0
            while position < size:
                position += os.preadv(descriptor, [scratch], position)
            return position / (time.perf_counter() - started)
    finally:
        os.close(descriptor)
