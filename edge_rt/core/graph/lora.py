"""What adapters add to the products of a step: the base product is made for all tokens, scale * B (A x) for each adapter's own columns
(columns.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.graph.columns import Columns
from edge_rt.core.load.adapter import EMBEDDING
from edge_rt.errors import UnsupportedModel
from edge_rt.native import ggml

if TYPE_CHECKING:
    from edge_rt.core.graph.common import Builder, SlotShape
    from edge_rt.core.load.adapter import LoraFile
    from edge_rt.core.load.adapter_weights import AdapterWeights, Factors

c = ggml.c
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


class Applied(NamedTuple):
    """An adapter as a sequence has it: ``scale`` times."""

    weights: AdapterWeights
    scale: float


def widest(adapters: Iterable[AdapterWeights]) -> list[Applied]:
    """Of the adapters that change the same weights the largest: what steps take depends on no more than that."""
    found: dict[frozenset[str], AdapterWeights] = {}
    for weights in adapters:
        names = frozenset(pair.base for pair in weights.lora.pairs)
        found[names] = max(weights, found.get(names, weights), key=lambda one: one.size)
    return [Applied(weights, 0.5) for weights in found.values()]


class Run(NamedTuple):
    """Columns of a step that one adapter changes."""

    applied: Applied
    columns: Columns


def runs(shapes: Sequence[SlotShape], counts: Sequence[int]) -> list[Run]:
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


def add_terms(b: Builder, runs: Sequence[Run], y: int, x: int, names: Sequence[str]) -> int:
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


def add_embeddings(b: Builder, runs: Sequence[Run], y: int) -> int:
    """y [E, T], rows of the token embedding, with what adapters add."""
    for run in runs:
        if factors := run.applied.weights.get(EMBEDDING):
            first, n, _ = run.columns
            ids = c.view_2d(b.ctx, b.inputs.tokens, n, 1, 4 * n, 4 * first)
            found = c.get_rows(b.ctx, factors.a, ids)  # [rank, n]
            y = _added(b, y, run, factors, run.columns._replace(first=0).of(b, found), 0)
    return y


def _added(b: Builder, y: int, run: Run, factors: Factors, low: int, row: int) -> int:
    """Add scale * B low to the run's columns of y, from a row on; in llama.cpp's order, so that the same bits come out."""
    change = c.mul_mat(b.ctx, factors.b, low)
    scale = run.applied.weights.lora.scale(factors.pair, run.applied.scale)
    if scale != 1.0:
        change = c.scale(b.ctx, change, scale)
    return run.columns.added(b, y, change, row)
