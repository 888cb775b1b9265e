"""What pruning asks of a cache: how much its last queries attend to each cell, how long the values are, the keys themselves.

On ggml's kernels and threads: the same products through NumPy's BLAS would start threads that get into the way of the next steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edge_rt.core.context.kv import KvCache
from edge_rt.core.graph.hyper import Hyper
from edge_rt.errors import ContextError
from edge_rt.native import ggml

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

c = ggml.c


class CachedLayer:
    """One layer of a cache, N cells of G heads. Every array is valid until the next is asked for."""

    def __init__(self, cache: KvCache, hyper: Hyper, number: int, backend: ggml.Handle, arena: ggml.Handle) -> None:
        self.number, self.n_heads, self.n_cells = number, hyper.n_head_kv, cache.length
        self._cache, self._hyper, self._backend, self._arena = cache, hyper, backend, arena

    def attention(self) -> npt.NDArray[np.float32]:
        """softmax(q k * scale) of the last queries, each over the cells it may see: [G, queries of the head's group, N].

        Raises ContextError if the sequence was not watched when its last tokens were fed.
        """
        import numpy as np

        h, ring, n = self._hyper, self._cache.ring, self.n_cells
        held = ring.held(n) if ring else 0
        if ring is None or held <= 0:
            raise ContextError("no query was kept to prune by; watch the sequence before its last tokens are fed")
        group = h.n_head // h.n_head_kv
        asked = ring.queries(self.number, n).reshape(held, h.n_head_kv, group, h.head_dim).transpose(1, 2, 0, 3)
        with ggml.context(2) as inputs:
            q = ggml.new_tensor(inputs.address, ggml.TYPE_F32, (h.head_dim, group * held, h.n_head_kv))
            mask = c.new_tensor_2d(inputs.address, ggml.TYPE_F32, n, group * held)
            with ggml.allocate_context(inputs):
                ggml.view(q, "f4", asked.shape)[:] = asked
                seen = ggml.view(mask, "f4", (group, held, n))
                seen[:] = np.where(np.arange(n) < np.arange(n - held + 1, n + 1)[:, None], 0.0, -np.inf)

                def attention(ctx: int) -> int:
                    scores = c.mul_mat(ctx, self._keys(ctx), q)  # [N, group * held, G]
                    return int(c.soft_max_ext(ctx, scores, mask, h.attention_scale, 0.0))

                return self._computed(attention, (h.n_head_kv, group * held, n))

    def value_norms(self) -> npt.NDArray[np.float32]:
        """Euclidean lengths of the values: [G, N]."""
        import numpy as np

        def squares(ctx: int) -> int:
            values = self._float(ctx, self._values(ctx))
            return int(c.sum_rows(ctx, c.mul(ctx, values, values)))

        norms: npt.NDArray[np.float32] = np.sqrt(self._computed(squares, (self.n_heads, self.n_cells)))
        return norms

    def keys(self) -> npt.NDArray[np.float32]:
        """The keys, rotated: [G, N, D]."""
        shape = (self.n_heads, self.n_cells, self._hyper.head_dim)
        return self._computed(lambda ctx: self._float(ctx, self._keys(ctx)), shape)

    def _keys(self, ctx: int) -> int:
        """[D, N, G]."""
        keys = self._cache.view.keys[self.number]
        nb = ggml.fields(keys).nb
        return int(c.view_3d(ctx, keys, self._hyper.head_dim, self.n_cells, self.n_heads, nb[1], nb[2], 0))

    def _values(self, ctx: int) -> int:
        """[D, N, G]."""
        values, size, n = self._cache.view.values[self.number], self._hyper.head_dim, self.n_cells
        nb = ggml.fields(values).nb
        if self._cache.view.transposed:
            return int(c.cont(ctx, c.transpose(ctx, c.view_3d(ctx, values, n, size, self.n_heads, nb[1], nb[2], 0))))
        return int(c.view_3d(ctx, values, size, n, self.n_heads, nb[1], nb[2], 0))

    def _float(self, ctx: int, x: int) -> int:
        """x [D, N, G] in single precision."""
        shape = (self._hyper.head_dim, self.n_cells, self.n_heads)
        return int(c.cpy(ctx, x, ggml.new_tensor(ctx, ggml.TYPE_F32, shape)))

    def _computed(self, build: Callable[[int], int], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        with ggml.context(16, (16,)) as work:
            result = build(work.address)
            c.set_output(result)
            graph = c.new_graph_custom(work.address, 16, False)
            c.build_forward_expand(graph, result)
            c.gallocr_alloc_graph(self._arena.address, graph)
            ggml.compute(self._backend, graph)
            return ggml.view(result, "f4", shape)


def cached_layers(cache: KvCache, hyper: Hyper, backend: ggml.Handle) -> Iterator[CachedLayer]:
    """The layers of a cache, one after the other."""
    with ggml.allocator() as arena:
        for number in range(hyper.n_layer):
            yield CachedLayer(cache, hyper, number, backend, arena)
