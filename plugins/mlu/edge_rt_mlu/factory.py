"""Opens engines of the kind ``torch``. PyTorch is imported when a model is opened, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_rt.hooks import EngineOptions, NativeError, OptionError, Refusal
from edge_rt_mlu import adapters
from edge_rt_mlu.families import unsupported

if TYPE_CHECKING:
    from edge_rt.hooks import Engine, ModelFile


class TorchFactory:
    """llama-like models on the devices of ``adapters.ADAPTERS``.

    ``EngineOptions.extra``: ``torch.dtype`` is float16, bfloat16 or float32 (float16 on cards, float32 on the CPU);
    ``torch.import_timeout`` how many seconds importing the vendor's package may take (90).
    """

    name = "torch"

    def supports(self, model: ModelFile, options: EngineOptions) -> float | Refusal:
        """10 on MLU, 5 on Ascend, where ggml is the first choice, 0 (only when asked for by name) on the CPU; or why not."""
        adapter, _ = adapters.split(options.device)
        if adapter is None:
            known = ", ".join(adapters.ADAPTERS)
            return Refusal(f"the torch engine does not drive {options.device}", f"choose a device of another kind: {known}")
        if options.memory is not None:
            return Refusal("the torch engine holds all weights on the device", "leave --memory out")
        if options.key_type != "f16":
            return Refusal(f"the torch engine cannot cache keys as {options.key_type}", "use --key-type f16")
        if reason := unsupported(model):
            return Refusal(reason, "the llama_cpp engine runs it on the CPU")
        return adapters.missing(adapter) or adapter.score

    def open(self, model: ModelFile, options: EngineOptions) -> Engine:
        """Load the model onto the device; ``options.progress`` is told, and stops it by raising.

        Raises UnsupportedModel, ModelFileError, OptionError, OutOfMemory, and NativeError for a package or driver that does not work.
        """
        adapter, number = adapters.split(options.device)
        answer = self.supports(model, options)
        if adapter is None or isinstance(answer, Refusal):
            refusal = answer if isinstance(answer, Refusal) else Refusal(f"{options.device} is no device of the torch engine")
            raise OptionError(f"{refusal.reason}; {refusal.remedy}")
        count = adapters.tried(adapter, float(options.extra.get("torch.import_timeout", adapters.TIMEOUT)))
        if isinstance(count, Refusal):
            raise NativeError(f"{count.reason}; {count.remedy}")
        if number >= count:
            raise OptionError(f"PyTorch sees {count} {adapter.vendor} devices and no {options.device}; choose a lower number")
        from edge_rt_mlu.engine import TorchEngine  # NumPy and PyTorch load now, not at start-up

        return TorchEngine(model, options, adapter, number)
