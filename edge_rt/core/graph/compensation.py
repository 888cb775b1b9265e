"""What a compensation (core/load/compensation.py) adds to the products of a step, in as few operations as it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_rt.core.graph import columns
from edge_rt.native import ggml

if TYPE_CHECKING:
    from edge_rt.core.graph.columns import Columns
    from edge_rt.core.graph.common import Builder, SlotShape
    from edge_rt.core.load.corrections import Inner, Outer

c = ggml.c


def nodes(b_nodes: int, shapes: Sequence[SlotShape]) -> int:
    """Tensors that it adds to a block at most, of ``b_nodes`` for each run of columns."""
    return b_nodes * len(columns.runs(shapes, [shape.tokens for shape in shapes]))


def add_terms(b: Builder, counts: Sequence[int], y: int, x: int, names: tuple[str, ...]) -> int:
    """y [sum of widths, T], the products of x [in, T] and the weights of these names one below the other, with low-rank terms and rows of
    tables. In place: y is not to be used any more, but what is returned.
    """
    found = b.weights.corrections.get(names) if b.weights.corrections else None
    if found is None or not found.inners:
        return y
    for run in columns.runs(b.shapes, counts):
        own = run.of(b, x)
        for inner in found.inners:
            y = _corrected(b, y, own, run, inner)
    return y


def add_bias(b: Builder, y: int, names: tuple[str, ...]) -> int:
    """y with the biases of a compensation: behind all else, as the model's own come."""
    found = b.weights.corrections.get(names) if b.weights.corrections else None
    return int(c.add(b.ctx, y, found.bias)) if found and found.bias else y


def _corrected(b: Builder, y: int, x: int, run: Columns, inner: Inner) -> int:
    """y with what follows from the inner product with the run's columns x [in, n] or [in, 1, n]."""
    found = int(c.mul_mat(b.ctx, inner.a, x))  # [height, n] or [height, 1, n]
    if inner.offsets:
        found = int(c.add(b.ctx, found, inner.offsets))
    for outer in inner.outers:
        y = run.added(b, y, _outer(b, found, outer, run), outer.row)
    for lookup in inner.lookups:
        scores = _rows(b, found, lookup.first, lookup.n, run)
        if run.each and run.n > 1:  # the largest is looked for in the columns of a matrix
            scores = int(c.reshape_2d(b.ctx, scores, lookup.n, run.n))
        y = run.added(b, y, int(c.get_rows(b.ctx, lookup.rows, c.argmax(b.ctx, scores))), lookup.row)
    return y


def _outer(b: Builder, found: int, outer: Outer, run: Columns) -> int:
    """B times its rows of the inner product [height, n] or [height, 1, n]."""
    if not outer.turned:
        return int(c.mul_mat(b.ctx, outer.b, _rows(b, found, outer.first, outer.rank, run)))
    column = ggml.fields(found).nb[2 if run.each else 1]
    return int(c.out_prod(b.ctx, outer.b, c.transpose(b.ctx, c.view_2d(b.ctx, found, outer.rank, run.n, column, 4 * outer.first))))


def _rows(b: Builder, x: int, first: int, count: int, run: Columns) -> int:
    """Some rows of x, contiguous."""
    fields = ggml.fields(x)
    if count == fields.ne[0]:
        return x
    if run.each:
        part = c.view_3d(b.ctx, x, count, 1, run.n, fields.nb[1], fields.nb[2], 4 * first)
    else:
        part = c.view_2d(b.ctx, x, count, run.n, fields.nb[1], 4 * first)
    return int(part if run.n == 1 else c.cont(b.ctx, part))
