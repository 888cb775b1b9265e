"""An adapter's factors as ggml tensors over its mapped file: read when a kernel first touches them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.weights.units import Span, Unit, merge, unit_name
from edge_rt.native import devices, ggml, memory

if TYPE_CHECKING:
    from edge_rt.core.gguf.lora import LoraFile, Pair
    from edge_rt.core.gguf.reader import TensorInfo
    from edge_rt.core.weights.gpu_offload import Offloaded


class Factors(NamedTuple):
    """Tensors A and B of one weight, and where they are from."""

    a: int
    b: int
    pair: Pair


class AdapterWeights:
    """The factors of one adapter, by the weight they change. The file stays its owner's, and open until ``close``."""

    def __init__(self, lora: LoraFile, offloaded: Offloaded | None = None) -> None:
        """Maps nothing that is not mapped already, and reads only what offloaded weights need, which it copies to them.

        Raises OutOfMemory.
        """
        self.lora, self._offloaded = lora, offloaded
        file = lora.file
        self._ctx = ggml.context(2 * len(lora.pairs))
        self._base = memory.address_of(file.map)
        self._buffer = ggml.buffer_from_address(self._base, len(file.map))
        self._factors = {pair.base: Factors(self._place(pair.a), self._place(pair.b), pair) for pair in lora.pairs}
        infos = [info for pair in lora.pairs for info in (pair.a, pair.b)]
        self._unit = Unit("adapter", merge([Span(self._base + info.offset, info.nbytes, file.fd, info.offset) for info in infos]))
        names = offloaded.weights.names if offloaded else ()
        self._far = {pair.base: pair for pair in lora.pairs if unit_name(pair.base) in names}
        self._there: dict[str, Factors] = {}
        self._far_ctx = ggml.context(2 * len(self._far) + 1)
        self._far_buffer = self._copied(offloaded) if offloaded and self._far else None

    def _copied(self, offloaded: Offloaded) -> ggml.Handle:
        """Copies of the factors on the device."""
        for base, pair in self._far.items():
            a, b = (ggml.new_tensor(self._far_ctx.address, info.type, info.shape) for info in (pair.a, pair.b))
            self._there[base] = Factors(a, b, pair)
        buffer = offloaded.allocate_context(self._far_ctx)
        for factors in self._there.values():
            for tensor, info in ((factors.a, factors.pair.a), (factors.b, factors.pair.b)):
                devices.write(tensor, self._base + info.offset, info.nbytes)
        return buffer

    def _place(self, info: TensorInfo) -> int:
        tensor = ggml.new_tensor(self._ctx.address, info.type, info.shape)
        ggml.place(tensor, self._buffer.address, self._base + info.offset)
        return tensor

    def get(self, base: str, *, far: bool = False) -> Factors | None:
        """The factors of a weight, those on the device if it is ``far``; None if it stays as it is."""
        return (self._there if far else self._factors).get(base)

    def check_unchanged(self) -> None:
        """Raise ModelChanged if the file was written to since it was opened."""
        self.lora.file.check_unchanged()

    @property
    def size(self) -> int:
        """Bytes mapped."""
        return self._unit.size

    def resident(self) -> int | None:
        """Bytes in memory now, None where the system cannot say."""
        return self._unit.resident()

    def cool(self) -> None:
        """Give every page back."""
        for span in self._unit.spans:
            address, size, offset = span.whole_pages
            memory.release(address, size, span.fd, offset)

    def close(self) -> None:
        """Forget the tensors. No graph over them may run afterwards."""
        if self._far_buffer and self._offloaded:
            self._offloaded.give(self._far_buffer)
            self._far_buffer = None
        self._far_ctx.close()
        self._buffer.close()
        self._ctx.close()


class AppliedLora(NamedTuple):
    """An adapter as a sequence has it: ``scale`` times."""

    weights: AdapterWeights
    scale: float
