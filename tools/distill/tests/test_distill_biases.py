"""Biases in the model file itself: what stock llama.cpp adds is what the side file would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edge_rt_distill.compensate.choose import Result
from edge_rt_distill.compensate.correction import Compensation, Correction
from edge_rt_distill.compensate.cost import Budget
from edge_rt_distill.export import export
from edge_rt_distill.model.load import load, read_gguf
from edge_rt_distill.run.corrected import write_corrected

import edge_rt
from edge_rt.errors import OptionError, UnsupportedModel
from edge_rt.testing.random_models import write_random_model


def result(compensation: Compensation) -> Result:
    """As if these corrections had been chosen."""
    return Result(compensation, {}, [], 1.0, 1.0, 1.0, 0, 0.0, Budget(0, 0.0), [])


def test_stock_llama_cpp_adds_what_the_side_file_would(tiny, tmp_path):
    teacher = load(tiny)
    torch.manual_seed(0)
    sites = {"blk.0.attn_q": 64, "blk.0.ffn_down": 64, "blk.1.attn_output": 64, "blk.1.ffn_up": 128}
    made = result({site: Correction(bias=torch.randn(size)) for site, size in sites.items()})
    plain = export(tmp_path / "plain.gguf", teacher.model, teacher.tokeniser, matrices="F32", embedding="F32")
    write_corrected(plain, tmp_path / "own.gguf", made, teacher.tokeniser, {}, biases_in_model=True)
    write_corrected(plain, tmp_path / "beside.gguf", made, teacher.tokeniser, {})
    assert [path.name for path in sorted(tmp_path.glob("*.compensation.gguf"))] == ["beside.compensation.gguf"]
    found = []
    for name, engine in (("own", "ggml"), ("own", "llama_cpp"), ("beside", "ggml"), ("plain", "ggml")):
        with edge_rt.open(tmp_path / f"{name}.gguf", engine=engine, pack=False) as running:
            found.append(running.logits([5, 17, 99, 3, 42]))
    own, stock, beside, without = found
    assert np.abs(own - stock).max() < 1e-3 * np.abs(own).max()
    assert np.array_equal(own, beside)
    assert np.abs(own - without).max() > 0.1 * np.abs(without).max()


def test_biases_that_llama_cpp_would_not_read_are_refused(tiny, tmp_path):
    teacher = load(tiny)
    with pytest.raises(OptionError, match=r"no matrix for blk\.9\.ffn_up\.bias"):
        export(tmp_path / "x.gguf", teacher.model, teacher.tokeniser, biases={"blk.9.ffn_up.bias": torch.ones(128)})
    qwen = load(write_random_model(tmp_path / "qwen.gguf", "qwen2", type="F32"))
    with pytest.raises(UnsupportedModel, match=r"reads no blk\.0\.ffn_down\.bias of a qwen2"):
        export(tmp_path / "x.gguf", qwen.model, qwen.tokeniser, biases={"blk.0.ffn_down.bias": torch.ones(64)})
    added = export(tmp_path / "x.gguf", qwen.model, qwen.tokeniser, matrices="F32", biases={"blk.0.attn_q.bias": torch.ones(64)})
    assert torch.equal(read_gguf(added).layers[0].attn_q.bias, qwen.model.layers[0].attn_q.bias + 1)
