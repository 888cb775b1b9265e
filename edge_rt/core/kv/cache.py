"""One sequence's key-value cache: memory that follows what is kept."""

from __future__ import annotations

import contextlib
import io
import struct
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.core.graph.builder import KVView
from edge_rt.core.graph.config import ModelConfig
from edge_rt.core.kv.positions import PlacedCells, Positions, Run, saved_mixed, unmoved_cells
from edge_rt.errors import SessionFileError
from edge_rt.native import devices, ggml, memory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.core.kv.positions import Move, Positions
    from edge_rt.core.weights.gpu_offload import Offloaded

# The last queries of a watched sequence: what pruning asks the cached keys with.
#
# Every step of a watched sequence writes its rotated queries here, one ``set_rows`` a layer; the graphs of others do not change at all.


class RecentQueries:
    """Queries of the last ``window`` cells: per layer float32 [D*H, window]. Cell c has column (c + offset) modulo window.

    So nothing is counted step by step. Only what moves cells must be told: queries before the place are forgotten, because of them
    the heads might no longer agree which cells they may see.
    """

    def __init__(self, config: ModelConfig, window: int, length: int, offloaded: Offloaded | None = None) -> None:
        """An empty ring for a sequence of ``length`` cells, where its cells are. Raises OutOfMemory."""
        self._shape = (window, config.n_head, config.head_dim)
        self._offloaded, self._near = offloaded, offloaded.first if offloaded else config.n_layer
        width = config.n_head * config.head_dim
        counts = [n for n in (self._near, config.n_layer - self._near) if n]
        self._contexts = [ggml.context(n) for n in counts]
        self.tensors = tuple(
            int(ggml.c.new_tensor_2d(ctx.address, ggml.TYPE_F32, width, window))
            for ctx, n in zip(self._contexts, counts, strict=True)
            for _ in range(n)
        )
        self._here = ggml.allocate_context(self._contexts[0]) if self._near else None
        far = self._near < config.n_layer
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


# One sequence's key-value cache: memory that follows what is kept.
#
# Each head's cells lie together, so that attention, which goes head by head, reads straight on (a seventh faster over 4,096 cells
# than with the heads of a cell together). Keys are [D, capacity, G] per layer, F16 or Q8_0; values the same or transposed
# ([capacity, D, G]), in F16: which of the two decodes faster depends on the CPU (graph/layout.py). A head is ``capacity`` long, so that
# memory follows use only if capacity does: it grows in steps by moving. Cells given up at the end of a head are given back to the system.
#
# Where the tokens in the cells stand, of pruned caches head by head, is the base class's affair (placed_cells.py).
#
# The layers of blocks that are offloaded lie on the device, each in a buffer of its own. What is done to their cells beside steps is done
# in the host's memory, layer by layer, and goes back.


def cell_bytes(config: ModelConfig, key_type: int) -> int:
    """Bytes one cell takes over all layers."""
    return int(config.n_layer * (ggml.c.row_size(key_type, config.kv_width) + 2 * config.kv_width))


class KVCache(PlacedCells):
    """Cells of one sequence, and the memory that holds them. A cache shares memory with no other."""

    def __init__(
        self, config: ModelConfig, key_type: int, capacity: int, *, transposed: bool = False, offloaded: Offloaded | None = None
    ) -> None:
        """Reserve room for ``capacity`` cells. Raises OutOfMemory. Untouched cells read as zero, and cost memory only on a device."""
        super().__init__(config.n_layer, config.n_head_kv)
        self._config, self._key_type, self._offloaded = config, key_type, offloaded
        self._near = offloaded.first if offloaded else config.n_layer  # layers in the host's memory: the first ones
        self._far: dict[int, ggml.Handle] = {}
        self.capacity = capacity
        self.ring: RecentQueries | None = None
        self._touched = 0  # cells that hold memory
        key_row = ggml.c.row_size(key_type, config.kv_width)
        key_size, value_size = capacity * key_row, capacity * 2 * config.kv_width
        size = -(-max(1, self._near) * (key_size + value_size) // memory.PAGE) * memory.PAGE
        base, nbytes = memory.take(size), size
        self._release = weakref.finalize(self, memory.give, base, size)
        self._buffer = ggml.buffer_from_address(base, size)
        self._ctx = ggml.context(2 * config.n_layer)
        keys: list[int] = []
        values: list[int] = []
        address = base
        by_cell = (config.head_dim, capacity, config.n_head_kv)
        self.view = KVView((), (), capacity, key_type, transposed, address=base, size=nbytes, offloaded=self._near < config.n_layer)
        try:
            for layer in range(config.n_layer):
                far = self._beyond(layer, key_size, value_size) if layer >= self._near else None
                for tensors, type_, shape, size in (
                    (keys, key_type, by_cell, key_size),
                    (values, ggml.TYPE_F16, (capacity, config.head_dim, config.n_head_kv) if transposed else by_cell, value_size),
                ):
                    tensor = ggml.new_tensor(self._ctx.address, type_, shape)
                    ggml.place(tensor, *((self._buffer.address, address) if far is None else far[tensors is values]))
                    tensors.append(tensor)
                    address += size
        except BaseException:
            self.close()
            raise
        self.view = self.view._replace(keys=tuple(keys), values=tuple(values))

    def _beyond(self, layer: int, key_size: int, value_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Memory for a layer on the device: buffer and address of its keys, and of its values. Raises OutOfMemory."""
        assert self._offloaded, "only then a layer lies there"
        device = self._offloaded.device
        buffer = self._far[layer] = self._offloaded.buffer(device.aligned(key_size) + device.aligned(value_size))
        base = int(ggml.c.backend_buffer_get_base(buffer.address))
        return (buffer.address, base), (buffer.address, base + device.aligned(key_size))

    @contextlib.contextmanager
    def layer(self, number: int, *, write: bool = False) -> Iterator[tuple[int, int]]:
        """Keys and values of a layer as tensors in the host's memory: of one on the device copies, which go back if ``write``."""
        pair = self.view.keys[number], self.view.values[number]
        if number < self._near:
            yield pair
            return
        with devices.copied(pair, back=write) as (keys, values):
            yield keys, values

    @contextlib.contextmanager
    def cells(self, number: int, *, write: bool = False) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """Keys of a layer as bytes [capacity, G, bytes of a head], values as half-precision bits [capacity, G, D]; views of ``layer``."""
        with self.layer(number, write=write) as (keys, values):
            yield self._key_cells(keys), self._value_cells(values)

    def _key_cells(self, tensor: int) -> npt.NDArray[np.uint8]:
        heads, row = self._config.n_head_kv, ggml.c.row_size(self._key_type, self._config.head_dim)
        by_cell: npt.NDArray[np.uint8] = ggml.view(tensor, "u1", (heads, self.capacity, row)).transpose(1, 0, 2)
        return by_cell

    def _value_cells(self, tensor: int) -> npt.NDArray[np.uint16]:
        heads, size = self._config.n_head_kv, self._config.head_dim
        shape, axes = ((heads, size, self.capacity), (2, 0, 1)) if self.view.transposed else ((heads, self.capacity, size), (1, 0, 2))
        by_cell: npt.NDArray[np.uint16] = ggml.view(tensor, "u2", shape).transpose(axes)
        return by_cell

    @property
    def nbytes(self) -> int:
        """Bytes of the cells that hold memory, to within a page for each head, and of what is noted beside them."""
        self._touched = max(self._touched, self.length)
        layers = self._config.n_layer
        cells = self._touched * self._near + self.capacity * (layers - self._near)  # of one layer
        return cells * cell_bytes(self._config, self._key_type) // layers + self.beside

    @property
    def beside(self) -> int:
        """Bytes of what is noted beside the cells."""
        return (0 if self.mixed is None else self.mixed.nbytes) + (0 if self.ring is None else self.ring.nbytes)

    @property
    def reserved(self) -> int:
        """Bytes that all its cells may come to hold, and what is noted beside them."""
        return self.capacity * cell_bytes(self._config, self._key_type) + memory.PAGE + self.beside

    def watch(self, window: int) -> None:
        """Keep the last ``window`` queries from now on; 0 stops. Graphs over this cache must be dropped. Raises OutOfMemory."""

        ring = RecentQueries(self._config, window, self.length, self._offloaded) if window else None
        if self.ring:
            self.ring.close()
        self._follow(ring)

    def _follow(self, ring: RecentQueries | None) -> None:
        self.ring = ring
        self.view = self.view._replace(queries=ring.tensors if ring else (), window=ring.window if ring else 0)

    def moved(self, capacity: int) -> KVCache:
        """All of this one in a new cache of ``capacity`` cells, its ring included. Raises OutOfMemory.

        This one gives its memory back layer by layer as they move, and must be closed.
        """
        fresh = self._fresh(capacity)
        for layer in self._copy_to(fresh, self.length):
            self._leave(layer)
        fresh.positions, fresh.mixed = self.positions.copy(self.length), self.mixed
        self._hand_ring(fresh)
        return fresh

    def _fresh(self, capacity: int) -> KVCache:
        """An empty cache that is like this one. Raises OutOfMemory."""
        return KVCache(self._config, self._key_type, capacity, transposed=self.view.transposed, offloaded=self._offloaded)

    def _copy_to(self, fresh: KVCache, length: int) -> Iterator[int]:
        """Copy the first cells, layer by layer; gives each when it was."""
        for layer in range(self._config.n_layer if length else 0):
            with self.cells(layer) as here, fresh.cells(layer, write=True) as there:
                for source, target in zip(here, there, strict=True):
                    target[:length] = source[:length]
            yield layer

    def _leave(self, layer: int) -> None:
        """A layer's cells have moved: give their memory back, so that never both caches are held."""
        if layer in self._far and self._offloaded:
            self._offloaded.give(self._far.pop(layer))
            return
        for tensor in (self.view.keys[layer], self.view.values[layer]):
            memory.advise(*memory.inner_page_span(ggml.data_address(tensor), ggml.fields(tensor).nb[3]), "dontneed")

    def _hand_ring(self, fresh: KVCache) -> None:
        fresh._follow(self.ring)
        self.ring = None

    def copy(self, length: int, capacity: int) -> KVCache:
        """A new cache, not watched, of ``capacity`` cells that starts with the first ``length`` of this one.

        Raises OutOfMemory, ContextError in the middle of mixed cells.
        """
        self.check_apart(length)
        fresh = self._fresh(capacity)
        for _ in self._copy_to(fresh, length):
            pass
        fresh.place_like(self, length)
        return fresh

    def truncate(self, length: int) -> None:
        """Forget the cells from ``length`` on. They are masked until overwritten. Raises ContextError in the middle of mixed cells."""
        self._touched, before = max(self._touched, self.length), self.length
        self.cut(length)
        if self.ring:
            self.ring.truncate(before, min(length, before))

    def remove(self, spans: Sequence[tuple[int, int]]) -> int:
        """Forget cells [start, end) of each span (rising, apart); later ones move down. Returns the bytes given back to the system.

        Raises ContextError for mixed cells, ValueError for spans that are none.
        """
        before = self.length
        self.take_out(spans)
        if self.ring and spans:
            self.ring.move(before, spans[-1][1], self.length - before)
        for cells in self._all_cells(write=True) if self.length < before else ():
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
        for tensor in (*self.view.keys[: self._near], *self.view.values[: self._near]):
            address, (_, _, n_head, _) = ggml.data_address(tensor), ggml.fields(tensor).ne
            if self.view.transposed and tensor in self.view.values:
                n_head, row = self._config.kv_width, 2
            else:
                row = ggml.fields(tensor).nb[1]
            for head in range(n_head):
                first = address + head * self.capacity * row
                start, size = memory.inner_page_span(first + self.length * row, (before - self.length) * row)
                if size and memory.advise(start, size, "dontneed"):
                    given += size
        return given

    def prune(self, kept: npt.NDArray[np.intp], capacity: int) -> KVCache:
        """A new cache, watched as this one was, of the cells ``kept`` [L, G, n] (rising). Raises OutOfMemory.

        This one gives its memory back layer by layer as they move, so that the two are never held together, and must be closed.
        """
        import numpy as np

        fresh, n, before = self._fresh(capacity), kept.shape[2], self.length
        for layer in range(self._config.n_layer):
            with self.cells(layer) as here, fresh.cells(layer, write=True) as there:
                for cells, target in zip(here, there, strict=True):
                    for head, chosen in enumerate(kept[layer]):
                        np.take(cells[:, head], chosen, axis=0, out=target[:n, head], mode="clip")  # "clip" writes without a copy between
            self._leave(layer)
        fresh.place_kept(self, kept)
        self._hand_ring(fresh)
        if fresh.ring:
            fresh.ring.move(before, before - unmoved_cells(kept, before), n - before)
        return fresh

    def renumber(self) -> list[Move]:
        """Close the gaps between positions: cell i gets position i. Returns how keys are to turn."""
        moves = self.close_gaps()
        if self.ring:  # its queries were rotated for where the keys were
            self.ring.move(self.length, self.length, 0)
        return moves

    def insert(self, at: int, positions: Positions, data: memoryview) -> list[Move]:
        """Put exported cells, which the capacity must have room for, before cell ``at``. Raises SessionFileError, ContextError.

        Returns how keys are to be rotated where positions had to move.
        """
        import numpy as np

        n, end = positions.length, self.length
        if len(data) != n * cell_bytes(self._config, self._key_type):
            raise SessionFileError("the saved cells have the wrong size for this model; start a new session")
        moves = self.put_in(at, positions)
        if self.ring:
            self.ring.move(end, at, n)
        start = 0
        for cells in self._all_cells(write=True):
            cells[at + n : end + n] = cells[at:end]
            target = cells[at : at + n]
            chunk = np.frombuffer(data[start : start + target.nbytes], dtype=target.dtype)
            target[...] = chunk.reshape(target.shape)
            start += target.nbytes
        return moves

    def export(self, start: int, end: int) -> Iterator[bytes]:
        """Cells [start, end) as bytes: per layer the keys, then the values, by cell in either layout."""
        return (cells[start:end].tobytes() for cells in self._all_cells())

    def _all_cells(self, *, write: bool = False) -> Iterator[npt.NDArray[Any]]:
        """Keys and values of every layer, cell by cell."""
        for layer in range(self._config.n_layer):
            with self.cells(layer, write=write) as both:
                yield from both

    def close(self) -> None:
        """Give the memory back. Graphs over this cache must not run any more."""
        if self.ring:
            self.ring.close()
        for buffer in self._far.values():
            assert self._offloaded, "only then a layer lies there"
            self._offloaded.give(buffer)
        self._far.clear()
        self._buffer.close()
        self._ctx.close()
        self._release()


# Cells as bytes: what a session file keeps of a sequence, and what an evicted segment leaves on disk.

_HEADER = struct.Struct("<4sIIIIIII")  # magic, layers, KV width, key type, cells, runs, next position, mixed cells
_RUN = struct.Struct("<III")
_MAGIC = b"EKV3"


class Cells(NamedTuple):
    """Exported cells: where their tokens stand (``mixed``: head by head, see ``KVCache``), and the keys and values."""

    positions: Positions
    mixed: npt.NDArray[np.int32] | None
    data: memoryview


def write_cells(cache: KVCache, config: ModelConfig, key_type: int, start: int, end: int) -> bytes:
    """Cells [start, end) of a cache. Raises ContextError for some of the mixed cells: only with all others they make sense."""
    whole = cache.is_whole(start, end)
    runs = cache.positions.part(start, end)
    mixed = b"" if cache.mixed is None or not whole else cache.mixed.tobytes()
    counts = (end - start, len(runs), cache.positions.of(end), cache.n_mixed if whole else 0)
    head = _HEADER.pack(_MAGIC, config.n_layer, config.kv_width, key_type, *counts)
    out = io.BytesIO()  # written to piece by piece: joined, there would be two of all cells for a while
    for piece in (head, *(_RUN.pack(*run) for run in runs), mixed):
        out.write(piece)
    for piece in cache.export(start, end):
        out.write(piece)
    return out.getvalue()


def read_cells(data: bytes | memoryview, config: ModelConfig, key_type: int) -> Cells:
    """Check exported cells against a model. Raises SessionFileError."""
    view = memoryview(data).cast("B")
    if len(view) < _HEADER.size:
        raise SessionFileError("the saved cells are cut short; start a new session")
    magic, layers, width, kind, n, n_runs, following, n_mixed = _HEADER.unpack(view[: _HEADER.size])
    if magic != _MAGIC or (layers, width, kind) != (config.n_layer, config.kv_width, key_type):
        raise SessionFileError("the saved cells have another format, shape or key type than this model; start a new session")
    noted = _HEADER.size + _RUN.size * n_runs
    body = noted + 4 * config.n_layer * config.n_head_kv * n_mixed
    if len(view) != body + n * cell_bytes(config, key_type) or n_mixed > n:
        raise SessionFileError("the saved cells are cut short or too long; start a new session")
    positions = Positions.saved([Run(*_RUN.unpack_from(view, _HEADER.size + _RUN.size * i)) for i in range(n_runs)], n, following)
    return Cells(positions, saved_mixed(view[noted:body], config.n_layer, config.n_head_kv, n_mixed, positions), view[body:])
