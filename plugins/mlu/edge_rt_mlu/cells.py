"""One sequence's key-value cache on the device: memory that follows what is kept.

A layer is one tensor [2, G, capacity, D]: keys, then values, each head's cells side by side. Where the tokens in the cells stand, of pruned
caches head by head, is the base class's affair, as for edge-rt's own cache (edge_rt/core/kv/cache.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from edge_rt.hooks import PlacedCells, SessionFileError, next_capacity, unmoved_cells

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt.hooks import Positions
    from edge_rt_mlu.lora import Applied
    from edge_rt_mlu.rope import Rope

    Move = tuple[int, int, npt.NDArray[np.int32]]


class Shape(NamedTuple):
    """What all caches of a model have in common. ``queries``: heads of queries."""

    layers: int
    heads: int
    size: int
    queries: int
    dtype: torch.dtype
    device: torch.device

    @property
    def cell_bytes(self) -> int:
        """Bytes of one cell over all layers."""
        return self.layers * 2 * self.heads * self.size * int(self.dtype.itemsize)


class Ring:
    """The queries of the last ``window`` cells at most: per layer float32 [held, H, D], oldest first, scaled for attention."""

    def __init__(self, shape: Shape, window: int) -> None:
        self.window = window
        self.layers = [torch.empty((0, shape.queries, shape.size), device=shape.device) for _ in range(shape.layers)]

    @property
    def held(self) -> int:
        """How many of the last cells have their queries here."""
        return min(len(layer) for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return sum(layer.nbytes for layer in self.layers)

    def keep(self, layer: int, queries: torch.Tensor) -> None:
        """Queries [t, H, D] of cells that were just filled."""
        old = self.layers[layer]
        self.layers[layer] = torch.cat((old, queries.float()))[-self.window :].clone()

    def drop(self, cells: int) -> None:
        """The last cells are forgotten."""
        self.layers = [layer[: max(0, len(layer) - cells)] for layer in self.layers]

    def only(self, cells: int) -> None:
        """Of no more than the last ``cells`` the queries still tell what they see: those before a place where cells moved are forgotten."""
        self.layers = [layer[len(layer) - min(len(layer), max(0, cells)) :] for layer in self.layers]


class Cells(PlacedCells):
    """Cells of one sequence, and the memory that holds them. ``applied``: the adapter that all of its tokens go through."""

    def __init__(self, shape: Shape, capacity: int = 0) -> None:
        super().__init__(shape.layers, shape.heads)
        self.shape = shape
        self.ring: Ring | None = None
        self.applied: Applied | None = None
        self.layers = [self._empty(capacity) for _ in range(shape.layers)]

    def _empty(self, capacity: int) -> torch.Tensor:
        s = self.shape
        return torch.empty((2, s.heads, capacity, s.size), dtype=s.dtype, device=s.device)

    @property
    def capacity(self) -> int:
        """Cells there is memory for."""
        return int(self.layers[0].shape[2])

    @property
    def beside(self) -> int:
        """Bytes of what is noted beside the cells."""
        return (0 if self.mixed is None else self.mixed.nbytes) + (0 if self.ring is None else self.ring.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.capacity * self.shape.cell_bytes + self.beside

    def put(self, layer: int, at: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys and values [t, G, D] of tokens that go into cells from ``at`` on."""
        end = at + len(keys)
        self.layers[layer][0, :, at:end] = keys.transpose(0, 1)
        self.layers[layer][1, :, at:end] = values.transpose(0, 1)

    def resize(self, capacity: int) -> None:
        """Move to memory for so many cells, layer by layer, so that never both are held."""
        n = min(self.length, capacity)
        for number, old in enumerate(self.layers):
            fresh = self._empty(capacity)
            fresh[:, :, :n] = old[:, :, :n]
            self.layers[number] = fresh

    def copy(self, length: int, capacity: int) -> Cells:
        """The first ``length`` cells in memory of their own, not watched. Raises ContextError in the middle of mixed cells."""
        self.check_apart(length)
        fresh = Cells(self.shape, capacity)
        for old, new in zip(self.layers, fresh.layers, strict=True):
            new[:, :, :length] = old[:, :, :length]
        fresh.place_like(self, length)
        fresh.applied = self.applied
        return fresh

    def truncate(self, length: int) -> None:
        """Forget the cells from ``length`` on. Raises ContextError in the middle of mixed cells."""
        before = self.length
        self.cut(length)
        if self.ring:
            self.ring.drop(before - self.length)

    def remove(self, spans: Sequence[tuple[int, int]], limit: int) -> int:
        """Forget cells [start, end) of each span (rising, apart); returns the bytes given back.

        Raises ContextError for mixed cells, ValueError for spans that are none.
        """
        before, held = self.length, self.nbytes
        self.take_out(spans)
        if self.length == before:
            return 0
        if self.ring:
            self.ring.only(before - spans[-1][1])
        kept = np.ones(before, bool)
        for start, end in spans:
            kept[start:end] = False
        self._gather(torch.from_numpy(kept.nonzero()[0]), next_capacity(0, self.length + 1, limit))
        return max(0, held - self.nbytes)

    def _gather(self, kept: torch.Tensor, capacity: int) -> None:
        """Cells ``kept``, the same of every head [n] or of each [L, G, n], move to the front of memory for ``capacity`` cells."""
        kept, n = kept.to(self.shape.device), kept.shape[-1]
        for number, old in enumerate(self.layers):
            fresh = self._empty(capacity)
            if kept.dim() == 1:
                fresh[:, :, :n] = old.index_select(2, kept)
            else:
                index = kept[number][None, :, :, None].expand(2, -1, -1, self.shape.size)
                fresh[:, :, :n] = old.gather(2, index)
            self.layers[number] = fresh

    def prune(self, kept: npt.NDArray[np.intp], capacity: int) -> None:
        """Keep cells ``kept`` [L, G, n] (rising), in memory for ``capacity``."""
        before = self.length
        self._gather(torch.from_numpy(kept.astype(np.int64)), capacity)
        self.place_kept(self, kept)
        if self.ring:
            self.ring.only(unmoved_cells(kept, before))

    def renumber(self) -> list[Move]:
        """Close the gaps: cell i gets position i. Returns how keys are to turn."""
        moves = self.close_gaps()
        if self.ring:  # its queries were rotated for where the keys were
            self.ring.only(0)
        return moves

    def rotate(self, moves: Sequence[Move], rope: Rope) -> None:
        """Turn the keys of cells [start, end) by ``shifts`` positions, for each (start, end, shifts). Each move costs a rounding."""
        s = self.shape
        for start, end, shifts in moves:
            if start >= end or not shifts.any():
                continue
            each = np.broadcast_to(shifts, (s.layers, s.heads, end - start))
            for number, layer in enumerate(self.layers):
                layer[0, :, start:end] = rope.turn(layer[0, :, start:end], rope.by(each[number])).to(s.dtype)

    def insert(self, at: int, positions: Positions, data: memoryview) -> list[Move]:
        """Put exported cells, which there must be room for, before cell ``at``; returns how keys are to turn where positions had to move.

        Raises SessionFileError, ContextError.
        """
        n, end, s = positions.length, self.length, self.shape
        if len(data) != n * s.cell_bytes:
            raise SessionFileError("the saved cells have the wrong size for this model; start a new session")
        moves = self.put_in(at, positions)
        if self.ring:
            self.ring.only(end - at)
        size = len(data) // s.layers
        for number, layer in enumerate(self.layers):
            layer[:, :, at + n : end + n] = layer[:, :, at:end].clone()
            bits = np.frombuffer(data[number * size : (number + 1) * size], np.int16).reshape(2, s.heads, n, s.size)
            layer[:, :, at : at + n] = torch.from_numpy(bits.copy()).view(s.dtype).to(s.device)
        return moves

    def export(self, start: int, end: int) -> Iterator[bytes]:
        """Cells [start, end) as bytes: per layer the keys, then the values, head by head."""
        for layer in self.layers:
            yield layer[:, :, start:end].contiguous().cpu().view(torch.int16).numpy().tobytes()
