"""How many cells a cache has room for: whole steps, growing by a quarter. Engines of plugins grow theirs alike."""

from __future__ import annotations

STEP = 256
"""Cells: attention runs over multiples of this (as in llama.cpp), and capacities are multiples of it."""


def padded(cells: int) -> int:
    """Cells rounded up to a whole step, at least one."""
    return max(STEP, -(-cells // STEP) * STEP)


def next_capacity(current: int, needed: int, limit: int) -> int:
    """Grow by a quarter, at least one step: the waste stays under a quarter and copying stays linear in the end."""
    return min(padded(limit), max(padded(needed), padded(current + current // 4) if current else 0))


def largest_capacity(current: int, cells: int, limit: int) -> int:
    """The most that a cache of ``current`` cells comes to while it grows to ``cells``, however many are asked for at a time."""
    return current if cells <= current else next_capacity(max(current, padded(cells) - STEP), cells, limit)
