"""The weights of an accelerator's units: tensors in its memory, filled from the model file when a step first needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge_rt.core.graph.hyper import TOGETHER
from edge_rt.core.load.prefetch import CHUNK, read_span
from edge_rt.core.load.units import Span, unit_name
from edge_rt.errors import ModelFileError
from edge_rt.native import devices, ggml, memory

if TYPE_CHECKING:
    from edge_rt.core.graph.hyper import Hyper
    from edge_rt.core.load.corrections import Corrections
    from edge_rt.core.load.header import TensorInfo
    from edge_rt.core.load.model_file import ModelFile
    from edge_rt.native.devices import Device

Progress = Callable[[str, int, int], None]

@dataclass(slots=True)
class _Unit:
    """A unit's tensors in ``ctx``, by name; ``filled``: (tensor, where its bytes begin in it, what fills it)."""

    name: str
    ctx: ggml.Handle
    tensors: dict[str, int] = field(default_factory=dict)
    joined: dict[tuple[str, ...], int] = field(default_factory=dict)
    filled: list[tuple[int, int, TensorInfo]] = field(default_factory=list)
    buffer: ggml.Handle | None = None
    there: bool = False

    @property
    def bytes(self) -> int:
        return sum(info.nbytes for _, _, info in self.filled)


class DeviceWeights:
    """A ``Weights`` for graphs on a device. Nothing takes its memory before ``allocate``, nothing is read before ``fill``."""

    def __init__(self, file: ModelFile, hyper: Hyper, device: Device) -> None:
        """Describe all units that may go there: everything but the embedding, which a tied head is too."""
        self._file, self._device = file, device
        infos = dict(file.header.tensors)
        if "output.weight" not in infos:
            infos["output.weight"] = infos["token_embd.weight"]
        self._infos = {name: info for name, info in infos.items() if name != "token_embd.weight"}
        self._order = [*(f"blk.{i}" for i in range(hyper.n_layer)), "norm", "head"]
        self._units: list[_Unit] = []
        self._tensors: dict[str, int] = {}
        self._joined: dict[tuple[str, ...], int] = {}
        self.corrections: Corrections | None = None
        """What compensates for their quantisation; it belongs to who set it."""
        self.sizes = [self._size(name) for name in self._order]
        """Bytes of each block, the norms, the head."""

    @property
    def names(self) -> tuple[str, ...]:
        """The units that lie on the device, in forward order."""
        return tuple(unit.name for unit in self._units)

    @property
    def size(self) -> int:
        """Bytes of the device that they take now."""
        buffers = (unit.buffer for unit in self._units)
        return sum(int(ggml.c.backend_buffer_get_size(buffer.address)) for buffer in buffers if buffer)

    def add(self, beside: Mapping[str, int]) -> None:
        """Count bytes that lie on the device beside units' weights, by unit, among their ``sizes``."""
        self.sizes = [size + beside.get(name, 0) for name, size in zip(self._order, self.sizes, strict=True)]

    def allocate(self, first: int) -> None:
        """Take memory for the blocks from ``first`` on and what is behind them. Raises OutOfMemory, and then has taken none."""
        try:
            for name in self._order[first:]:
                unit = self._described(name)
                self._units.append(unit)
                self._tensors |= unit.tensors
                self._joined |= unit.joined
                unit.buffer = self._device.allocate_context(unit.ctx, weights=True)
        except BaseException:
            self.drop()
            raise

    def fill(self, progress: Progress | None, moved: Callable[[], None]) -> None:
        """Copy what is not there yet from the file, unit by unit; ``moved`` is called after each. Raises ModelChanged."""
        missing = [unit for unit in self._units if not unit.there]
        if not missing:
            return
        total = sum(unit.bytes for unit in self._units)
        done = total - sum(unit.bytes for unit in missing)
        base, scratch = memory.address_of(self._file.map), bytearray(CHUNK)
        for unit in missing:
            for tensor, offset, info in unit.filled:
                span = Span(base + info.offset, info.nbytes, self._file.fd, info.offset)
                read_span(span, scratch)
                devices.write(tensor, span.address, span.size, offset)
                address, size, _ = span.whole_pages
                memory.yield_pages(address, size)  # it is on the device now
            self._file.check_unchanged()
            unit.there = True
            done += unit.bytes
            moved()
            if progress:
                progress("upload", done, total)

    def get(self, name: str) -> int | None:
        """Address of a tensor, None if the model has none of that name. Of one that became part of another it is a view."""
        return self._tensors.get(name)

    def require(self, name: str) -> int:
        """The same, or ModelFileError."""
        if (tensor := self.get(name)) is None:
            raise ModelFileError(f"the model lacks the tensor {name}; the file is incomplete, download it again")
        return tensor

    def joined(self, names: tuple[str, ...]) -> int | None:
        """One tensor over the rows of several, None where they are apart."""
        return self._joined.get(names)

    @property
    def centred(self) -> bool:
        """Never: a device's kernels take weights as they are in the file."""
        return False

    def drop(self) -> None:
        """Give the device's memory back. No graph over these tensors may run afterwards."""
        for unit in self._units:
            if unit.buffer:
                unit.buffer.close()
            unit.ctx.close()
        for held in (self._units, self._tensors, self._joined):
            held.clear()

    def _size(self, name: str) -> int:
        unit = self._described(name)
        try:
            return self._device.context_size(unit.ctx)
        finally:
            unit.ctx.close()

    def _described(self, name: str) -> _Unit:
        infos = {tensor: info for tensor, info in self._infos.items() if unit_name(tensor) == name}
        unit = _Unit(name, ggml.context(2 * len(infos) + 1))
        # One tensor where they are of one kind: a backend may keep a weight in an order of its own (CANN does), so that weights beside
        # each other would not do.
        for parts in TOGETHER:
            weights, biases = (tuple(f"{name}.{part}.{kind}" for part in parts) for kind in ("weight", "bias"))
            if len({bias in infos for bias in biases}) == 1:  # graphs take the weights together only if they can the biases
                self._join(unit, infos, weights)
                self._join(unit, infos, biases)
        for tensor_name, info in infos.items():
            tensor = _named(ggml.new_tensor(unit.ctx.address, info.type, info.shape), tensor_name)
            unit.tensors[tensor_name] = tensor
            unit.filled.append((tensor, 0, info))
        return unit

    def _join(self, unit: _Unit, infos: dict[str, TensorInfo], names: tuple[str, ...]) -> None:
        """Make one tensor of several if all are there and of one kind, and take them out of ``infos``."""
        parts = [infos[name] for name in names if name in infos]
        if len(parts) < len(names) or len({(part.type, part.shape[:-1]) for part in parts}) > 1 or len(parts[0].shape) > 2:
            return
        first, rows = parts[0], [part.shape[-1] for part in parts]
        whole = _named(ggml.new_tensor(unit.ctx.address, first.type, (*first.shape[:-1], sum(rows))), names[0])
        unit.joined[names] = whole
        fields, offset = ggml.fields(whole), 0
        matrix = len(first.shape) == 2
        for name, part, n in zip(names, parts, rows, strict=True):
            shape: Sequence[int] = (first.shape[0], n) if matrix else (n, 1)
            unit.tensors[name] = int(ggml.c.view_2d(unit.ctx.address, whole, *shape, fields.nb[1], offset))
            unit.filled.append((whole, offset, part))
            offset += part.nbytes
            del infos[name]


def _named(tensor: int, name: str) -> int:
    ggml.c.set_name(tensor, name.encode())
    return tensor
