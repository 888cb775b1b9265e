"""Attention of one sequence's queries over its cells: flash attention, or products with keys and with transposed values.

Notation as in common.py; t tokens of a sequence, S sequences of a stack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edge_rt.native import ggml

if TYPE_CHECKING:
    from edge_rt.core.graph.common import Builder, KvView, SlotInputs, SlotShape

c = ggml.c
FLASH_FROM = 9
"""Tokens of one sequence from which they go through attention together. Fewer go one by one if all are to have logits, as drafts are."""
TILES_FROM = 64
"""Tokens from which ggml's flash attention takes many queries at once. Up to there it goes query by query, which is as slow for each as
it is when decoding: 63 tokens behind 1,500 cells took ten times as long as 64 (135M, one thread, AVX-512).
"""


class Traits(NamedTuple):
    """What attention may ask of all devices that a step runs on. ``flash``: flash attention over heads of this size; ``each``: with
    another mask for every head, by which several tokens go one by one.
    """

    flash: bool = True
    each: bool = True


ALL = Traits()


def wants_flash(shape: SlotShape, cache: KvView) -> bool:
    """Flash attention and its half-precision mask, or matmuls over transposed values and a float32 mask."""
    return not cache.transposed or (shape.sequences == 1 and shape.tokens >= TILES_FROM and shape.traits.flash)


def attend(b: Builder, layer: int, q: int, shape: SlotShape, slot: SlotInputs, cache: KvView) -> int:
    """Attention of one sequence's queries [D, H, t] over its cells; returns [H*D, t]."""
    h, ctx = b.hyper, b.ctx
    key = c.row_size(cache.key_type, h.head_dim)
    k = c.view_3d(ctx, cache.keys[layer], h.head_dim, shape.cells, h.n_head_kv, key, key * cache.capacity, 0)  # [D, N, G]
    v = _values(b, layer, shape, cache)
    if shape.together and not wants_flash(shape, cache):
        return matmuls(b, q, k, v, slot.mask)
    if shape.together:
        rows = c.cont(ctx, c.transpose(ctx, v)) if cache.transposed else v  # [D, N, G]
        return flash(b, q, k, rows, slot.mask, shape.tokens)
    # Each token as if alone: a product over several queries may add up in another order, and drafts must not change a bit.
    if not cache.transposed:
        return flash(b, q, k, v, slot.mask, 1) if shape.tokens == 1 else _flash_each(b, q, k, v, slot.mask, shape)
    columns, row = [], 4 * shape.cells
    for i in range(shape.tokens):
        mask = c.view_2d(ctx, slot.mask, shape.cells, 1, row, row * i)
        columns.append(matmuls(b, b.queries(q, i, 1), k, v, mask))
    return b.side_by_side(columns)


def _values(b: Builder, layer: int, shape: SlotShape, cache: KvView) -> int:
    """Cached values by head: [D, N, G], or [N, D, G] where they are transposed."""
    h = b.hyper
    if cache.transposed:
        row = 2 * cache.capacity
        return int(c.view_3d(b.ctx, cache.values[layer], shape.cells, h.head_dim, h.n_head_kv, row, row * h.head_dim, 0))
    row = 2 * h.head_dim
    return int(c.view_3d(b.ctx, cache.values[layer], h.head_dim, shape.cells, h.n_head_kv, row, row * cache.capacity, 0))


def flash(b: Builder, q: int, k: int, v: int, mask: int, columns: int) -> int:
    """Flash attention of queries [D, H, t, S] over keys and values [D, N, G, S], t or S 1; returns [H*D, columns]."""
    h, ctx = b.hyper, b.ctx
    out = c.flash_attn_ext(ctx, c.permute(ctx, q, 0, 2, 1, 3), k, v, mask, h.attention_scale, 0.0, 0.0)  # [D, H, t, S]
    c.prec_set_acc(out, ggml.PRECISION_F32)
    return int(c.reshape_2d(ctx, out, h.n_head * h.head_dim, columns))


def _flash_each(b: Builder, q: int, k: int, v: int, mask: int, shape: SlotShape) -> int:
    """The same for several tokens, each exactly as if alone: the tokens of a group's heads count as so many heads of one token."""
    h, ctx, n = b.hyper, b.ctx, shape.tokens
    group, nb = h.n_head // h.n_head_kv, ggml.fields(q).nb
    size = 4 * h.head_dim
    by_token = c.view_4d(ctx, q, h.head_dim, group, h.n_head_kv, n, size, size * group, nb[2], 0)
    by_group = c.cont(ctx, c.permute(ctx, by_token, 0, 1, 3, 2))  # [D, group, tokens, G]
    heads = c.reshape_3d(ctx, by_group, h.head_dim, 1, h.n_head * n)
    out = c.flash_attn_ext(ctx, heads, k, v, _mask_each(b, mask, group, shape), h.attention_scale, 0.0, 0.0)
    c.prec_set_acc(out, ggml.PRECISION_F32)
    by_group = c.view_4d(ctx, out, h.head_dim, group, n, h.n_head_kv, size, size * group, size * group * n, 0)
    by_token = c.cont(ctx, c.permute(ctx, by_group, 0, 1, 3, 2))
    return int(c.reshape_2d(ctx, by_token, h.n_head * h.head_dim, n))


def _mask_each(b: Builder, mask: int, group: int, shape: SlotShape) -> int:
    """A mask [N, t] as [N, 1, t * group], each row as often as a group has heads; made once for all layers."""
    found = b.masks.get(mask)
    if found is None:
        rows = c.reshape_3d(b.ctx, mask, shape.cells, 1, shape.tokens)
        repeated = c.repeat_4d(b.ctx, rows, shape.cells, group, shape.tokens, 1)
        found = b.masks[mask] = int(c.reshape_3d(b.ctx, repeated, shape.cells, 1, group * shape.tokens))
    return found


def matmuls(b: Builder, q: int, k: int, v: int, mask: int) -> int:
    """Attention of queries [D, H, t, S] over keys [D, N, G, S] and transposed values [N, D, G, S], t or S 1; returns [H*D, t*S].

    Several queries of the heads that share a key go through one product with it: 5 % faster for eight behind 1,900 cells, 15 % for four.
    """
    h, ctx = b.hyper, b.ctx
    tokens, sequences = ggml.fields(q).ne[2:4]
    q = c.permute(ctx, q, 0, 2, 1, 3)  # [D, t, H, S]
    if tokens == 1:
        weights = c.soft_max_ext(ctx, _scores(b, k, q), mask, h.attention_scale, 0.0)  # [N, 1, H, S]
        return int(c.reshape_2d(ctx, c.mul_mat(ctx, v, weights), h.n_head * h.head_dim, sequences))
    shared, cells = tokens * (h.n_head // h.n_head_kv), ggml.fields(k).ne[1]
    scores = _scores(b, k, c.reshape_3d(ctx, c.cont(ctx, q), h.head_dim, shared, h.n_head_kv))
    weights = c.soft_max_ext(ctx, c.reshape_3d(ctx, scores, cells, tokens, h.n_head), mask, h.attention_scale, 0.0)
    out = c.mul_mat(ctx, v, c.reshape_3d(ctx, weights, cells, shared, h.n_head_kv))
    by_token = c.permute(ctx, c.reshape_3d(ctx, out, h.head_dim, tokens, h.n_head), 0, 2, 1, 3)
    return int(c.cont_2d(ctx, by_token, h.n_head * h.head_dim, tokens))


def _scores(b: Builder, k: int, q: int) -> int:
    """Products of keys [D, N, ...] and queries [D, ...], added up in single precision wherever they are computed."""
    scores = int(c.mul_mat(b.ctx, k, q))
    c.prec_set_acc(scores, ggml.PRECISION_F32)
    return scores
