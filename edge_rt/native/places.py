"""Memory in equal pieces side by side: what lies in them at equal distances can be read as one tensor with one dimension more.

For pieces of each size an address range of ``SIDE_BY_SIDE`` is reserved, which takes no memory; a piece has memory as long as it is
taken, and the first that is free is taken next, so that those in use stay close together.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from heapq import heappop, heappush

from edge_rt.errors import OutOfMemory
from edge_rt.native import memory

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
            return memory.map_anonymous(size, found.base + place * size)
        except OutOfMemory:
            _free(size, found, place)
            raise


def _reserved(size: int) -> _Range:
    """A new range; for one piece alone where addresses are short, as under a limit (RLIMIT_AS). Raises OutOfMemory."""
    try:
        places, base = SIDE_BY_SIDE, memory.reserve(size * SIDE_BY_SIDE)
    except OutOfMemory:
        places, base = 1, memory.reserve(size)
    found = _Range(base, places, list(range(places)))
    _ranges.setdefault(size, []).append(found)
    return found


def give(address: int, size: int) -> None:
    """Give a piece and its memory back."""
    with _lock:
        found = next(one for one in _ranges[size] if one.base <= address < one.base + size * one.places)
        memory.reserve(size, address)
        _free(size, found, (address - found.base) // size)


def _free(size: int, found: _Range, place: int) -> None:
    heappush(found.free, place)
    if len(found.free) == found.places:
        _ranges[size].remove(found)
        if not _ranges[size]:
            del _ranges[size]
        memory.unmap(found.base, size * found.places)
