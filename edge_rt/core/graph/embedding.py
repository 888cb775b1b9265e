"""Rows of the token embedding, of any element type, as float32: libggml converts them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_rt.core.graph.once import computed
from edge_rt.native import ggml
from edge_rt.native.rows import elements

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

c = ggml.c


def token_embeddings(embedding: int, tokens: Sequence[int], backend: ggml.Handle) -> npt.NDArray[np.float32]:
    """Float32 [len(tokens), E] of the tensor [E, V]; only the pages of these rows are read."""
    width, n = int(ggml.fields(embedding).ne[0]), len(tokens)
    with ggml.context(1) as inputs, ggml.allocator() as arena:
        ids = c.new_tensor_1d(inputs.address, ggml.TYPE_I32, n)
        with ggml.allocate_context(inputs):
            elements(ids, "i", n)[:] = array("i", tokens)
            rows: npt.NDArray[np.float32] = computed(lambda ctx: int(c.get_rows(ctx, embedding, ids)), (n, width), backend, arena).copy()
            return rows
