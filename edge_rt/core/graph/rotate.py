"""Rotate cached keys to other positions: rotations add up, so moving a key by d positions is one more rotation by d.

As llama.cpp's K-shift. Keys go through float32 and are rounded to the cache's type again: each move costs a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_rt.core.graph.hyper import Hyper
from edge_rt.native import ggml

if TYPE_CHECKING:
    from edge_rt.core.context.kv import KvCache
    from edge_rt.core.context.placed_cells import Move

c = ggml.c


def rotate_keys(cache: KvCache, hyper: Hyper, mode: int, factors: int | None, moves: Sequence[Move], backend: ggml.Handle) -> None:
    """Rotate the keys of cells [start, end) by ``shifts`` positions, for each (start, end, shifts), in every layer and head."""
    import numpy as np

    moves = [move for move in moves if move[0] < move[1] and move[2].any()]
    if not moves:
        return
    heads = hyper.n_head_kv
    nodes = 8 * len(moves) * heads
    each = [np.broadcast_to(shifts, (hyper.n_layer, heads, end - start)) for start, end, shifts in moves]
    with ggml.context(len(moves) * heads) as inputs, ggml.allocator() as arena:
        tensors = [[c.new_tensor_1d(inputs.address, ggml.TYPE_I32, end - start) for _ in range(heads)] for start, end, _ in moves]
        with ggml.allocate_context(inputs):
            for layer in range(hyper.n_layer):
                with ggml.context(nodes, (nodes,)) as work, cache.layer(layer, write=True) as (keys, _):
                    graph = c.new_graph_custom(work.address, nodes, False)
                    for by_head, shifts, (start, end, _) in zip(tensors, each, moves, strict=True):
                        for head, tensor in enumerate(by_head):
                            ggml.view(tensor, "i4", (end - start,))[:] = shifts[layer, head]
                            c.build_forward_expand(graph, _rotated(work, keys, hyper, mode, factors, head, start, end, tensor))
                    c.gallocr_alloc_graph(arena.address, graph)
                    ggml.compute(backend, graph)


def _rotated(
    work: ggml.Handle, keys: int, hyper: Hyper, mode: int, factors: int | None, head: int, start: int, end: int, shifts: int
) -> int:
    """Keys [D, end - start] of one head, rotated in place."""
    ctx, size, n = work.address, hyper.head_dim, end - start
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
