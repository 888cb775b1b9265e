"""The last queries of a watched sequence: what pruning asks the cached keys with.

Every step of a watched sequence writes its rotated queries here, one ``set_rows`` a layer; the graphs of others do not change at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_rt.core.graph.hyper import Hyper
from edge_rt.native import devices, ggml

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.core.load.offloaded import Offloaded


class QueryRing:
    """Queries of the last ``window`` cells: per layer float32 [D*H, window]. Cell c has column (c + offset) modulo window.

    So nothing is counted step by step. Only what moves cells must be told: queries before the place are forgotten, because of them
    the heads might no longer agree which cells they may see.
    """

    def __init__(self, hyper: Hyper, window: int, length: int, offloaded: Offloaded | None = None) -> None:
        """An empty ring for a sequence of ``length`` cells, where its cells are. Raises OutOfMemory."""
        self._shape = (window, hyper.n_head, hyper.head_dim)
        self._offloaded, self._near = offloaded, offloaded.first if offloaded else hyper.n_layer
        width = hyper.n_head * hyper.head_dim
        counts = [n for n in (self._near, hyper.n_layer - self._near) if n]
        self._contexts = [ggml.context(n) for n in counts]
        self.tensors = tuple(
            int(ggml.c.new_tensor_2d(ctx.address, ggml.TYPE_F32, width, window))
            for ctx, n in zip(self._contexts, counts, strict=True)
            for _ in range(n)
        )
        self._here = ggml.allocate_context(self._contexts[0]) if self._near else None
        far = self._near < hyper.n_layer
        self._there = offloaded.allocate_context(self._contexts[-1]) if offloaded and far else None
        held = (buffer for buffer in (self._here, self._there) if buffer)
        self.nbytes = sum(int(ggml.c.backend_buffer_get_size(buffer.address)) for buffer in held)
        self.window = window
        self._since = length  # the first cell whose query is held
        self._offset = 0

    def column(self, cell: int) -> int:
        """Where the query of a cell goes."""
        return (cell + self._offset) % self.window

    def held(self, length: int) -> int:
        """How many of the last of ``length`` cells have their queries here."""
        return min(self.window, length - self._since)

    def truncate(self, before: int, after: int) -> None:
        """A sequence of ``before`` cells keeps the first ``after``. Columns that were written over do not come back."""
        self._since = min(max(self._since, before - self.window), after)

    def move(self, length: int, first: int, by: int) -> None:
        """Of ``length`` cells those from ``first`` on move ``by`` cells up; the queries of those before are forgotten."""
        self._since = max(self._since, length - self.window, first) + by
        self._offset -= by

    def queries(self, layer: int, length: int) -> npt.NDArray[np.float32]:
        """Queries of the last cells of ``length``, oldest first: float32 [held, H, D], a copy."""
        held = self.held(length)
        columns = [self.column(cell) for cell in range(length - held, length)]
        asked: npt.NDArray[np.float32]
        if layer < self._near:
            asked = ggml.view(self.tensors[layer], "f4", self._shape)[columns]
            return asked
        with devices.copied([self.tensors[layer]]) as (copy,):
            asked = ggml.view(copy, "f4", self._shape)[columns]
            return asked

    def close(self) -> None:
        """Free the memory. Graphs that write here must not run any more."""
        if self._here:
            self._here.close()
        if self._there and self._offloaded:
            self._offloaded.give(self._there)
            self._there = None
        for ctx in self._contexts:
            ctx.close()
