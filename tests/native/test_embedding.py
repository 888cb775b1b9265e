"""Token embeddings as the model file has them, whatever their element type."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest

from edge_rt.core.engine import EmbedsTokens
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.errors import OptionError
from edge_rt.hooks import EngineOptions


@pytest.mark.parametrize("type_", ["F32", "F16", "Q8_0", "Q4_0"])
def test_rows_of_the_file(random_model: Callable[..., Path], type_: str) -> None:
    path = random_model("llama", type=type_, n_embd=128)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    with ModelFile.open(path) as file, closing(GgmlEngine(file, EngineOptions(threads=1, context=64))) as engine:
        assert isinstance(engine, EmbedsTokens)
        found = engine.token_embeddings([5, 0, 5, 17])
        np.testing.assert_allclose(found, expected[[5, 0, 5, 17]], rtol=1e-5, atol=1e-6)
        with pytest.raises(OptionError):
            engine.token_embeddings([engine.info.n_vocab])
