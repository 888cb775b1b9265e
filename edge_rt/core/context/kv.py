"""One sequence's key-value cache: memory that follows what is kept.

Each head's cells lie together, so that attention, which goes head by head, reads straight on (a seventh faster over 4,096 cells
than with the heads of a cell together). Keys are [D, capacity, G] per layer, F16 or Q8_0; values the same or transposed
([capacity, D, G]), in F16: which of the two decodes faster depends on the CPU (graph/layout.py). A head is ``capacity`` long, so that
memory follows use only if capacity does: it grows in steps by moving. Cells given up at the end of a head are given back to the system.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edge_rt.core.context.positions import Positions
from edge_rt.core.graph.common import KvView
from edge_rt.core.graph.hyper import Hyper
from edge_rt.errors import SessionFileError
from edge_rt.native import ggml, memory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

STEP = 256
"""Cells: attention runs over multiples of this (as in llama.cpp), and capacities are multiples of it."""


def padded(cells: int) -> int:
    """Cells rounded up to a whole step, at least one."""
    return max(STEP, -(-cells // STEP) * STEP)


def next_capacity(current: int, needed: int, limit: int) -> int:
    """Grow by a quarter, at least one step: the waste stays under a quarter and copying stays linear in the end."""
    return min(padded(limit), max(padded(needed), padded(current + current // 4) if current else 0))


def cell_bytes(hyper: Hyper, key_type: int) -> int:
    """Bytes one cell takes over all layers."""
    return int(hyper.n_layer * (ggml.c.row_size(key_type, hyper.kv_width) + 2 * hyper.kv_width))


class KvCache:
    """Cells of one sequence; ``positions`` says which are in use and where their tokens stand. A cache shares memory with no other."""

    def __init__(self, hyper: Hyper, key_type: int, capacity: int, *, transposed: bool = False) -> None:
        """Reserve room for ``capacity`` cells. Raises OutOfMemory. Untouched cells cost no memory and read as zero."""
        self._hyper, self._key_type = hyper, key_type
        self.capacity, self.positions = capacity, Positions()
        self._touched = 0  # cells that hold memory
        key_row = ggml.c.row_size(key_type, hyper.kv_width)
        key_size, value_size = capacity * key_row, capacity * 2 * hyper.kv_width
        size = -(-hyper.n_layer * (key_size + value_size) // memory.PAGE) * memory.PAGE
        base = memory.map_anonymous(size)
        self._release = weakref.finalize(self, memory.unmap, base, size)
        self._buffer = ggml.buffer_from_address(base, size)
        self._ctx = ggml.context(2 * hyper.n_layer)
        keys: list[int] = []
        values: list[int] = []
        address = base
        by_cell = (hyper.head_dim, capacity, hyper.n_head_kv)
        for _ in range(hyper.n_layer):
            for tensors, type_, shape, size in (
                (keys, key_type, by_cell, key_size),
                (values, ggml.TYPE_F16, (capacity, hyper.head_dim, hyper.n_head_kv) if transposed else by_cell, value_size),
            ):
                tensor = ggml.new_tensor(self._ctx.address, type_, shape)
                ggml.place(tensor, self._buffer.address, address)
                tensors.append(tensor)
                address += size
        self.view = KvView(tuple(keys), tuple(values), capacity, key_type, transposed)

    def key_cells(self, layer: int) -> npt.NDArray[np.uint8]:
        """Keys of a layer as bytes [capacity, G, bytes of a head]; a view."""
        heads, row = self._hyper.n_head_kv, ggml.c.row_size(self._key_type, self._hyper.head_dim)
        by_cell: npt.NDArray[np.uint8] = ggml.view(self.view.keys[layer], "u1", (heads, self.capacity, row)).transpose(1, 0, 2)
        return by_cell

    def value_cells(self, layer: int) -> npt.NDArray[np.uint16]:
        """Values of a layer as half-precision bits [capacity, G, D] in either layout; a view."""
        heads, size = self._hyper.n_head_kv, self._hyper.head_dim
        shape, axes = ((heads, size, self.capacity), (2, 0, 1)) if self.view.transposed else ((heads, self.capacity, size), (1, 0, 2))
        by_cell: npt.NDArray[np.uint16] = ggml.view(self.view.values[layer], "u2", shape).transpose(axes)
        return by_cell

    @property
    def length(self) -> int:
        """Cells in use."""
        return self.positions.length

    @property
    def nbytes(self) -> int:
        """Bytes of the cells that hold memory, to within a page for each head."""
        self._touched = max(self._touched, self.length)
        return self._touched * cell_bytes(self._hyper, self._key_type)

    def copy(self, length: int, capacity: int) -> KvCache:
        """A new cache of ``capacity`` cells that starts with the first ``length`` of this one. Raises OutOfMemory."""
        fresh = KvCache(self._hyper, self._key_type, capacity, transposed=self.view.transposed)
        for layer in range(self._hyper.n_layer if length else 0):
            fresh.key_cells(layer)[:length] = self.key_cells(layer)[:length]
            fresh.value_cells(layer)[:length] = self.value_cells(layer)[:length]
        fresh.positions = self.positions.copy(length)
        return fresh

    def truncate(self, length: int) -> None:
        """Forget the cells from ``length`` on. They are masked until overwritten."""
        self._touched = max(self._touched, self.length)
        self.positions.truncate(length)

    def remove(self, spans: Sequence[tuple[int, int]]) -> int:
        """Forget cells [start, end) of each span (rising, apart); later ones move down. Returns the bytes given back to the system."""
        before = self.length
        self.positions.remove(spans)
        for cells in self._all_cells() if self.length < before else ():
            to = spans[0][0]
            for (_, start), (end, _) in zip(spans, [*spans[1:], (before, before)], strict=True):
                cells[to : to + end - start] = cells[start:end]
                to += end - start
        return self.give_back()

    def give_back(self) -> int:
        """Give the memory of cells not in use back to the system; returns bytes. Only whole pages of a head can go."""
        self._touched, before = self.length, max(self._touched, self.length)
        if before == self.length:
            return 0
        given = 0
        for tensor in (*self.view.keys, *self.view.values):
            address, (_, _, n_head, _) = ggml.data_address(tensor), ggml.fields(tensor).ne
            if self.view.transposed and tensor in self.view.values:
                n_head, row = self._hyper.kv_width, 2
            else:
                row = ggml.fields(tensor).nb[1]
            for head in range(n_head):
                first = address + head * self.capacity * row
                start, size = memory.inner_page_span(first + self.length * row, (before - self.length) * row)
                if size and memory.advise(start, size, "dontneed"):
                    given += size
        return given

    def insert(self, at: int, positions: Positions, data: memoryview) -> None:
        """Put exported cells, which the capacity must have room for, before cell ``at``. Raises SessionFileError, ContextError."""
        import numpy as np

        n, end = positions.length, self.length
        if len(data) != n * cell_bytes(self._hyper, self._key_type):
            raise SessionFileError("the saved cells have the wrong size for this model; start a new session")
        self.positions.insert(at, list(positions))
        start = 0
        for cells in self._all_cells():
            cells[at + n : end + n] = cells[at:end]
            target = cells[at : at + n]
            chunk = np.frombuffer(data[start : start + target.nbytes], dtype=target.dtype)
            target[...] = chunk.reshape(target.shape)
            start += target.nbytes

    def export(self, start: int, end: int) -> bytes:
        """Cells [start, end) as bytes: per layer the keys, then the values, by cell in either layout."""
        return b"".join(cells[start:end].tobytes() for cells in self._all_cells())

    def _all_cells(self) -> Iterator[npt.NDArray[Any]]:
        """Keys and values of every layer, cell by cell."""
        for layer in range(self._hyper.n_layer):
            yield self.key_cells(layer)
            yield self.value_cells(layer)

    def close(self) -> None:
        """Give the memory back. Graphs over this cache must not run any more."""
        self._buffer.close()
        self._ctx.close()
        self._release()
