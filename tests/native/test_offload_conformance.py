"""The ggml engine keeps what the protocol promises with blocks on an accelerator, too: all of them, and some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.weights.gpu_offload import Accelerator
from edge_rt.hooks import Engine, EngineOptions, open_ggml_engine
from edge_rt.testing.conformance import EngineConformance


class _Factory:
    """Opens models with the last blocks on the simulated accelerator."""

    name = "ggml_sim"

    def __init__(self, memory: int) -> None:
        self._memory = memory

    def supports(self, model: ModelFile, options: EngineOptions) -> float:
        return 10.0

    def open(self, model: ModelFile, options: EngineOptions) -> Engine:
        return open_ggml_engine(model, options, accelerator=Accelerator("SIM", self._memory), name=self.name)


class _Offloaded(EngineConformance):
    tolerance = 5e-3
    architecture = "llama"
    memory = 1 << 28

    @pytest.fixture
    def engine_factory(self, simulator: str) -> _Factory:
        return _Factory(self.memory)

    @pytest.fixture
    def model(self, random_model: Callable[..., Path]) -> Iterator[ModelFile]:
        with ModelFile.open(random_model(self.architecture)) as model:
            yield model


class TestAllBlocks(_Offloaded):
    pass


class TestSomeBlocks(_Offloaded):
    options = EngineOptions(context=640, threads=1, pack=False)

    @pytest.fixture
    def engine_factory(self, simulator: str, model: ModelFile) -> _Factory:
        engine = open_ggml_engine(model, self.options, accelerator=Accelerator("SIM", self.memory))
        sizes = engine._offloaded.sizes  # type: ignore[union-attr]
        engine.close()
        # Room for one block, and what the tests put there beside: adapters, many sequences.
        factory = _Factory(sizes.head + sizes.compute + sizes.blocks[-1] + sizes.cache + sizes.blocks[0])
        opened = factory.open(model, self.options)
        assert opened.info.offloaded == ("blk.1", "norm", "head")
        opened.close()
        return factory


class TestExperts(_Offloaded):
    architecture = "qwen3moe"
