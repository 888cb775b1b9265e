"""The engine ``llama_cpp``: libllama's own loader, graphs and cache, for every architecture edge-rt has no graph for.

It is the fallback: its score is the lowest, and it also runs where edge-rt's own bindings refuse the installed library, because
llama-cpp-python's bindings always fit the library they come with.

One cache is shared by all sequences (libllama's unified cache, of ``context`` cells): memory is paid for once, a fork copies nothing,
and one sequence may use all of it. In return sequences that together outgrow it get OutOfMemory, with nothing changed.
``EngineOptions.extra["llama_cpp.sequences"]`` is how many may be open at once (default 16).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_rt.hooks import Engine, EngineFactory, EngineOptions, Refusal, hookimpl

if TYPE_CHECKING:
    from edge_rt.hooks import ModelFile

EDGE_RT_API = 1

# Parts of the names of architectures that libllama loads and that write no text.
_NOT_GENERATIVE = ("bert", "t5", "clip", "wavtokenizer")


class LlamaCpp:
    """Opens engines on libllama."""

    name = "llama_cpp"

    def supports(self, model: ModelFile, options: EngineOptions) -> float | Refusal:
        """Always the lowest score: only libllama itself knows, when it opens the file, which architectures it has."""
        if any(part in model.header.architecture for part in _NOT_GENERATIVE):
            return Refusal(f"{model.header.architecture} models do not generate text", "use a decoder model")
        if options.device != "cpu":
            return Refusal(f"it runs on the CPU, not on {options.device}", "choose --device cpu")
        if options.memory is not None:
            return Refusal("libllama cannot limit the memory of weights", "leave --memory out")
        if options.compensation is not None:
            return Refusal("llama.cpp applies no compensation", "give --compensation off to run without it")
        return 1.0

    def open(self, model: ModelFile, options: EngineOptions) -> Engine:
        """Load the model and make a cache.

        Raises OptionError, UnsupportedModel if libllama does not know the architecture or a tensor type, OutOfMemory, NativeError,
        and what ``options.progress`` raises to stop.
        """
        from edge_rt.plugins.llama_cpp.engine import open_engine  # NumPy and the native library load now, not at start-up

        return open_engine(model, options)


@hookimpl
def edge_rt_engines() -> list[EngineFactory]:
    """One engine, ``llama_cpp``."""
    return [LlamaCpp()]
