"""Rotate cached keys to other positions: rotations add up, so moving a key by d positions is one more rotation by d.

As llama.cpp's K-shift. Keys go through float32 and are rounded to the cache's type again: each move costs a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edge_rt.core.graph.common import KvView
from edge_rt.core.graph.hyper import Hyper
from edge_rt.native import ggml
from edge_rt.native.rows import elements

c = ggml.c


def rotate_keys(
    cache: KvView, hyper: Hyper, mode: int, factors: int | None, moves: Sequence[tuple[int, int, int]], backend: ggml.Handle
) -> None:
    """Rotate the keys of cells [start, end) by ``shift`` positions, for each (start, end, shift), in every layer and head."""
    moves = [(start, end, shift) for start, end, shift in moves if shift and start < end]
    if not moves:
        return
    nodes = 8 * len(moves) * hyper.n_head_kv
    with ggml.context(len(moves)) as inputs, ggml.allocator() as arena:
        shifts = [c.new_tensor_1d(inputs.address, ggml.TYPE_I32, end - start) for start, end, _ in moves]
        with ggml.allocate_context(inputs):
            for tensor, (start, end, shift) in zip(shifts, moves, strict=True):
                memory = elements(tensor, "i", end - start)
                for i in range(end - start):
                    memory[i] = shift
            for layer in range(hyper.n_layer):
                with ggml.context(nodes, (nodes,)) as work:
                    graph = c.new_graph_custom(work.address, nodes, False)
                    for tensor, (start, end, _) in zip(shifts, moves, strict=True):
                        for head in range(hyper.n_head_kv):
                            c.build_forward_expand(graph, _rotated(work, cache, hyper, mode, factors, layer, head, start, end, tensor))
                    c.gallocr_alloc_graph(arena.address, graph)
                    ggml.compute(backend, graph)


def _rotated(
    work: ggml.Handle, cache: KvView, hyper: Hyper, mode: int, factors: int | None, layer: int, head: int, start: int, end: int, shifts: int
) -> int:
    """Keys [D, end - start] of one head, rotated in place."""
    ctx, keys, size, n = work.address, cache.keys[layer], hyper.head_dim, end - start
    nb = ggml.fields(keys).nb
    place = c.view_2d(ctx, keys, size, n, nb[1], head * nb[2] + start * nb[1])
    plain = c.cpy(ctx, place, c.new_tensor_2d(ctx, ggml.TYPE_F32, size, n))
    r = hyper.rope
    # YaRN scales what it rotates, which the key was when it was made.
    unscaled = 1 / (1 + 0.1 * math.log(1 / r.scale)) if r.ext_factor else 1.0
    rotated = c.rope_ext(
        ctx, c.reshape_3d(ctx, plain, size, 1, n), shifts, factors, r.dims, mode, r.original_context,
        r.base, r.scale, r.ext_factor, unscaled, r.beta_fast, r.beta_slow,
    )  # fmt: skip
    return int(c.cpy(ctx, c.reshape_2d(ctx, rotated, size, n), place))
