"""Columns of a step that go through small products beside the large ones: those of adapters and of compensation.

A few tokens of a sequence go through them one by one (each as a matrix of its own, which ggml's kernels take as one column), as they do
through attention: what a request gets then depends neither on drafts nor on who else is in the step. Many, of a prompt, go through
together, as all do in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.native import ggml

if TYPE_CHECKING:
    from edge_rt.core.graph.common import Builder, SlotShape

c = ggml.c


class Columns(NamedTuple):
    """Columns [first, first + n) of a step; ``each``: one by one."""

    first: int
    n: int
    each: bool

    def of(self, b: Builder, x: int) -> int:
        """These columns of x [in, T]: [in, n], or one by one [in, 1, n]."""
        fields = ggml.fields(x)
        width, column = fields.ne[0], fields.nb[1]
        if self.n == fields.ne[1] == 1:
            return x
        if self.each:
            return int(c.view_3d(b.ctx, x, width, 1, self.n, column, column, self.first * column))
        return int(c.view_2d(b.ctx, x, width, self.n, column, self.first * column))

    def added(self, b: Builder, y: int, change: int, row: int) -> int:
        """Add a change [rows, n] or [rows, 1, n] to these columns of y, from a row on, in place: y is not to be used any more."""
        column = ggml.fields(y).nb[1]
        return int(c.acc_inplace(b.ctx, y, change, column, column, column, self.first * column + 4 * row))


def counts(shapes: Sequence[SlotShape], x: int) -> list[int]:
    """How many columns of x each sequence has: all its tokens, or behind ``wanted_rows`` those that get logits."""
    whole = ggml.fields(x).ne[1] == sum(shape.tokens for shape in shapes)
    return [shape.tokens if whole else shape.rows for shape in shapes]


def runs(shapes: Sequence[SlotShape], counts: Sequence[int]) -> list[Columns]:
    """All columns of a step in which sequence i has ``counts[i]``. Neighbours that go one by one are one run."""
    found: list[Columns] = []
    first = 0
    for shape, n in zip(shapes, counts, strict=True):
        last = found[-1] if found else None
        if last and last.each and not shape.together:
            found[-1] = last._replace(n=last.n + n)
        elif n:
            found.append(Columns(first, n, not shape.together))
        first += n
    return found
