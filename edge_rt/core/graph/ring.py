"""The last queries of a watched sequence: what pruning asks the cached keys with.

Every step of a watched sequence writes its rotated queries here, one ``set_rows`` a layer; the graphs of others do not change at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_rt.core.graph.hyper import Hyper
from edge_rt.native import ggml

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class QueryRing:
    """Queries of the last ``window`` cells: per layer float32 [D*H, window]. Cell c has column (c + offset) modulo window.

    So nothing is counted step by step. Only what moves cells must be told: queries before the place are forgotten, because of them
    the heads might no longer agree which cells they may see.
    """

    def __init__(self, hyper: Hyper, window: int, length: int) -> None:
        """An empty ring for a sequence of ``length`` cells. Raises OutOfMemory."""
        self._shape = (window, hyper.n_head, hyper.head_dim)
        self._ctx = ggml.context(hyper.n_layer)
        width = hyper.n_head * hyper.head_dim
        self.tensors = tuple(int(ggml.c.new_tensor_2d(self._ctx.address, ggml.TYPE_F32, width, window)) for _ in range(hyper.n_layer))
        self._buffer = ggml.allocate_context(self._ctx)
        self.nbytes = int(ggml.c.backend_buffer_get_size(self._buffer.address))
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
        asked: npt.NDArray[np.float32] = ggml.view(self.tensors[layer], "f4", self._shape)[columns]
        return asked

    def close(self) -> None:
        """Free the memory. Graphs that write here must not run any more."""
        self._buffer.close()
        self._ctx.close()
