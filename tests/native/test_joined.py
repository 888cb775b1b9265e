"""Weights that share their input and lie side by side are one matrix; those that do not stay apart, and no bit depends on it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_rt.core.engine import SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.hooks import EngineOptions
from edge_rt.native import ggml

QKV = tuple(f"blk.1.attn_{part}.weight" for part in "qkv")
GATE_UP = ("blk.1.ffn_gate.weight", "blk.1.ffn_up.weight")


@pytest.fixture(params=["Q4_0", "Q8_0", "F32"])
def model(request: pytest.FixtureRequest, random_model: Callable[..., Path]) -> Path:
    return random_model("llama", type=request.param, n_embd=128)


def test_what_lies_side_by_side_is_one_matrix(model: Path) -> None:
    with ModelFile.open(model) as file, closing(GgmlEngine(file, EngineOptions(threads=2, context=64))) as opened:
        for names in (QKV, GATE_UP):
            joined = opened.weights.joined(names)
            assert joined is not None
            parts = [ggml.fields(opened.weights.require(name)) for name in names]
            assert ggml.fields(joined).ne[1] == sum(part.ne[1] for part in parts)
            assert ggml.fields(joined).data == parts[0].data
            assert opened.weights.joined(names) == joined, "made once"


@pytest.mark.parametrize("names", [QKV[::-1], (QKV[0], QKV[2]), ("blk.0.ffn_up.weight", "blk.1.ffn_gate.weight"), ("no", "such")])
def test_what_does_not_stays_apart(model: Path, names: tuple[str, ...]) -> None:
    with ModelFile.open(model) as file, closing(GgmlEngine(file, EngineOptions(threads=2, context=64))) as opened:
        assert opened.weights.joined(names) is None


def test_no_bit_depends_on_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Any]:
        with ModelFile.open(model) as file, closing(GgmlEngine(file, EngineOptions(threads=2, context=64))) as opened:
            sequence = opened.new_sequence()
            fed = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [12], [13, 14]]
            return [np.array(opened.step([SequenceBatch(sequence, tokens, "all")])[0]) for tokens in fed]

    together = run()
    monkeypatch.setattr("edge_rt.core.weights.store.WeightStore.joined", lambda _self, _names: None)
    for one, other in zip(together, run(), strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))
