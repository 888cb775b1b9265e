"""One built and allocated graph for one step shape, the cache of such graphs, the split into ubatches, the border to a device."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.core.engine import SequenceBatch
from edge_rt.core.graph import adapters, decoder, layers
from edge_rt.core.graph.builder import (
    TILES_FROM,
    AttentionSupport,
    Beyond,
    GraphBuilder,
    GraphSegment,
    Inputs,
    KVView,
    SlotInputs,
    SlotShape,
    Weights,
    wants_flash,
)
from edge_rt.core.graph.config import ModelConfig
from edge_rt.errors import OutOfMemory, UnsupportedModel
from edge_rt.native import devices, ggml, memory
from edge_rt.native.ggml import Rows, elements

if TYPE_CHECKING:
    from edge_rt.core.graph.builder import GraphSegment
    from edge_rt.core.graph.decoder import Output
    from edge_rt.core.weights.gpu_offload import Offloaded
    from edge_rt.native.devices import Device
    from edge_rt.native.ggml import Kind

# Where a step crosses over to a device: inputs that it needs too, hidden states on the way there, results on the way back.

c = ggml.c


class DeviceBoundary:
    """Of one step graph. ``nbytes``: of the device's memory that the inputs take, and of the host's for what comes back."""

    def __init__(self, offloaded: Offloaded, config: ModelConfig, inputs: Inputs, leaving: int, rows: int) -> None:
        """``leaving`` [E, T] in the host's memory, of which ``rows`` columns cross over. Raises OutOfMemory."""
        self._offloaded, self._config = offloaded, config
        whole = bool(offloaded.layers)  # the head alone needs no more than what comes in
        self._ctx = ggml.context(3 + 4 * len(inputs.slots))
        self._twins: list[tuple[int, int, int]] = []  # tensor there, address here, bytes
        arriving = self._twin(leaving, 4 * config.n_embd * rows)
        twins = Inputs(
            tokens=0,
            positions=self._twin(inputs.positions) if whole else 0,
            rows=self._twin(inputs.rows) if whole and inputs.rows else None,
            slots=[SlotInputs(*(self._twin(tensor) if tensor else 0 for tensor in slot)) for slot in inputs.slots] if whole else [],
        )
        self._buffer = offloaded.allocate_context(self._ctx)
        unit = f"blk.{offloaded.first}" if whole else "head"
        self.beyond = Beyond(unit, offloaded.weights, twins, leaving, arriving)
        self.nbytes = int(c.backend_buffer_get_size(self._buffer.address))
        self._result: tuple[int, bytearray] | None = None

    def _twin(self, tensor: int, size: int | None = None) -> int:
        fields = ggml.fields(tensor)
        twin = ggml.new_tensor(self._ctx.address, fields.type, tuple(fields.ne))
        self._twins.append((twin, ggml.data_address(tensor), devices.nbytes(tensor) if size is None else size))
        return twin

    def result(self, tensor: int, rows: int, width: int) -> Rows:
        """What a run gives, in the host's memory: float32 [rows, width] of a tensor there."""
        held = bytearray(4 * rows * width)
        self._result = tensor, held
        self.nbytes += len(held)
        return Rows(memoryview(held).cast("f"), width)

    def run(self, segment: GraphSegment) -> None:
        """Send what was set here, compute, fetch the result. The weights must be there. Raises NativeError, OutOfMemory."""
        for twin, address, size in self._twins:
            devices.write(twin, address, size)
        self._offloaded.device.compute(segment.graph)
        if self._result:
            tensor, held = self._result
            devices.read(tensor, memory.address_of(held), len(held))

    def allocate(self, segment: GraphSegment, arena: ggml.Handle) -> None:
        """Give the nodes of a graph addresses. Raises UnsupportedModel if there is no kernel for one of them, OutOfMemory."""
        device, offloaded = self._offloaded.device, self._offloaded
        if missing := device.unsupported(segment.graph):
            raise UnsupportedModel(f"{device.name} has no kernel for {missing}; use the CPU, or a model in another precision")
        held = int(c.gallocr_get_buffer_size(arena.address, 0))
        if (size := device.graph_size(segment.graph)) > held:
            offloaded.check_room(size - held)
        if not c.gallocr_alloc_graph(arena.address, segment.graph):
            raise OutOfMemory(f"{device.name} has no {size >> 20} MB left for the compute buffer; close other programs, or lower --ctx")
        offloaded.compute = int(c.gallocr_get_buffer_size(arena.address, 0))

    def close(self) -> None:
        """Give the device's memory back."""
        self._offloaded.give(self._buffer)
        self._ctx.close()


def attention_traits(device: Device, config: ModelConfig, key_type: int) -> AttentionSupport:
    """What the device's attention can do with heads and keys of this kind: asked with operations that are never run."""
    n, group = 256, config.n_head // config.n_head_kv

    def flash(ctx: int, tokens: int, each: bool) -> bool:
        apart = tokens if each else 1
        q = ggml.new_tensor(ctx, ggml.TYPE_F32, (config.head_dim, tokens // apart, config.n_head * apart))
        k = ggml.new_tensor(ctx, key_type, (config.head_dim, n, config.n_head_kv))
        v = ggml.new_tensor(ctx, ggml.TYPE_F16, (config.head_dim, n, config.n_head_kv))
        mask = ggml.new_tensor(ctx, ggml.TYPE_F16, (n, 1, tokens * group) if each else (n, tokens))
        return device.supports(int(c.flash_attn_ext(ctx, q, k, v, mask, config.attention_scale, 0.0, 0.0)))

    with ggml.context(32) as ctx:
        all_ = flash(ctx.address, 1, False) and flash(ctx.address, TILES_FROM, False)
        return AttentionSupport(all_, all_ and flash(ctx.address, 2, True))


# How a step is divided among graph runs.


class Ubatch(NamedTuple):
    """Tokens of one batch that go into one graph run; ``rows`` of them get logits."""

    batch: int
    sequence: int
    tokens: Sequence[int]
    rows: Sequence[int]


def split_ubatches(batches: Sequence[SequenceBatch], size: int, order: Sequence[int] | None = None) -> list[list[Ubatch]]:
    """Divide batches into graph runs of at most ``size`` tokens; ``order``: indices of the batches as they go in, None: as they are."""
    runs: list[list[Ubatch]] = [[]]
    room = size
    for index in range(len(batches)) if order is None else order:
        batch = batches[index]
        n, start = len(batch.tokens), 0
        while start < n:
            if room == 0:
                runs.append([])
                room = size
            take = min(room, n - start)
            wanted = {"none": range(0), "last": range(n - 1, n), "all": range(n)}[batch.logits]
            rows = [r - start for r in wanted if start <= r < start + take]
            runs[-1].append(Ubatch(index, batch.sequence, batch.tokens[start : start + take], rows))
            start, room = start + take, room - take
    return [run for run in runs if run]


# One built and allocated graph for one step shape, and the cache of them.

_MINUS_INFINITY = {"H": b"\x00\xfc", "f": b"\x00\x00\x80\xff"}  # half and single precision, little-endian as GGUF is
_NODES_PER_LAYER, _NODES_PER_QUERY, _NODES_PER_EXPERT = 64, 24, 3  # generous: libggml aborts when a context is full
GRAPH_BYTES = 24 * 1024 * 1024
"""Cached graphs are dropped, oldest first, beyond this many bytes. A graph of one sequence and 30 layers takes one MB, of 16 sequences six:
descriptions of tensors are most of it."""


class SequenceInput(NamedTuple):
    """One sequence's part of a step: its cache, first free cell, position there, tokens, and the rows of them that get logits.

    ``column``: where in the ring the first free cell's query goes, if it is watched. Of a stack: ``starts`` and ``positions`` of all.
    """

    cache: KVView
    starts: Sequence[int]
    positions: Sequence[int]
    tokens: Sequence[int]
    rows: Sequence[int]
    column: int = 0


def stacked(shapes: Sequence[SlotShape], slots: Sequence[SequenceInput]) -> tuple[list[SlotShape], list[SequenceInput]]:
    """The same step with those side by side that can be one stack: one token each, equal caches at equal distances."""
    new_shapes: list[SlotShape] = []
    new_slots: list[SequenceInput] = []
    for first, last in layers.runs(shapes, [slot.cache for slot in slots]):
        if last == first:
            new_shapes.append(shapes[first])
            new_slots.append(slots[first])
            continue
        own, n = slots[first : last + 1], last + 1 - first
        cells = max(shape.cells for shape in shapes[first : last + 1])
        new_shapes.append(shapes[first]._replace(tokens=n, cells=cells, rows=n, sequences=n))
        starts, positions = [slot.starts[0] for slot in own], [slot.positions[0] for slot in own]
        new_slots.append(
            SequenceInput(layers.joined_caches([slot.cache for slot in own]), starts, positions, [slot.tokens[0] for slot in own], range(n))
        )
    return new_shapes, new_slots


class _SlotMemory(NamedTuple):
    """A slot's inputs: ``cells`` [t]; ``elements`` [t, KV], a NumPy array, where values are transposed; ``mask`` [t * N].

    ``mask_rows`` is N times "may be seen" and then N times "may not": each row of a mask is a piece of it.
    ``columns`` [min(t, window)] only where the sequence is watched.
    Of a stack, ``cells`` is a NumPy array [S, G], and t is S.
    """

    cells: Any
    elements: Any
    mask: memoryview[Any]
    mask_rows: memoryview[Any]
    columns: memoryview[int] | None
    window: int


def _room(
    config: ModelConfig, weights: Weights, shapes: Sequence[SlotShape], split: bool, far: bool = False
) -> tuple[int, tuple[int, ...]]:
    """How many tensors the graph of a step may have, and how many nodes each of its segments; ``far``: one more is on a device."""
    queries = sum(1 if shape.together or shape.sequences > 1 else shape.tokens for shape in shapes)
    per_layer = _NODES_PER_LAYER + _NODES_PER_QUERY * queries + _NODES_PER_EXPERT * config.n_expert_used
    adapted = adapters.NODES_PER_PRODUCT * sum(shape.adapter is not None for shape in shapes)
    per_layer += adapters.PRODUCTS_PER_LAYER * (adapted + (layers.NODES if weights.centred else 0))
    per_layer += adapters.nodes(weights.corrections.nodes, shapes) if weights.corrections else 0
    around = 64 + 2 * adapted  # embedding and head
    size, all_ = around + per_layer * (3 if split else config.n_layer), around + per_layer * config.n_layer
    return all_, (*(size,) * (config.n_layer + 2 if split else 1), *(all_,) * far)


def description_bytes(config: ModelConfig, weights: Weights, shapes: Sequence[SlotShape], split: bool, far: bool = False) -> int:
    """Bytes of the tensors' descriptions of the graph of a step."""
    return ggml.context_bytes(*_room(config, weights, shapes, split, far))


class Far(NamedTuple):
    """The device that a step graph ends on, and the compute buffer there."""

    offloaded: Offloaded
    arena: ggml.Handle


class StepGraph:
    """Graph, inputs and output of one step shape. Every input is set before every evaluation."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        shapes: Sequence[SlotShape],
        caches: Sequence[KVView],
        arena: ggml.Handle,
        split: bool,
        output: Output = "logits",
        far: Far | None = None,
    ) -> None:
        self.shapes = shapes
        n_tokens, n_rows = sum(s.tokens for s in shapes), sum(s.rows for s in shapes)
        n_inputs = 6 + 4 * len(shapes)
        self._input_ctx = ggml.context(n_inputs)
        self._flash = [wants_flash(shape, cache) for shape, cache in zip(shapes, caches, strict=True)]
        inputs, borders = self._declare_inputs(config, n_tokens, n_rows, caches, 2 * split + (far is not None))
        self._input_buffer = ggml.allocate_context(self._input_ctx)
        self._bind(inputs, config, n_tokens, caches)
        tensors, graphs = _room(config, weights, shapes, split, far is not None)
        self._ctx = ggml.context(tensors, graphs)
        self.input_bytes = int(c.backend_buffer_get_size(self._input_buffer.address)) + ggml.context_bytes(n_inputs)
        self._over = {cache.members: ggml.buffer_from_address(*layers.span(cache)) for cache in caches if cache.members}
        over = {members: buffer.address for members, buffer in self._over.items()}
        crosses = n_tokens if far and far.offloaded.layers else n_rows
        self.boundary = DeviceBoundary(far.offloaded, config, inputs, borders[-1], crosses) if far and crosses else None
        try:
            beyond = self.boundary.beyond if self.boundary else None
            ctx = self._ctx.address
            builder = GraphBuilder(ctx, config, weights, inputs, shapes, caches, graphs[0], split, borders[:2], over, beyond, graphs[-1])
            found = decoder.build(builder, decoder.FAMILIES[config.architecture], output if n_rows else None)
            self.segments: list[GraphSegment] = builder.segments
            self._allocate(arena, far)
            width = config.n_vocab if output == "logits" else config.n_embd
            if self.boundary and self.segments[-1].far:
                self.output = None if found is None else self.boundary.result(found, n_rows, width)
            else:
                self.output = None if found is None else Rows.of(found, n_rows, width)
        except BaseException:
            self.close()
            raise
        self.experts = [elements(e, "i", int(ggml.fields(e).ne[1]) * config.n_expert_used) for e in builder.experts]
        self.nbytes = self.input_bytes + description_bytes(config, weights, shapes, split, far is not None)
        self.nbytes += self.boundary.nbytes if self.boundary else 0

    def _declare_inputs(
        self, config: ModelConfig, n_tokens: int, n_rows: int, caches: Sequence[KVView], n_borders: int
    ) -> tuple[Inputs, list[int]]:
        ctx = self._input_ctx.address
        slots = []
        for shape, cache, flash in zip(self.shapes, caches, self._flash, strict=True):
            n, stacked = shape.tokens, bool(cache.members)
            cells = (config.n_head_kv, n) if stacked else (n,)
            where = (config.kv_width, n) if stacked else (n * config.kv_width,)
            seen = (shape.cells, 1, 1, n) if stacked else (shape.cells, n)
            slots.append(
                SlotInputs(
                    cells=ggml.new_tensor(ctx, ggml.TYPE_I64, cells),
                    elements=ggml.new_tensor(ctx, ggml.TYPE_I64, where) if cache.transposed else 0,
                    mask=ggml.new_tensor(ctx, ggml.TYPE_F16 if flash else ggml.TYPE_F32, seen),
                    columns=c.new_tensor_1d(ctx, ggml.TYPE_I64, min(n, cache.window)) if cache.window else 0,
                )
            )
        inputs = Inputs(
            tokens=c.new_tensor_1d(ctx, ggml.TYPE_I32, n_tokens),
            positions=c.new_tensor_1d(ctx, ggml.TYPE_I32, n_tokens),
            rows=c.new_tensor_1d(ctx, ggml.TYPE_I32, n_rows) if 0 < n_rows < n_tokens else None,
            slots=slots,
        )
        borders = [c.new_tensor_2d(ctx, ggml.TYPE_F32, config.n_embd, n_tokens) for _ in range(n_borders)]
        return inputs, borders

    def _bind(self, inputs: Inputs, config: ModelConfig, n_tokens: int, caches: Sequence[KVView]) -> None:
        """Views over the inputs, and what of them never changes."""
        self._tokens = elements(inputs.tokens, "i", n_tokens)
        self._positions = elements(inputs.positions, "i", n_tokens)
        self._rows = None if inputs.rows is None else elements(inputs.rows, "i", sum(s.rows for s in self.shapes))
        self._slots = []
        for shape, slot, flash, cache in zip(self.shapes, inputs.slots, self._flash, caches, strict=True):
            kind: Kind = "H" if flash else "f"
            n = shape.tokens
            unseen = _MINUS_INFINITY[kind] * shape.cells
            self._slots.append(
                _SlotMemory(
                    cells=ggml.view(slot.cells, "i8", (n, config.n_head_kv)) if cache.members else elements(slot.cells, "q", n),
                    elements=ggml.view(slot.elements, "i8", (n, config.kv_width)) if slot.elements else None,
                    mask=elements(slot.mask, kind, n * shape.cells),
                    mask_rows=memoryview(bytes(len(unseen)) + unseen).cast(kind),
                    columns=elements(slot.columns, "q", min(n, cache.window)) if slot.columns else None,
                    window=cache.window,
                )
            )

    def _allocate(self, arena: ggml.Handle, far: Far | None) -> None:
        """Give every node an address in the shared compute buffer; the largest segment decides its size first."""
        near = [segment for segment in self.segments if not segment.far]
        if far and self.boundary and len(near) < len(self.segments):
            self.boundary.allocate(self.segments[-1], far.arena)
        for segment in near[1:]:
            c.gallocr_reserve(arena.address, segment.graph)
        for segment in near:
            if not c.gallocr_alloc_graph(arena.address, segment.graph):
                raise OutOfMemory("no memory for the compute buffer; lower --ctx or close other programs")

    def advance(self, tokens: Sequence[int], cells: Sequence[int]) -> None:
        """Set the inputs of a step of one token for each sequence, in the order of columns, each into the cell after that of the last
        step.
        """
        column = 0
        for shape, filled in zip(self.shapes, self._slots, strict=True):
            if shape.sequences > 1:
                where = filled.cells
                where += 1
            else:
                filled.cells[0] += 1
            if (where := filled.elements) is not None:
                where += 1
            if filled.columns is not None:
                filled.columns[0] = (filled.columns[0] + 1) % filled.window
            for i in range(shape.sequences):
                filled.mask[i * shape.cells + cells[column]] = 0
                self._tokens[column] = tokens[column]
                self._positions[column] += 1
                column += 1

    def set_inputs(self, slots: Sequence[SequenceInput]) -> None:
        """Fill every input for the given slots, which must have this graph's shapes."""
        first = row = 0
        for slot, shape, filled in zip(slots, self.shapes, self._slots, strict=True):
            n, here, positions = shape.tokens, slot.starts, slot.positions
            if shape.sequences > 1:
                _fill_indices(filled.cells, here, slot.cache.capacity)
            else:
                here, positions = range(here[0], here[0] + n), range(positions[0], positions[0] + n)
                filled.cells[:] = array("q", here)
            self._tokens[first : first + n] = array("i", slot.tokens)
            self._positions[first : first + n] = array("i", positions)
            if filled.elements is not None:
                _fill_indices(filled.elements, here, slot.cache.capacity)
            if filled.columns is not None:
                last = range(slot.column + n - len(filled.columns), slot.column + n)
                filled.columns[:] = array("q", [column % filled.window for column in last])
            for i, cell in enumerate(here):
                unseen = shape.cells - cell - 1
                filled.mask[i * shape.cells : (i + 1) * shape.cells] = filled.mask_rows[unseen : unseen + shape.cells]
            if self._rows is not None:
                self._rows[row : row + shape.rows] = array("i", [first + r for r in slot.rows])
            first += n
            row += shape.rows

    def close(self) -> None:
        """Free the graph and its inputs."""
        if self.boundary:
            self.boundary.close()
        self._ctx.close()
        self._input_buffer.close()
        self._input_ctx.close()
        for buffer in self._over.values():
            buffer.close()


def _fill_indices(indices: Any, cells: Sequence[int], capacity: int) -> None:
    """Where each head's key, or each transposed value, of each token goes in [heads or KV, capacity]. With NumPy: they are many."""
    import numpy as np

    np.add.outer(np.array(cells), np.arange(indices.shape[1]) * capacity, out=indices)


class GraphCache:
    """Step graphs by shape and cache identity, least recently used first out; they share one compute buffer, and one on the device."""

    def __init__(self, config: ModelConfig, weights: Weights, split: bool, offloaded: Offloaded | None = None) -> None:
        self._config, self._weights, self._split = config, weights, split
        self._graphs: OrderedDict[Any, StepGraph] = OrderedDict()
        self._arena = ggml.allocator()
        self._far = Far(offloaded, offloaded.device.allocator()) if offloaded else None
        self._sizes: tuple[int, ...] = ()

    def get(self, shapes: Sequence[SlotShape], caches: Sequence[KVView], output: Output = "logits") -> StepGraph:
        """The graph for a step shape, built if need be. Raises OutOfMemory."""
        key = (tuple(shapes), tuple(one for cache in caches for one in cache.members or (id(cache),)), output)
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            return graph
        try:
            graph = self._built(shapes, caches, output)
        except OutOfMemory:  # without the others it may fit; and where a compute buffer was to grow, what was in it is gone
            if not self._graphs:
                raise
            self.clear()
            graph = self._built(shapes, caches, output)
        self._graphs[key] = graph
        while len(self._graphs) > 1 and sum(g.nbytes for g in self._graphs.values()) > GRAPH_BYTES:
            self._graphs.popitem(last=False)[1].close()
        return graph

    def _built(self, shapes: Sequence[SlotShape], caches: Sequence[KVView], output: Output) -> StepGraph:
        graph = StepGraph(self._config, self._weights, shapes, caches, self._arena, self._split, output, self._far)
        arenas = (self._arena, self._far.arena) if self._far else (self._arena,)
        sizes = tuple(int(c.gallocr_get_buffer_size(arena.address, 0)) for arena in arenas)
        if sizes != self._sizes:  # a compute buffer moved: what was allocated in the old one is gone
            self._sizes = sizes
            self.clear()
        return graph

    @property
    def arena_bytes(self) -> int:
        """Bytes of the compute buffer, here and on the device."""
        return sum(self._sizes)

    def forget(self, cache: KVView) -> None:
        """Drop the graphs over a cache that is about to move or go."""
        for key in [k for k in self._graphs if id(cache) in k[1]]:
            self._graphs.pop(key).close()

    def clear(self) -> None:
        """Drop all graphs."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the compute buffer and of cached graphs."""
        return self.arena_bytes + sum(g.nbytes for g in self._graphs.values())

    def close(self) -> None:
        """Drop everything."""
        self.clear()
        self._arena.close()
        if self._far:
            self._far.arena.close()
            self._far.offloaded.compute = 0
