"""The second part of a product with weights that lie as Q4_0 and offsets; what they are is told in core/load/centred.py."""

from __future__ import annotations

from edge_rt.core.load.centred import BLOCK
from edge_rt.native import ggml

c = ggml.c
NODES = 8
"""Tensors that it adds to a graph at most."""


def sums(ctx: int, x: int, width: int) -> int:
    """Sums of 32 neighbours each in x [in, T]: [width, max(T, 2)], filled up with zeros.

    Of two columns at least: one alone would be multiplied by another kernel, which adds up in another order, and is slower where rows
    are short.
    """
    fields = ggml.fields(x)
    blocks, columns = int(fields.ne[0]) // BLOCK, int(fields.ne[1])
    if fields.nb[1] != 4 * fields.ne[0]:
        x = c.cont(ctx, x)
    found = c.sum_rows(ctx, c.reshape_2d(ctx, x, BLOCK, blocks * columns))
    found = c.reshape_2d(ctx, found, blocks, columns)
    if width == blocks and columns > 1:
        return int(found)
    return int(c.pad(ctx, found, width - blocks, max(0, 2 - columns), 0, 0))


def product(ctx: int, offsets: int, x: int) -> int:
    """Offsets [width, out] times the sums of x [in, T]: [out, T]."""
    width, rows = (int(n) for n in ggml.fields(offsets).ne[:2])
    found = c.mul_mat(ctx, offsets, sums(ctx, x, width))
    return int(found if ggml.fields(x).ne[1] > 1 else c.view_2d(ctx, found, rows, 1, 4 * rows, 0))
