"""Graphs that are built, run once and thrown away: rows of the embedding, rotation of cached keys, attention scores for pruning."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from edge_rt.core.graph.config import ModelConfig
from edge_rt.core.kv.cache import KVCache
from edge_rt.errors import ContextError
from edge_rt.native import ggml
from edge_rt.native.ggml import elements

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.core.kv.positions import Move

# A graph that is built, run and thrown away: for what is asked once, not at every step.

c = ggml.c
_NODES = 16


def run_graph_once(
    build: Callable[[int], int], shape: tuple[int, ...], backend: ggml.Handle, arena: ggml.Handle
) -> npt.NDArray[np.float32]:
    """The float32 result of the graph that ``build`` makes in a context, in NumPy's order of dimensions.

    It is in the arena: valid until that is used again or closed. Inputs must have been set.
    """
    with ggml.context(_NODES, (_NODES,)) as work:
        result = build(work.address)
        c.set_output(result)
        graph = c.new_graph_custom(work.address, _NODES, False)
        c.build_forward_expand(graph, result)
        c.gallocr_alloc_graph(arena.address, graph)
        ggml.compute(backend, graph)
        return ggml.view(result, "f4", shape)


# Rows of the token embedding, of any element type, as float32: libggml converts them.


def token_embeddings(embedding: int, tokens: Sequence[int], backend: ggml.Handle) -> npt.NDArray[np.float32]:
    """Float32 [len(tokens), E] of the tensor [E, V]; only the pages of these rows are read."""
    width, n = int(ggml.fields(embedding).ne[0]), len(tokens)
    with ggml.context(1) as inputs, ggml.allocator() as arena:
        ids = c.new_tensor_1d(inputs.address, ggml.TYPE_I32, n)
        with ggml.allocate_context(inputs):
            elements(ids, "i", n)[:] = array("i", tokens)
            rows: npt.NDArray[np.float32] = run_graph_once(
                lambda ctx: int(c.get_rows(ctx, embedding, ids)), (n, width), backend, arena
            ).copy()
            return rows


# Rotate cached keys to other positions: rotations add up, so moving a key by d positions is one more rotation by d.
#
# As llama.cpp's K-shift. Keys go through float32 and are rounded to the cache's type again: each move costs a rounding.


def rotate_keys(cache: KVCache, config: ModelConfig, mode: int, factors: int | None, moves: Sequence[Move], backend: ggml.Handle) -> None:
    """Rotate the keys of cells [start, end) by ``shifts`` positions, for each (start, end, shifts), in every layer and head."""
    import numpy as np

    moves = [move for move in moves if move[0] < move[1] and move[2].any()]
    if not moves:
        return
    heads = config.n_head_kv
    nodes = 8 * len(moves) * heads
    each = [np.broadcast_to(shifts, (config.n_layer, heads, end - start)) for start, end, shifts in moves]
    with ggml.context(len(moves) * heads) as inputs, ggml.allocator() as arena:
        tensors = [[c.new_tensor_1d(inputs.address, ggml.TYPE_I32, end - start) for _ in range(heads)] for start, end, _ in moves]
        with ggml.allocate_context(inputs):
            for layer in range(config.n_layer):
                with ggml.context(nodes, (nodes,)) as work, cache.layer(layer, write=True) as (keys, _):
                    graph = c.new_graph_custom(work.address, nodes, False)
                    for by_head, shifts, (start, end, _) in zip(tensors, each, moves, strict=True):
                        for head, tensor in enumerate(by_head):
                            ggml.view(tensor, "i4", (end - start,))[:] = shifts[layer, head]
                            c.build_forward_expand(graph, _rotated(work, keys, config, mode, factors, head, start, end, tensor))
                    c.gallocr_alloc_graph(arena.address, graph)
                    ggml.compute(backend, graph)


def _rotated(
    work: ggml.Handle, keys: int, config: ModelConfig, mode: int, factors: int | None, head: int, start: int, end: int, shifts: int
) -> int:
    """Keys [D, end - start] of one head, rotated in place."""
    ctx, size, n = work.address, config.head_dim, end - start
    nb = ggml.fields(keys).nb
    place = c.view_2d(ctx, keys, size, n, nb[1], head * nb[2] + start * nb[1])
    plain = c.cpy(ctx, place, c.new_tensor_2d(ctx, ggml.TYPE_F32, size, n))
    r = config.rope
    # YaRN scales what it rotates, which the key was when it was made.
    unscaled = 1 / (1 + 0.1 * math.log(1 / r.scale)) if r.ext_factor else 1.0
    rotated = c.rope_ext(
        ctx, c.reshape_3d(ctx, plain, size, 1, n), shifts, factors, r.dims, mode, r.original_context,
        r.base, r.scale, r.ext_factor, unscaled, r.beta_fast, r.beta_slow,
    )  # fmt: skip
    return int(c.cpy(ctx, c.reshape_2d(ctx, rotated, size, n), place))


# What pruning asks of a cache: how much its last queries attend to each cell, how long the values are, the keys themselves.
#
# On ggml's kernels and threads: the same products through NumPy's BLAS would start threads that get into the way of the next steps.

ENOUGH = 16
"""Queries that are asked with at most, evenly spread over those that are to be: what a pass takes grows with them.

Spread over the last 64 tokens they tell as much as all 64 (``UNASKED`` of core/kv/pruning.py).
"""


class CachedLayer:
    """One layer of a cache, N cells of G heads. Every array is valid until the next is asked for, of this layer or another."""

    def __init__(self, cache: KVCache, config: ModelConfig, number: int, tensors: tuple[int, int], shared: _Shared) -> None:
        """``tensors``: its keys and values in the host's memory."""
        self.number, self.n_heads, self.n_cells = number, config.n_head_kv, cache.length
        self._cache, self._config, self._tensors, self._shared = cache, config, tensors, shared

    def attention(self) -> npt.NDArray[np.float32]:
        """softmax(q k * scale) of the last queries, at most ENOUGH of them, each over the cells it may see: [G, queries of the group, N].

        Raises ContextError if the sequence was not watched when its last tokens were fed.
        """
        h, ring, n, shared = self._config, self._cache.ring, self.n_cells, self._shared
        if not len(shared.asked) or ring is None:
            raise ContextError("no query was kept to prune by; watch the sequence before its last tokens are fed")
        group = h.n_head // h.n_head_kv
        chosen = ring.queries(self.number, n)[shared.asked - n]
        asked = chosen.reshape(len(chosen), h.n_head_kv, group, h.head_dim).transpose(1, 2, 0, 3)
        ggml.view(shared.queries, "f4", asked.shape)[:] = asked

        def attention(ctx: int) -> int:
            scores = c.mul_mat(ctx, self._keys(ctx), shared.queries)  # [N, group * asked, G]
            return int(c.soft_max_ext(ctx, scores, shared.mask, h.attention_scale, 0.0))

        return shared.computed(attention, (h.n_head_kv, group * len(chosen), n))

    def value_norms(self) -> npt.NDArray[np.float32]:
        """Euclidean lengths of the values: [G, N]."""
        import numpy as np

        values = self._floats(self._values)
        norms: npt.NDArray[np.float32] = np.sqrt(np.einsum("gnd,gnd->gn", values, values))
        return norms

    def keys(self) -> npt.NDArray[np.float32]:
        """The keys, rotated: [G, N, D]."""
        return self._floats(self._keys)

    def _floats(self, cells: Callable[[int], int]) -> npt.NDArray[np.float32]:
        """Keys or values in single precision: as rows, because that is the conversion ggml does fastest (NumPy takes ten times as long)."""
        shape = (self.n_heads, self.n_cells, self._config.head_dim)
        return self._shared.computed(lambda ctx: int(c.get_rows(ctx, cells(ctx), self._shared.rows)), shape)

    def _keys(self, ctx: int) -> int:
        """[D, N, G]."""
        keys = self._tensors[0]
        nb = ggml.fields(keys).nb
        return int(c.view_3d(ctx, keys, self._config.head_dim, self.n_cells, self.n_heads, nb[1], nb[2], 0))

    def _values(self, ctx: int) -> int:
        """[D, N, G]."""
        values, size, n = self._tensors[1], self._config.head_dim, self.n_cells
        nb = ggml.fields(values).nb
        if self._cache.view.transposed:
            return int(c.cont(ctx, c.transpose(ctx, c.view_3d(ctx, values, n, size, self.n_heads, nb[1], nb[2], 0))))
        return int(c.view_3d(ctx, values, size, n, self.n_heads, nb[1], nb[2], 0))


class _Shared:
    """What the layers of one pass share: inputs and the memory that results are in.

    ``asked``: the cells of the queries, rising. ``queries`` [D, group * asked, G] are set layer by layer; ``mask`` [N, group * asked]:
    which cells each may see; ``rows`` [N, G]: all.
    """

    def __init__(self, cache: KVCache, config: ModelConfig, backend: ggml.Handle, queries: int | None) -> None:
        import numpy as np

        n, heads, group = cache.length, config.n_head_kv, config.n_head // config.n_head_kv
        held = max(0, cache.ring.held(n)) if cache.ring else 0
        last = held if queries is None else min(held, queries)
        self.asked = np.linspace(n - last, n - 1, min(last, ENOUGH)).round().astype(np.intp)
        self._backend, self._arena, self._ctx = backend, ggml.allocator(), ggml.context(3)
        ctx, columns = self._ctx.address, max(1, group * len(self.asked))
        self.queries = ggml.new_tensor(ctx, ggml.TYPE_F32, (config.head_dim, columns, heads))
        self.mask = c.new_tensor_2d(ctx, ggml.TYPE_F32, n, columns)
        self.rows = c.new_tensor_2d(ctx, ggml.TYPE_I32, n, heads)
        self._buffer = ggml.allocate_context(self._ctx)
        ggml.view(self.rows, "i4", (heads, n))[:] = np.arange(n)
        visible = np.where(np.arange(n) <= self.asked[:, None], 0.0, -np.inf)
        ggml.view(self.mask, "f4", (columns, n))[: group * len(self.asked)] = np.tile(visible, (group, 1))

    def computed(self, build: Callable[[int], int], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """The result of a graph, built in the context that is given; NumPy's order of dimensions."""
        return run_graph_once(build, shape, self._backend, self._arena)

    def close(self) -> None:
        """Free the memory."""
        self._arena.close()
        self._buffer.close()
        self._ctx.close()


def cached_layers(cache: KVCache, config: ModelConfig, backend: ggml.Handle, queries: int | None = None) -> Iterator[CachedLayer]:
    """The layers of a cache, one after the other. They ask with the last ``queries`` that were kept, None: with all; see ENOUGH."""
    with closing(_Shared(cache, config, backend, queries)) as shared:
        for number in range(config.n_layer):
            with cache.layer(number) as tensors:
                yield CachedLayer(cache, config, number, tensors, shared)
