"""The part of an open model that lies on an accelerator: its weights, and the memory that caches and graphs take beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_rt.core.load.device_weights import DeviceWeights, Progress
from edge_rt.core.load.offload import Accelerator, Sizes, place
from edge_rt.errors import OptionError, OutOfMemory
from edge_rt.native import devices, ggml

if TYPE_CHECKING:
    from edge_rt.core.graph.hyper import Hyper
    from edge_rt.core.load.model_file import ModelFile
    from edge_rt.native.devices import Device


class Offloaded:
    """Blocks from ``first`` on and the head. Nothing takes more of the device's memory than the accelerator may.

    ``compute``: bytes that the graphs take, which who allocates them says. ``sizes``: what the placement went by.
    """

    def __init__(self, device: Device, file: ModelFile, hyper: Hyper, memory: int) -> None:
        self.device, self.weights = device, DeviceWeights(file, hyper, device)
        self.first = self._layers = hyper.n_layer
        self.memory = memory
        self.sizes = Sizes((), 0, 0, 0)
        self.compute = 0
        self._taken: dict[int, int] = {}  # bytes, by address of the buffer

    @classmethod
    def open(cls, accelerator: Accelerator, file: ModelFile, hyper: Hyper) -> Offloaded:
        """Open the device; nothing is placed there yet. Raises OptionError if there is none, OutOfMemory."""
        device = devices.open_device(accelerator.backend, accelerator.index, accelerator.id)
        try:
            return cls(device, file, hyper, accelerator.memory)
        except BaseException:
            device.close()
            raise

    def place(self, cache: int, compute: int) -> None:
        """Take memory for the weights of as many blocks as fit, with a cache of so many bytes for each and so much for the graphs.

        Raises OptionError if not even the head fits, OutOfMemory if the device has less than it may give.
        """
        *blocks, norm, head = self.weights.sizes
        self.sizes = Sizes(blocks, norm + head, cache, compute)
        placement = place(self.sizes, self.memory)
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
