"""What LoRA adapters and error compensation add to the products of a step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.gguf.lora import EMBEDDING
from edge_rt.core.weights.lora import AppliedLora
from edge_rt.errors import UnsupportedModel
from edge_rt.native import ggml

if TYPE_CHECKING:
    from edge_rt.core.gguf.lora import LoraFile
    from edge_rt.core.graph.builder import GraphBuilder, SlotShape
    from edge_rt.core.weights.error_correction import Inner, Outer
    from edge_rt.core.weights.lora import AdapterWeights, Factors

# Columns of a step that go through small products beside the large ones: those of adapters and of compensation.
#
# A few tokens of a sequence go through them one by one (each as a matrix of its own, which ggml's kernels take as one column), as they do
# through attention: what a request gets then depends neither on drafts nor on who else is in the step. Many, of a prompt, go through
# together, as all do in llama.cpp.

c = ggml.c


class Columns(NamedTuple):
    """Columns [first, first + n) of a step; ``each``: one by one."""

    first: int
    n: int
    each: bool

    def of(self, b: GraphBuilder, x: int) -> int:
        """These columns of x [in, T]: [in, n], or one by one [in, 1, n]."""
        fields = ggml.fields(x)
        width, column = fields.ne[0], fields.nb[1]
        if self.n == fields.ne[1] == 1:
            return x
        if self.each:
            return int(c.view_3d(b.ctx, x, width, 1, self.n, column, column, self.first * column))
        return int(c.view_2d(b.ctx, x, width, self.n, column, self.first * column))

    def added(self, b: GraphBuilder, y: int, change: int, row: int) -> int:
        """Add a change [rows, n] or [rows, 1, n] to these columns of y, from a row on, in place: y is not to be used any more."""
        column = ggml.fields(y).nb[1]
        return int(c.acc_inplace(b.ctx, y, change, column, column, column, self.first * column + 4 * row))


def counts(shapes: Sequence[SlotShape], x: int) -> list[int]:
    """How many columns of x each sequence has: all its tokens, or behind ``wanted_rows`` those that get logits."""
    whole = ggml.fields(x).ne[1] == sum(shape.tokens for shape in shapes)
    return [shape.tokens if whole else shape.rows for shape in shapes]


def column_runs(shapes: Sequence[SlotShape], counts: Sequence[int]) -> list[Columns]:
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


# What adapters add to the products of a step: the base product is made for all tokens, scale * B (A x) for each adapter's own columns
# (columns.py).

NODES_PER_PRODUCT = 6
"""View, A, B, scale, addition, and one to spare."""
PRODUCTS_PER_LAYER = 7


_CHANGED = r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.weight|output\.weight|token_embd\.weight"
"""Weights whose products our graphs let adapters change."""


def check_adapted(adapter: LoraFile) -> None:
    """Raise UnsupportedModel for an adapter of which a part would have no effect."""
    strange = next((pair.base for pair in adapter.pairs if not re.fullmatch(_CHANGED, pair.base)), None)
    if strange:
        raise UnsupportedModel(f"no graph here lets an adapter change {strange}; run it with --engine llama_cpp")


def widest(adapters: Iterable[AdapterWeights]) -> list[AppliedLora]:
    """Of the adapters that change the same weights the largest: what steps take depends on no more than that."""
    found: dict[frozenset[str], AdapterWeights] = {}
    for weights in adapters:
        names = frozenset(pair.base for pair in weights.lora.pairs)
        found[names] = max(weights, found.get(names, weights), key=lambda one: one.size)
    return [AppliedLora(weights, 0.5) for weights in found.values()]


class Run(NamedTuple):
    """Columns of a step that one adapter changes."""

    applied: AppliedLora
    columns: Columns


def adapter_runs(shapes: Sequence[SlotShape], counts: Sequence[int]) -> list[Run]:
    """The runs of a step in which sequence i has ``counts[i]`` columns. Neighbours that go one by one are one run."""
    found: list[Run] = []
    first = 0
    for shape, n in zip(shapes, counts, strict=True):
        if shape.adapter is not None and n:
            own, last = Columns(first, n, not shape.together), found[-1] if found else None
            if last and own.each and last.applied == shape.adapter and last.columns.each and sum(last.columns[:2]) == first:
                found[-1] = last._replace(columns=last.columns._replace(n=last.columns.n + n))
            else:
                found.append(Run(shape.adapter, own))
        first += n
    return found


def add_lora_terms(b: GraphBuilder, runs: Sequence[Run], y: int, x: int, names: Sequence[str]) -> int:
    """y [sum of widths, T], the products of x [in, T] and the weights of these names one below the other, with what adapters add.

    In place: y is not to be used any more, but what is returned.
    """
    row = 0
    for name in names:
        for run in runs:
            if factors := run.applied.weights.get(name, far=b.segments[-1].far):
                y = _added(b, y, run, factors, c.mul_mat(b.ctx, factors.a, run.columns.of(b, x)), row)
        row += int(ggml.fields(b.weights.require(name)).ne[1])
    return y


def add_embeddings(b: GraphBuilder, runs: Sequence[Run], y: int) -> int:
    """y [E, T], rows of the token embedding, with what adapters add."""
    for run in runs:
        if factors := run.applied.weights.get(EMBEDDING):
            first, n, _ = run.columns
            ids = c.view_2d(b.ctx, b.inputs.tokens, n, 1, 4 * n, 4 * first)
            found = c.get_rows(b.ctx, factors.a, ids)  # [rank, n]
            y = _added(b, y, run, factors, run.columns._replace(first=0).of(b, found), 0)
    return y


def _added(b: GraphBuilder, y: int, run: Run, factors: Factors, low: int, row: int) -> int:
    """Add scale * B low to the run's columns of y, from a row on; in llama.cpp's order, so that the same bits come out."""
    change = c.mul_mat(b.ctx, factors.b, low)
    scale = run.applied.weights.lora.scale(factors.pair, run.applied.scale)
    if scale != 1.0:
        change = c.scale(b.ctx, change, scale)
    return run.columns.added(b, y, change, row)


# What a compensation (core/weights/error_correction.py) adds to the products of a step, in as few operations as it takes.


def nodes(b_nodes: int, shapes: Sequence[SlotShape]) -> int:
    """Tensors that it adds to a block at most, of ``b_nodes`` for each run of columns."""
    return b_nodes * len(column_runs(shapes, [shape.tokens for shape in shapes]))


def add_compensation_terms(b: GraphBuilder, counts: Sequence[int], y: int, x: int, names: tuple[str, ...]) -> int:
    """y [sum of widths, T], the products of x [in, T] and the weights of these names one below the other, with low-rank terms and rows of
    tables. In place: y is not to be used any more, but what is returned.
    """
    found = b.weights.corrections.get(names) if b.weights.corrections else None
    if found is None or not found.inners:
        return y
    for run in column_runs(b.shapes, counts):
        own = run.of(b, x)
        for inner in found.inners:
            y = _corrected(b, y, own, run, inner)
    return y


def add_bias(b: GraphBuilder, y: int, names: tuple[str, ...]) -> int:
    """y with the biases of a compensation: behind all else, as the model's own come."""
    found = b.weights.corrections.get(names) if b.weights.corrections else None
    return int(c.add(b.ctx, y, found.bias)) if found and found.bias else y


def _corrected(b: GraphBuilder, y: int, x: int, run: Columns, inner: Inner) -> int:
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


def _outer(b: GraphBuilder, found: int, outer: Outer, run: Columns) -> int:
    """B times its rows of the inner product [height, n] or [height, 1, n]."""
    if not outer.turned:
        return int(c.mul_mat(b.ctx, outer.b, _rows(b, found, outer.first, outer.rank, run)))
    column = ggml.fields(found).nb[2 if run.each else 1]
    return int(c.out_prod(b.ctx, outer.b, c.transpose(b.ctx, c.view_2d(b.ctx, found, outer.rank, run.n, column, 4 * outer.first))))


def _rows(b: GraphBuilder, x: int, first: int, count: int, run: Columns) -> int:
    """Some rows of x, contiguous."""
    fields = ggml.fields(x)
    if count == fields.ne[0]:
        return x
    if run.each:
        part = c.view_3d(b.ctx, x, count, 1, run.n, fields.nb[1], fields.nb[2], 4 * first)
    else:
        part = c.view_2d(b.ctx, x, count, run.n, fields.nb[1], 4 * first)
    return int(part if run.n == 1 else c.cont(b.ctx, part))
