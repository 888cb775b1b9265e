"""What pruning asks of a cache: how much its last queries attend to each cell, how long the values are, the keys themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from edge_rt.hooks import ContextError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt_mlu.cells import Cells

ENOUGH = 16
"""Queries that are asked with at most, evenly spread over those that are to be, as edge-rt's own engine does (graph/scores.py)."""


class CachedLayer:
    """One layer of a cache, N cells of G heads; what ``choose_cells`` asks."""

    def __init__(self, cells: Cells, number: int, asked: npt.NDArray[np.intp]) -> None:
        """``asked``: the cells whose queries ask, rising."""
        self.number, self.n_heads, self.n_cells = number, cells.shape.heads, cells.length
        self._cells, self._asked = cells, asked

    def attention(self) -> npt.NDArray[np.float32]:
        """softmax(q k) of the asked queries, each over the cells it may see: [G, queries of the group, N].

        Raises ContextError if the sequence was not watched when its last tokens were fed.
        """
        ring, n, asked = self._cells.ring, self.n_cells, self._asked
        if ring is None or not len(asked):
            raise ContextError("no query was kept to prune by; watch the sequence before its last tokens are fed")
        device = self._cells.shape.device
        queries = ring.layers[self.number][torch.from_numpy(asked - (n - ring.held)).to(device)]  # [A, H, D]
        queries = queries.view(len(asked), self.n_heads, -1, queries.shape[-1]).transpose(0, 1)  # [G, A, H/G, D]
        scores = queries.flatten(1, 2) @ self._floats(0).transpose(1, 2)
        hidden = torch.arange(n, device=device) > torch.from_numpy(asked).to(device)[:, None]
        group = queries.shape[2]
        found = scores.masked_fill(hidden.repeat_interleave(group, 0), -torch.inf).softmax(-1)
        return _array(found)

    def value_norms(self) -> npt.NDArray[np.float32]:
        """Euclidean lengths of the values: [G, N]."""
        return _array(self._floats(1).norm(dim=-1))

    def keys(self) -> npt.NDArray[np.float32]:
        """The keys, rotated: [G, N, D]."""
        return _array(self._floats(0))

    def _floats(self, which: int) -> torch.Tensor:
        """Keys (0) or values (1) in single precision [G, N, D]."""
        return self._cells.layers[self.number][which, :, : self.n_cells].float()


def _array(found: torch.Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = found.cpu().numpy()
    return array


def cached_layers(cells: Cells, queries: int | None = None) -> Iterator[CachedLayer]:
    """The layers of a cache, one after the other. They ask with the last ``queries`` that were kept, None: with all; see ENOUGH."""
    held, n = cells.ring.held if cells.ring else 0, cells.length
    last = held if queries is None else min(held, queries)
    asked = np.linspace(n - last, n - 1, min(last, ENOUGH)).round().astype(np.intp)
    for number in range(cells.shape.layers):
        yield CachedLayer(cells, number, asked)
