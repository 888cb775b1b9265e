"""Which units of a model go to an accelerator, their tensors in its memory, and what caches and graphs take there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.graph.config import TOGETHER
from edge_rt.core.weights.units import CHUNK, Span, read_span, unit_name
from edge_rt.errors import ModelFileError, OptionError, OutOfMemory
from edge_rt.native import devices, ggml, memory

if TYPE_CHECKING:
    from edge_rt.core.gguf.model_file import ModelFile
    from edge_rt.core.gguf.reader import TensorInfo
    from edge_rt.core.graph.config import ModelConfig
    from edge_rt.core.weights.error_correction import Corrections
    from edge_rt.native.devices import Device

# Which units of a model go to an accelerator: the head and the last blocks before it, as many as its memory holds.
#
# The last ones, because then a step crosses over once: hidden states go there and logits come back.


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A device of another ggml backend, and how many bytes of its memory the engine may take: weights, caches and compute buffers.

    ``backend``: the name of its registry in ggml: ``CUDA``, ``CANN``, ``Vulkan``. ``index``: its number there. ``id``: how the backend
    names it for good, for PCI devices by address (``0000:c1:00.0``); where given it decides, as numbers differ from tool to tool.
    """

    backend: str
    memory: int
    index: int = 0
    id: str = ""


class Placement(NamedTuple):
    """Blocks from ``first`` on and the head go to the device, where they take ``size`` bytes with their caches and compute buffers."""

    first: int
    size: int


class Sizes(NamedTuple):
    """Bytes that a model takes on a device: weights of each block; ``head``: those behind the blocks; ``cache``: of one block's
    keys and values; ``compute``: the compute buffer with inputs, however many blocks there are.
    """

    blocks: Sequence[int]
    head: int
    cache: int
    compute: int


def place_units(sizes: Sizes, memory: int) -> Placement | None:
    """As many of the last blocks as fit ``memory`` bytes behind the head; None where not even the head does."""
    total = sizes.head + sizes.compute
    if total > memory:
        return None
    first = len(sizes.blocks)
    while first and total + sizes.blocks[first - 1] + sizes.cache <= memory:
        first -= 1
        total += sizes.blocks[first] + sizes.cache
    return Placement(first, total)


# The weights of an accelerator's units: tensors in its memory, filled from the model file when a step first needs them.

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

    def __init__(self, file: ModelFile, config: ModelConfig, device: Device) -> None:
        """Describe all units that may go there: everything but the embedding, which a tied head is too."""
        self._file, self._device = file, device
        infos = dict(file.header.tensors)
        if "output.weight" not in infos:
            infos["output.weight"] = infos["token_embd.weight"]
        self._infos = {name: info for name, info in infos.items() if name != "token_embd.weight"}
        self._order = [*(f"blk.{i}" for i in range(config.n_layer)), "norm", "head"]
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


# The part of an open model that lies on an accelerator: its weights, and the memory that caches and graphs take beside them.


class Offloaded:
    """Blocks from ``first`` on and the head. Nothing takes more of the device's memory than the accelerator may.

    ``compute``: bytes that the graphs take, which who allocates them says. ``sizes``: what the placement went by.
    """

    def __init__(self, device: Device, file: ModelFile, config: ModelConfig, memory: int) -> None:
        self.device, self.weights = device, DeviceWeights(file, config, device)
        self.first = self._layers = config.n_layer
        self.memory = memory
        self.sizes = Sizes((), 0, 0, 0)
        self.compute = 0
        self._taken: dict[int, int] = {}  # bytes, by address of the buffer

    @classmethod
    def open(cls, accelerator: Accelerator, file: ModelFile, config: ModelConfig) -> Offloaded:
        """Open the device; nothing is placed there yet. Raises OptionError if there is none, OutOfMemory."""
        device = devices.open_device(accelerator.backend, accelerator.index, accelerator.id)
        try:
            return cls(device, file, config, accelerator.memory)
        except BaseException:
            device.close()
            raise

    def place(self, cache: int, compute: int) -> None:
        """Take memory for the weights of as many blocks as fit, with a cache of so many bytes for each and so much for the graphs.

        Raises OptionError if not even the head fits, OutOfMemory if the device has less than it may give.
        """
        *blocks, norm, head = self.weights.sizes
        self.sizes = Sizes(blocks, norm + head, cache, compute)
        placement = place_units(self.sizes, self.memory)
        if placement is None:
            least = -(-(norm + head + compute) // (1 << 20))
            raise OptionError(
                f"{self.memory >> 20} MB of {self.device.name} do not even hold this model's head; give at least {least} MB, or use the CPU"
            )
        self.first = placement.first
        self.weights.allocate(self.first)

    @property
    def name(self) -> str:
        """The device, in the backend's words."""
        return str(self.device.name)

    @property
    def layers(self) -> range:
        """Blocks on the device."""
        return range(self.first, self._layers)

    @property
    def held(self) -> int:
        """Bytes of the device's memory in use."""
        return self.weights.size + self.compute + self.beside

    @property
    def beside(self) -> int:
        """Those of caches, and of the graphs' inputs."""
        return sum(self._taken.values())

    def check_room(self, size: int) -> None:
        """Raise OutOfMemory if so many bytes more would be too many."""
        if self.held + size > self.memory:
            raise OutOfMemory(
                f"{-(-size // (1 << 20))} MB more do not fit the {self.memory >> 20} MB that may be used of {self.name}; "
                "close sessions, lower --ctx, or give the device fewer blocks"
            )

    def buffer(self, size: int) -> ggml.Handle:
        """Zeroed memory. Raises OutOfMemory."""
        self.check_room(size)
        return self._noted(self.device.buffer(size))

    def allocate_context(self, ctx: ggml.Handle) -> ggml.Handle:
        """Memory for the tensors of a context. Raises OutOfMemory."""
        self.check_room(self.device.context_size(ctx))
        return self._noted(self.device.allocate_context(ctx))

    def _noted(self, buffer: ggml.Handle) -> ggml.Handle:
        self._taken[buffer.address] = int(ggml.c.backend_buffer_get_size(buffer.address))
        return buffer

    def give(self, buffer: ggml.Handle) -> None:
        """Give memory back."""
        del self._taken[buffer.address]
        buffer.close()

    def fill(self, progress: Progress | None, moved: Callable[[], None]) -> None:
        """Have all weights there before a graph runs; see ``DeviceWeights.fill``. Raises OutOfMemory if they had to go meanwhile."""
        self.weights.fill(progress, moved)

    def cool(self) -> None:
        """Drop the weights. Graphs must have been closed."""
        self.weights.drop()

    def warm(self) -> None:
        """Take memory for the weights again, if it was given back. Raises OutOfMemory."""
        if not self.weights.names:
            self.weights.allocate(self.first)

    def close(self) -> None:
        """Give everything back. Caches and graphs must have been closed."""
        self.weights.drop()
        self.device.close()
