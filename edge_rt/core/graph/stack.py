"""Sequences that decode one token each, as one: their caches lie at equal distances, so that one operation serves them all.

Each still goes over its own cells with the kernels, and so to the bits, that it would go with alone. But products of many small matrices
are one operation of ggml's, whose threads meet after each: a layer of eight sequences takes 17 operations instead of 59, and threads
divide the heads of all among them, not those of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_rt.core.graph.attention import flash, matmuls
from edge_rt.native import ggml

if TYPE_CHECKING:
    from edge_rt.core.graph.common import Builder, KvView, SlotInputs, SlotShape

c = ggml.c
SPLIT_FROM = 512
"""Cells from which on ggml's flash attention divides those of one query among threads, and adds up in another order than for several."""


def runs(shapes: Sequence[SlotShape], caches: Sequence[KvView]) -> list[tuple[int, int]]:
    """First and last of each run of sequences that can be one stack; a sequence that goes alone is a run of its own."""
    found: list[tuple[int, int]] = []
    for i, (shape, cache) in enumerate(zip(shapes, caches, strict=True)):
        if found and _fits(shape, cache):
            first, last = found[-1]
            apart = cache.address - caches[last].address
            before = apart if first == last else caches[last].address - caches[last - 1].address
            equal = (cache.capacity, shape.adapter) == (caches[last].capacity, shapes[last].adapter)
            if _fits(shapes[last], caches[last]) and equal and apart == before > 0:
                found[-1] = (first, i)
                continue
        found.append((i, i))
    return found


def _fits(shape: SlotShape, cache: KvView) -> bool:
    """Whether a sequence has one token, and comes to the same bits in a stack."""
    exact = cache.transposed or cache.key_type != ggml.TYPE_F16 or shape.cells < SPLIT_FROM
    return shape.tokens == shape.rows == 1 and not cache.window and not cache.offloaded and exact


def joined(caches: Sequence[KvView]) -> KvView:
    """Caches of one capacity at equal distances as one."""
    first, second = caches[:2]
    return first._replace(apart=second.address - first.address, members=tuple(map(id, caches)))


def span(stack: KvView) -> tuple[int, int]:
    """Address and size of the memory that a stack's tensors are in."""
    return stack.address, stack.apart * (len(stack.members) - 1) + stack.size


def store(b: Builder, layer: int, k: int, v: int, first: int, shape: SlotShape, slot: SlotInputs, stack: KvView) -> None:
    """Write keys and values [D, G, T], of columns from ``first`` on, each into its own cache."""
    head, kv, n = b.hyper.head_dim, b.hyper.kv_width, shape.sequences
    for x, tensors, indices in (
        (k, stack.keys, slot.cells),
        (v, stack.values, slot.elements if stack.transposed else slot.cells),
    ):
        nb = ggml.fields(x).nb
        elements = stack.transposed and x == v
        width, rows, row = (1, kv, 4) if elements else (head, b.hyper.n_head_kv, nb[1])
        own = c.view_3d(b.ctx, x, width, rows, n, row, nb[2], nb[2] * first)
        b.expand(c.set_rows(b.ctx, _over(b, tensors[layer], (width, rows * stack.capacity, n), stack), own, indices))


def attend(b: Builder, layer: int, q: int, first: int, shape: SlotShape, slot: SlotInputs, stack: KvView) -> int:
    """Attention of queries [D, H, T], of columns from ``first`` on, each over its own cells; returns [H*D, S]."""
    h, n = b.hyper, shape.sequences
    nb = ggml.fields(q).nb
    own = c.view_4d(b.ctx, q, h.head_dim, h.n_head, 1, n, nb[1], nb[2], nb[2], nb[2] * first)  # [D, H, 1, S]
    by_cell = (h.head_dim, shape.cells, h.n_head_kv, n)
    k = _over(b, stack.keys[layer], by_cell, stack)
    v = _over(b, stack.values[layer], (shape.cells, h.head_dim, h.n_head_kv, n) if stack.transposed else by_cell, stack)
    return matmuls(b, own, k, v, slot.mask) if stack.transposed else flash(b, own, k, v, slot.mask, n)


def _over(b: Builder, tensor: int, shape: tuple[int, ...], stack: KvView) -> int:
    """A tensor like that of the first cache, its last dimension the sequences. No view: those stay within what they are of."""
    own = ggml.fields(tensor)
    found = ggml.new_tensor(b.ctx, own.type, shape)
    fields = ggml.fields(found)
    if len(shape) == 4:
        fields.nb[1], fields.nb[2] = own.nb[1], own.nb[2]
    fields.nb[len(shape) - 1] = stack.apart
    for dimension in range(len(shape), 4):
        fields.nb[dimension] = stack.apart * shape[-1]
    ggml.place(found, b.buffers[stack.members], ggml.data_address(tensor))
    return found
