"""Logits a few positions at a time: those of a batch over a whole vocabulary are by far the largest thing there would be."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_BYTES = 24 << 20
"""Of one matrix of logits: large enough for products at full speed, small enough that the allocator hands the same memory out again."""


def pieces(positions: int, vocabulary: int, element: int = 4, chunk: int = 0) -> Iterator[slice]:
    """Positions whose logits, of ``element`` bytes each, are computed together: ``chunk`` at a time, 0: as many as CHUNK_BYTES hold."""
    size = chunk or max(16, CHUNK_BYTES // (vocabulary * element))
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))
