"""Memory of the process: pages of mapped files, tensors side by side, and the CPUs a computation is kept on."""

from __future__ import annotations

import contextlib
import ctypes as C
import mmap
import os
import sys
import threading
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from typing import Any

from edge_rt.errors import NativeError, OutOfMemory

# Pages of mapped files: map over an address, ask what is resident, advise, lock, release (Linux and macOS).

PAGE = mmap.PAGESIZE
_PROT_READ, _MAP_SHARED, _MAP_FIXED = 1, 1, 0x10
_ADVICE = {"normal": 0, "random": 1, "sequential": 2, "willneed": 3, "dontneed": 4, "populate_read": 22, "hugepage": 14, "cold": 20}
_FADV_WILLNEED, _FADV_DONTNEED = 3, 4
_HUGE = 2 << 20
"""The usual size of a huge page. Where it is another, pages are merely smaller."""
_MAY_MOVE, _FIXED, _DONT_UNMAP = 1, 2, 4
_LOW_BIT = bytes(i & 1 for i in range(256))  # mincore defines only the lowest bit of each byte


class _Buffer(C.Structure):
    """struct Py_buffer, of the stable ABI."""

    _fields_ = (
        ("buf", C.c_void_p), ("obj", C.c_void_p), ("len", C.c_ssize_t), ("itemsize", C.c_ssize_t), ("readonly", C.c_int),
        ("ndim", C.c_int), ("format", C.c_char_p), ("shape", C.c_void_p), ("strides", C.c_void_p), ("suboffsets", C.c_void_p),
        ("internal", C.c_void_p),
    )  # fmt: skip


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = C.CDLL(None, use_errno=True)
    # void * mmap(void * addr, size_t length, int prot, int flags, int fd, off_t offset);
    libc.mmap.restype, libc.mmap.argtypes = C.c_void_p, [C.c_void_p, C.c_size_t, C.c_int, C.c_int, C.c_int, C.c_int64]
    # int munmap(void * addr, size_t length);
    libc.munmap.restype, libc.munmap.argtypes = C.c_int, [C.c_void_p, C.c_size_t]
    if sys.platform == "linux":
        # void * mremap(void * old_address, size_t old_size, size_t new_size, int flags, ... /* void * new_address */);
        libc.mremap.restype, libc.mremap.argtypes = C.c_void_p, [C.c_void_p, C.c_size_t, C.c_size_t, C.c_int, C.c_void_p]
    # int madvise(void * addr, size_t length, int advice);
    libc.madvise.restype, libc.madvise.argtypes = C.c_int, [C.c_void_p, C.c_size_t, C.c_int]
    # int mincore(void * addr, size_t length, unsigned char * vec);
    libc.mincore.restype, libc.mincore.argtypes = C.c_int, [C.c_void_p, C.c_size_t, C.c_void_p]
    # int mlock(const void * addr, size_t length);
    libc.mlock.restype, libc.mlock.argtypes = C.c_int, [C.c_void_p, C.c_size_t]
    # int munlock(const void * addr, size_t length);
    libc.munlock.restype, libc.munlock.argtypes = C.c_int, [C.c_void_p, C.c_size_t]
    return libc


def page_span(address: int, size: int) -> tuple[int, int]:
    """The smallest whole-page (address, size) that covers a byte range."""
    start = address // PAGE * PAGE
    end = -(-(address + size) // PAGE) * PAGE
    return start, end - start


def inner_page_span(address: int, size: int) -> tuple[int, int]:
    """The largest whole-page (address, size) inside a byte range; size 0 if there is none."""
    start = -(-address // PAGE) * PAGE
    end = (address + size) // PAGE * PAGE
    return start, max(0, end - start)


def map_file(fd: int, size: int, offset: int = 0, address: int | None = None) -> int:
    """Map a file read-only and shared, without reading it; over ``address`` (page-aligned) if given. Raises NativeError."""
    flags = _MAP_SHARED | (_MAP_FIXED if address is not None else 0)
    mapped = _libc().mmap(address, size, _PROT_READ, flags, fd, offset)
    if mapped in (None, C.c_void_p(-1).value):
        raise NativeError(f"cannot map {size} bytes: {os.strerror(C.get_errno())}")
    return int(mapped)


def map_anonymous(size: int, address: int | None = None) -> int:
    """Fresh, zeroed, private memory (over ``address`` if given) that costs nothing until written. Raises OutOfMemory."""
    anonymous = 0x1000 if sys.platform == "darwin" else 0x20
    flags = 0x02 | anonymous | (_MAP_FIXED if address is not None else 0)  # MAP_PRIVATE
    mapped = _libc().mmap(address, size, 3, flags, -1, 0)  # PROT_READ | PROT_WRITE
    if mapped in (None, C.c_void_p(-1).value):
        raise OutOfMemory(f"cannot get {size >> 20} MB of memory ({os.strerror(C.get_errno())}); lower --ctx or close other programs")
    return int(mapped)


def reserve(size: int, address: int | None = None) -> int:
    """An address range without memory; over ``address`` if given, whose memory goes. Raises OutOfMemory."""
    anonymous = 0x1000 if sys.platform == "darwin" else 0x20
    flags = 0x02 | anonymous | (_MAP_FIXED if address is not None else 0)  # MAP_PRIVATE
    mapped = _libc().mmap(address, size, 0, flags, -1, 0)  # PROT_NONE
    if mapped in (None, C.c_void_p(-1).value):
        raise OutOfMemory(f"cannot get {size >> 20} MB of address space ({os.strerror(C.get_errno())}); lower --ctx or close sessions")
    return int(mapped)


def map_large(size: int) -> int:
    """``map_anonymous``, in huge pages from the first on where the system has them. Raises OutOfMemory."""
    mapped = map_anonymous(size + _HUGE)
    address = -(-mapped // _HUGE) * _HUGE
    if address > mapped:
        unmap(mapped, address - mapped)
    unmap(address + size, mapped + _HUGE - address)  # not empty: the mapping was aligned to a page at least
    if sys.platform == "linux":
        advise(address, size, "hugepage")
    return address


def unmap(address: int, size: int) -> None:
    """Remove a mapping."""
    _libc().munmap(address, size)


@lru_cache(maxsize=1)
def can_move() -> bool:
    """Whether ``move`` works here: Linux from 5.7 on."""
    if sys.platform != "linux":
        return False
    address = map_anonymous(2 * PAGE)
    try:
        move(address, address + PAGE, PAGE)
    except OSError:
        return False
    finally:
        unmap(address, 2 * PAGE)
    return True


def move(address: int, target: int, size: int) -> None:
    """Move the pages of private memory (of one mapping) over other mapped addresses, without a copy; what is left reads as zeros.

    Raises OSError.
    """
    if _libc().mremap(address, size, size, _MAY_MOVE | _FIXED | _DONT_UNMAP, target) != target:
        raise OSError(C.get_errno(), os.strerror(C.get_errno()))


def fill_zero(address: int, size: int) -> None:
    """Write zeros, which takes the memory."""
    C.memset(address, 0, size)


def advise(address: int, size: int, advice: str) -> bool:
    """madvise over whole pages; False where the kernel does not know the advice or refuses."""
    return bool(_libc().madvise(address, size, _ADVICE[advice]) == 0)


def populate(address: int, size: int) -> bool:
    """Read pages in and enter them in the page table (MADV_POPULATE_READ, Linux 5.14); False where unknown."""
    return sys.platform == "linux" and advise(address, size, "populate_read")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
_ARENAS, _APART = 2, 128 << 10


def steady_malloc() -> None:
    """Have malloc give freed memory back, where it is glibc's: for processes that run for weeks.

    By itself it raises the size from which memory is mapped apart whenever such memory is freed, up to 32 MB, and has eight arenas a
    CPU. Then graphs and buffers of some 100 KB to MBs that come and go leave holes: 55 MB in place of 39 after 600 requests of a model
    that holds 25.
    """
    if hasattr(_libc(), "mallopt"):
        for option, value in ((_M_TRIM_THRESHOLD, _APART), (_M_MMAP_THRESHOLD, _APART), (_M_ARENA_MAX, _ARENAS)):
            _libc().mallopt(option, value)


def trim() -> None:
    """Give what malloc holds and nobody uses back to the system, where the C library can (glibc)."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def read_ahead(fd: int, offset: int, size: int) -> None:
    """Ask for a file range to be read into the page cache, without waiting."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, _FADV_WILLNEED)


def resident_bytes(address: int, size: int) -> int | None:
    """Bytes of a page-aligned range that are in memory (mincore), None where the system cannot say."""
    if size == 0:
        return 0
    pages = -(-size // PAGE)
    vector = bytearray(pages)
    if _libc().mincore(address, size, address_of(vector)) != 0:
        return None
    return vector.translate(_LOW_BIT).count(1) * PAGE


def lock(address: int, size: int) -> bool:
    """Keep pages in memory (mlock); False where RLIMIT_MEMLOCK does not allow it."""
    return bool(_libc().mlock(address, size) == 0)


def unlock(address: int, size: int) -> None:
    """Undo ``lock``."""
    _libc().munlock(address, size)


def yield_pages(address: int, size: int) -> None:
    """Take a clean mapped file range out of the page table, so that its memory is anybody's; what nobody takes is there when touched.

    Where the system has MADV_COLD (Linux 5.4), the range is among the first that it takes when memory is short.
    """
    if sys.platform == "linux":
        advise(address, size, "cold")  # before it leaves the page table, which would count as a use
    advise(address, size, "dontneed")


def release(address: int, size: int, fd: int, offset: int) -> None:
    """Give a clean mapped file range back: out of the page table, then out of the page cache. It is read again when touched."""
    advise(address, size, "dontneed")
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, _FADV_DONTNEED)


def address_of(buffer: Any) -> int:
    """Address of a readable buffer's first byte (a read-only mmap included, which ctypes' own ``from_buffer`` refuses)."""
    view = _Buffer()
    C.pythonapi.PyObject_GetBuffer(C.py_object(buffer), C.byref(view), 0)  # raises TypeError, BufferError
    C.pythonapi.PyBuffer_Release(C.byref(view))
    return int(view.buf or 0)


# Memory in equal pieces side by side: what lies in them at equal distances can be read as one tensor with one dimension more.
#
# For pieces of each size an address range of ``SIDE_BY_SIDE`` is reserved, which takes no memory; a piece has memory as long as it is
# taken, and the first that is free is taken next, so that those in use stay close together.

SIDE_BY_SIDE = 16
"""Pieces in a range; as many sequences as one step carries."""


@dataclass(slots=True)
class _Range:
    base: int
    places: int
    free: list[int]


_ranges: dict[int, list[_Range]] = {}
_lock = threading.RLock()  # a piece may be given back by the garbage collector, in the middle of anything


def take(size: int) -> int:
    """The address of a fresh, zeroed piece of ``size`` bytes (whole pages) that costs nothing until written. Raises OutOfMemory."""
    with _lock:
        found = next((one for one in _ranges.get(size, ()) if one.free), None) or _reserved(size)
        place = heappop(found.free)  # before anything else: a range with a place taken stays
        try:
            return map_anonymous(size, found.base + place * size)
        except OutOfMemory:
            _free(size, found, place)
            raise


def _reserved(size: int) -> _Range:
    """A new range; for one piece alone where addresses are short, as under a limit (RLIMIT_AS). Raises OutOfMemory."""
    try:
        places, base = SIDE_BY_SIDE, reserve(size * SIDE_BY_SIDE)
    except OutOfMemory:
        places, base = 1, reserve(size)
    found = _Range(base, places, list(range(places)))
    _ranges.setdefault(size, []).append(found)
    return found


def give(address: int, size: int) -> None:
    """Give a piece and its memory back."""
    with _lock:
        found = next(one for one in _ranges[size] if one.base <= address < one.base + size * one.places)
        reserve(size, address)
        _free(size, found, (address - found.base) // size)


def _free(size: int, found: _Range, place: int) -> None:
    heappush(found.free, place)
    if len(found.free) == found.places:
        _ranges[size].remove(found)
        if not _ranges[size]:
            del _ranges[size]
        unmap(found.base, size * found.places)


# Keeps a computation on some CPUs: the fast cores of a processor that has slow ones beside them.


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
