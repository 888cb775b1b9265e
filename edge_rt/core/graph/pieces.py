"""How a step is divided among graph runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edge_rt.core.engine import Part


class Piece(NamedTuple):
    """Tokens of one part that go into one graph run; ``rows`` of them get logits."""

    part: int
    sequence: int
    tokens: Sequence[int]
    rows: Sequence[int]


def in_pieces(parts: Sequence[Part], size: int, order: Sequence[int] | None = None) -> list[list[Piece]]:
    """Divide parts into graph runs of at most ``size`` tokens; ``order``: indices of the parts as they go in, None: as they are."""
    runs: list[list[Piece]] = [[]]
    room = size
    for index in range(len(parts)) if order is None else order:
        part = parts[index]
        n, start = len(part.tokens), 0
        while start < n:
            if room == 0:
                runs.append([])
                room = size
            take = min(room, n - start)
            wanted = {"none": range(0), "last": range(n - 1, n), "all": range(n)}[part.logits]
            rows = [r - start for r in wanted if start <= r < start + take]
            runs[-1].append(Piece(index, part.sequence, part.tokens[start : start + take], rows))
            start, room = start + take, room - take
    return [run for run in runs if run]
