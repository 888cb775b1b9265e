"""The engine ``ggml_cuda``: edge-rt's own graphs, with as many blocks of a model on the card as its free memory holds."""

from __future__ import annotations

from edge_rt.hooks import (
    Accelerator,
    Engine,
    EngineOptions,
    ModelFile,
    NativeError,
    OptionError,
    OutOfMemory,
    Refusal,
    ggml_unsupported,
    open_ggml_engine,
)
from edge_rt_cuda.device import SECONDS, _nvml
from edge_rt_cuda.nvml import Nvml, Unavailable

RESERVED = 512 << 20
"""Bytes of a card that are left: the CUDA runtime's own, cuBLAS's work space, and the temporary buffers of ggml's kernels."""


class CudaFactory:
    """Opens models on the device that was chosen, ``cuda:N``."""

    name = "ggml_cuda"

    def __init__(self, nvml: Nvml = _nvml) -> None:
        self._nvml = nvml

    def supports(self, model: ModelFile, options: EngineOptions) -> float | Refusal:
        """20, or why not."""
        if not options.device.startswith("cuda:"):
            return Refusal(f"it drives NVIDIA cards, not {options.device}", "choose --device cuda:0")
        reason = ggml_unsupported(model)
        return Refusal(reason, "run it with --device cpu") if reason else 20.0

    def open(self, model: ModelFile, options: EngineOptions) -> Engine:
        """Open the model; ``ggml_cuda.memory`` in ``extra`` limits the bytes that it takes of the card.

        Raises OutOfMemory if the card is full, OptionError if not even the model's head fits or CUDA does not see the card, NativeError if
        the driver does not answer, UnsupportedModel if CUDA has no kernel for a part of the model.
        """
        index = int(options.device.partition(":")[2])
        try:
            card, free = self._nvml.card(index, 4 * SECONDS), self._nvml.free(index, 4 * SECONDS)
        except Unavailable as error:
            raise NativeError(f"{options.device} cannot be used: {error}") from error
        memory = _limited(free - RESERVED, options.extra.get("ggml_cuda.memory"))
        if memory <= 0:
            reserved = f"{RESERVED >> 20} of them are the driver's"
            raise OutOfMemory(f"{options.device} has {free >> 20} MB free, and {reserved}; close other programs that use it")
        return open_ggml_engine(model, options, accelerator=Accelerator("CUDA", memory, index, card.bus), name=self.name)


def _limited(free: int, asked: object) -> int:
    if asked is None:
        return free
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        raise OptionError(f"ggml_cuda.memory is {asked!r}; give a number of bytes")
    return min(free, asked)
