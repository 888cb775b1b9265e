"""Shared beginnings: sequences whose session ended are kept a while, so that a prompt with the same beginning starts from their cells."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from edge_rt.core.engine import Engine, PrunesCells, RemovesCells
from edge_rt.errors import ContextError

WORTH = 16
"""Tokens a shared beginning must have to be worth keeping or copying."""
_BLOCK = 1024
"""Tokens compared at once, which is faster than one by one."""


class Kept(NamedTuple):
    """A sequence nobody uses now, the tokens in its cells, and whose they are."""

    sequence: int
    tokens: list[int]
    owner: object


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        if a[start:end] != b[start:end]:
            return next(i for i in range(start, end) if a[i] != b[i])
    return n


def cut(engine: Engine, sequence: int, cells: int, *, gaps: bool = False) -> int:
    """Forget the cells from ``cells`` on; returns how many are left: none where the model cannot go back to there.

    ``gaps``: there are some before. Otherwise none may be left at the end either: the next token gets the position of the first cell
    that was forgotten, so if cells were removed just before that one, the last that is left goes too.
    """
    try:
        engine.truncate(sequence, cells)
        if not gaps and cells and isinstance(engine, RemovesCells) and engine.next_position(sequence) != cells:
            cells -= 1
            engine.truncate(sequence, cells)
    except ContextError:
        cells = 0
        engine.truncate(sequence, cells)
    return cells


class PrefixCache:
    """Holds sequences of ended sessions within a budget of cells, least recently used out first.

    Each has an owner, and serves no one else: how long a prompt takes would tell one what another asked. An owner is any value; cells
    made with an adapter are another's than those made without.
    """

    def __init__(self, engine: Engine, budget: int) -> None:
        """``budget``: cells over all kept sequences."""
        self._engine, self._budget = engine, budget
        self._kept: list[Kept] = []

    def give(self, sequence: int, tokens: list[int], owner: object = "") -> None:
        """Take over a sequence whose session ended and that begins with ``tokens``; it is freed if that is not worth keeping."""
        if isinstance(self._engine, PrunesCells):
            self._engine.watch(sequence, 0)
        left = cut(self._engine, sequence, len(tokens)) if WORTH <= len(tokens) <= self._budget else 0
        if left < WORTH:
            self._engine.free_sequence(sequence)
            return
        self._kept.append(Kept(sequence, tokens[:left], owner))
        while sum(len(kept.tokens) for kept in self._kept) > self._budget:
            self._engine.free_sequence(self._kept.pop(0).sequence)

    def take(self, tokens: Sequence[int], owner: object = "") -> tuple[int, int] | None:
        """An owner's sequence that starts like ``tokens`` as (sequence, cells in common), now the caller's; None if none is worth it.

        A kept sequence that would lose more cells than it shares is copied, so that others can still start from it.
        """
        mine = [kept for kept in self._kept if kept.owner == owner]
        if not mine:
            return None
        best = max(mine, key=lambda kept: common_prefix(kept.tokens, tokens))
        shared = common_prefix(best.tokens, tokens)
        if shared < WORTH:
            return None
        self._kept.remove(best)
        if len(best.tokens) - shared > shared:
            self._kept.append(best)
            with suppress(ContextError):  # of models that cannot go back
                return self._engine.fork_sequence(best.sequence, shared), shared
            return None
        return best.sequence, cut(self._engine, best.sequence, shared)

    @property
    def sequences(self) -> list[int]:
        """Those that are kept, least recently used first."""
        return [kept.sequence for kept in self._kept]

    def drop(self) -> bool:
        """Free the least recently used; whether there was one."""
        if not self._kept:
            return False
        self._engine.free_sequence(self._kept.pop(0).sequence)
        return True

    def clear(self) -> bool:
        """Free everything kept; whether there was anything."""
        found = bool(self._kept)
        for kept in self._kept:
            self._engine.free_sequence(kept.sequence)
        self._kept.clear()
        return found
