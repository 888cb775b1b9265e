"""Opens engines of the kind ``torch``. PyTorch is imported when a model is opened, not before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.hooks import EngineOptions, NativeError, OptionError, Refusal, UnsupportedModel
from edge_rt_mlu import adapters
from edge_rt_mlu.families import unsupported
from edge_rt_mlu.placement import SIZES, place

if TYPE_CHECKING:
    from edge_rt.hooks import Engine, ModelFile


class TorchFactory:
    """llama-like models on the devices of ``adapters.ADAPTERS``.

    ``EngineOptions.extra``: ``torch.dtype`` is float16, bfloat16 or float32 (float16 on cards, float32 on the CPU);
    ``torch.import_timeout`` how many seconds importing the vendor's package may take (90).
    """

    name = "torch"

    def __init__(self, root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> None:
        """``root`` of /dev and the environment, by which Ascend's cards are numbered."""
        self._root, self._environment = root, environment

    def supports(self, model: ModelFile, options: EngineOptions) -> float | Refusal:
        """10 on MLU, 5 on Ascend, where ggml is the first choice, 0 (only when asked for by name) on the CPU; or why not."""
        adapter, _ = adapters.split(options.device)
        if adapter is None:
            known = ", ".join(adapters.ADAPTERS)
            return Refusal(f"the torch engine does not drive {options.device}", f"choose a device of another kind: {known}")
        if options.key_type != "f16":
            return Refusal(f"the torch engine cannot cache keys as {options.key_type}", "use --key-type f16")
        if options.limits is not None:
            return Refusal("the torch engine holds no limits of power or temperature", "leave --power and --celsius out")
        if options.compensation is not None:
            return Refusal("the torch engine applies no compensation", "give --compensation off to run without it")
        if reason := unsupported(model):
            return Refusal(reason, "the llama_cpp engine runs it on the CPU")
        try:
            place(model, SIZES.get(str(options.extra.get("torch.dtype")), SIZES[adapter.dtype]), options.memory, whole=not adapter.package)
        except OptionError as error:
            reason, _, remedy = str(error).partition("; ")
            return Refusal(reason, remedy)
        return adapters.missing(adapter) or adapter.score

    def open(self, model: ModelFile, options: EngineOptions) -> Engine:
        """Load the model onto the device; ``options.progress`` is told, and stops it by raising.

        Raises UnsupportedModel, ModelFileError, OptionError, OutOfMemory, and NativeError for a package or driver that does not work.
        """
        if reason := unsupported(model):
            raise UnsupportedModel(f"{reason}; run it with --engine llama_cpp")
        adapter, number = adapters.split(options.device)
        answer = self.supports(model, options)
        if adapter is None or isinstance(answer, Refusal):
            refusal = answer if isinstance(answer, Refusal) else Refusal(f"{options.device} is no device of the torch engine")
            raise OptionError(f"{refusal.reason}; {refusal.remedy}")
        count = adapters.tried(adapter, _import_timeout(options))
        if isinstance(count, Refusal):
            raise NativeError(f"{count.reason}; {count.remedy}")
        number = adapters.number_in_torch(adapter, number, self._root, self._environment)
        if number >= count:
            raise OptionError(f"PyTorch sees {count} {adapter.vendor} devices and no {options.device}; choose a lower number")
        from edge_rt_mlu.engine import TorchEngine  # NumPy and PyTorch load now, not at start-up

        return TorchEngine(model, options, adapter, number)


def _import_timeout(options: EngineOptions) -> float:
    """Seconds. Raises OptionError."""
    asked = options.extra.get("torch.import_timeout", adapters.TIMEOUT)
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 < asked < 86400:
        raise OptionError(f"torch.import_timeout is {asked!r}; give a number of seconds")
    return float(asked)
