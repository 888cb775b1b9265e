"""Pages of files: drop them from memory, see what is there, and how fast the disk gives them back."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from pathlib import Path

from edge_rt.core.weights.streaming import REQUEST, Source
from edge_rt.native import ggml, memory

_CHUNK = 2 << 20
_READ = 4 * REQUEST


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
    """Bytes a second of sequential reads from disk, as the pager makes them: around the page cache where the file system can."""
    drop(path)
    with contextlib.ExitStack() as stack:
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        source = stack.enter_context(contextlib.closing(Source(descriptor)))
        scratch = memory.map_large(_READ)
        stack.callback(memory.unmap, scratch, _READ)
        memory.fill_zero(scratch, _READ)  # memory is not to be had for nothing; here it is had before the clock starts
        target = ggml.memory_at(scratch, _READ)
        size = min(limit, os.fstat(descriptor).st_size) // _READ * _READ
        started = time.perf_counter()
        for position in range(0, size, _READ):
            source.read(target, position)
        return size / (time.perf_counter() - started)
