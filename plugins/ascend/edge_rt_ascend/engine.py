"""The engine ``ggml_cann``: edge-rt's own graphs, with as many blocks of a model on the NPU as its free memory holds."""

from __future__ import annotations

from collections.abc import Callable

from edge_rt.hooks import (
    Accelerator,
    Engine,
    EngineOptions,
    ModelFile,
    OptionError,
    OutOfMemory,
    Refusal,
    ggml_unsupported,
    open_ggml_engine,
)
from edge_rt_ascend.device import AscendDevice

RESERVED = 1 << 30
"""Bytes of an NPU that are left: CANN's own, and the work space that its operators take."""
PATIENCE = 10.0
"""Seconds to wait for npu-smi when a model is opened, which takes longer anyway."""
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
"""Element types that the backend multiplies (docs/backend/CANN.md)."""


class CannFactory:
    """Opens models on the device that was chosen, ``ascend:N``."""

    name = "ggml_cann"

    def __init__(self, device: Callable[[int], AscendDevice] = AscendDevice) -> None:
        self._device = device

    def supports(self, model: ModelFile, options: EngineOptions) -> float | Refusal:
        """20, or why not: an architecture without a graph, or weights of a type that the backend cannot multiply."""
        if not options.device.startswith("ascend:"):
            return Refusal(f"it drives Ascend NPUs, not {options.device}", "choose --device ascend:0")
        if reason := ggml_unsupported(model):
            return Refusal(reason, "run it with --device cpu")
        tensors = model.header.tensors
        untied = "output.weight" in tensors  # else the embedding is the head, too
        matrices = (info for info in tensors.values() if len(info.shape) > 1 and not (untied and info.name == "token_embd.weight"))
        strange = next((info for info in matrices if info.type_name not in TYPES), None)
        if strange:
            return Refusal(f"CANN has no kernel for {strange.type_name} ({strange.name})", "convert the model to Q4_0 or Q8_0")
        if options.key_type != "f16":
            return Refusal(f"CANN cannot keep keys as {options.key_type}", "leave --key-type out")
        return 20.0

    def open(self, model: ModelFile, options: EngineOptions) -> Engine:
        """Open the model; ``ggml_cann.memory`` in ``extra`` limits the bytes that it takes of the NPU.

        Raises OutOfMemory if the NPU is full, OptionError if not even the model's head fits, NativeError if the driver does not answer,
        UnsupportedModel if CANN has no kernel for a part of the model.
        """
        device = self._device(int(options.device.partition(":")[2]))
        index, free = device.index(), device.free(PATIENCE)
        memory = _limited(free - RESERVED, options.extra.get("ggml_cann.memory"))
        if memory <= 0:
            reserved = f"{RESERVED >> 20} of them are CANN's"
            raise OutOfMemory(f"{options.device} has {free >> 20} MB free, and {reserved}; close other programs that use it")
        return open_ggml_engine(model, options, accelerator=Accelerator("CANN", memory, index), name=self.name)


def _limited(free: int, asked: object) -> int:
    if asked is None:
        return free
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        raise OptionError(f"ggml_cann.memory is {asked!r}; give a number of bytes")
    return min(free, asked)
