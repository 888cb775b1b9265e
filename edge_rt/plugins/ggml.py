"""The engine ``ggml``: edge-rt's own graphs on libggml. Preferred wherever it has a graph for the model."""

from __future__ import annotations

from collections.abc import Iterable

from edge_rt.hooks import Engine, EngineFactory, EngineOptions, ModelFile, Refusal, ggml_unsupported, hookimpl, open_ggml_engine

EDGE_RT_API = 1


class GgmlFactory:
    """Opens models whose architecture has a graph in edge_rt/core/graph."""

    name = "ggml"

    def supports(self, model: ModelFile, options: EngineOptions) -> float | Refusal:
        """10, or why there is no graph."""
        reason = ggml_unsupported(model)
        return Refusal(reason, "the llama_cpp engine runs it") if reason else 10.0

    def open(self, model: ModelFile, options: EngineOptions) -> Engine:
        """Open the model. Raises AbiMismatch if the installed libggml is another than this version knows."""
        return open_ggml_engine(model, options)


@hookimpl
def edge_rt_engines() -> Iterable[EngineFactory]:
    """One engine."""
    return [GgmlFactory()]
