"""The ggml engine keeps what the protocol promises, on every architecture it has a graph for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.hooks import EngineOptions
from edge_rt.plugins.ggml import GgmlFactory
from edge_rt.testing.conformance import EngineConformance


class _Ggml(EngineConformance):
    architecture = "llama"
    # Parts longer than a few tokens go through another attention kernel, with F16 sums.
    tolerance = 5e-3

    @pytest.fixture
    def engine_factory(self) -> GgmlFactory:
        return GgmlFactory()

    @pytest.fixture
    def model(self, random_model: Callable[..., Path]) -> Iterator[ModelFile]:
        with ModelFile.open(random_model(self.architecture)) as model:
            yield model


class TestLlama(_Ggml):
    pass


class TestYarn(_Ggml):
    @pytest.fixture
    def model(self, random_model: Callable[..., Path]) -> Iterator[ModelFile]:
        scaling = {"type": "yarn", "factor": 4.0, "original_context": 128}
        with ModelFile.open(random_model("llama", rope_scaling=scaling)) as model:
            yield model


class TestTransposedValues(_Ggml):
    options = EngineOptions(context=640, threads=1, extra={"ggml.transposed_values": True})


class TestQwen2(_Ggml):
    architecture = "qwen2"


class TestQwen3(_Ggml):
    architecture = "qwen3"


class TestQwen3Moe(_Ggml):
    architecture = "qwen3moe"


class TestPackedWeightsAndQuantisedKeys(_Ggml):
    options = EngineOptions(context=640, threads=1, key_type="q8_0")
    tolerance = 5e-2

    @pytest.fixture
    def model(self, random_model: Callable[..., Path]) -> Iterator[ModelFile]:
        with ModelFile.open(random_model("llama", type="Q4_0", n_embd=128)) as model:
            yield model
