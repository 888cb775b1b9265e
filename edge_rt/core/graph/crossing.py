"""Where a step crosses over to a device: inputs that it needs too, hidden states on the way there, results on the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_rt.core.graph.attention import TILES_FROM, Traits
from edge_rt.core.graph.common import Beyond, Inputs, SlotInputs
from edge_rt.errors import OutOfMemory, UnsupportedModel
from edge_rt.native import devices, ggml, memory
from edge_rt.native.rows import Rows

if TYPE_CHECKING:
    from edge_rt.core.graph.common import Segment
    from edge_rt.core.graph.hyper import Hyper
    from edge_rt.core.load.offloaded import Offloaded
    from edge_rt.native.devices import Device

c = ggml.c


class Crossing:
    """Of one step graph. ``nbytes``: of the device's memory that the inputs take, and of the host's for what comes back."""

    def __init__(self, offloaded: Offloaded, hyper: Hyper, inputs: Inputs, leaving: int, rows: int) -> None:
        """``leaving`` [E, T] in the host's memory, of which ``rows`` columns cross over. Raises OutOfMemory."""
        self._offloaded, self._hyper = offloaded, hyper
        whole = bool(offloaded.layers)  # the head alone needs no more than what comes in
        self._ctx = ggml.context(3 + 4 * len(inputs.slots))
        self._twins: list[tuple[int, int, int]] = []  # tensor there, address here, bytes
        arriving = self._twin(leaving, 4 * hyper.n_embd * rows)
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

    def run(self, segment: Segment) -> None:
        """Send what was set here, compute, fetch the result. The weights must be there. Raises NativeError, OutOfMemory."""
        for twin, address, size in self._twins:
            devices.write(twin, address, size)
        self._offloaded.device.compute(segment.graph)
        if self._result:
            tensor, held = self._result
            devices.read(tensor, memory.address_of(held), len(held))

    def allocate(self, segment: Segment, arena: ggml.Handle) -> None:
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


def attention_traits(device: Device, hyper: Hyper, key_type: int) -> Traits:
    """What the device's attention can do with heads and keys of this kind: asked with operations that are never run."""
    n, group = 256, hyper.n_head // hyper.n_head_kv

    def flash(ctx: int, tokens: int, each: bool) -> bool:
        apart = tokens if each else 1
        q = ggml.new_tensor(ctx, ggml.TYPE_F32, (hyper.head_dim, tokens // apart, hyper.n_head * apart))
        k = ggml.new_tensor(ctx, key_type, (hyper.head_dim, n, hyper.n_head_kv))
        v = ggml.new_tensor(ctx, ggml.TYPE_F16, (hyper.head_dim, n, hyper.n_head_kv))
        mask = ggml.new_tensor(ctx, ggml.TYPE_F16, (n, 1, tokens * group) if each else (n, tokens))
        return device.supports(int(c.flash_attn_ext(ctx, q, k, v, mask, hyper.attention_scale, 0.0, 0.0)))

    with ggml.context(32) as ctx:
        all_ = flash(ctx.address, 1, False) and flash(ctx.address, TILES_FROM, False)
        return Traits(all_, all_ and flash(ctx.address, 2, True))
