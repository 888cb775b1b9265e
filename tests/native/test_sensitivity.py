"""Sensitivities are measured: a model as floats equals the engine, replaced weights come back, and predictions of divergence hold."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

import edge_rt
from edge_rt.cli.main import main
from edge_rt.core.engine import SequenceBatch
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.deploy import passes, sensitivity
from edge_rt.deploy import target as targets
from edge_rt.deploy.passes import Goals, Situation
from edge_rt.deploy.plan import Plan
from edge_rt.errors import OptionError
from edge_rt.testing.random_models import write_random_model

TOKENS = [(11 + 7 * i) % 300 for i in range(2 * sensitivity.PIECE)]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("edge_rt.core.ggml_engine.available_cpus", lambda: 1)  # other tests may run beside this one
    return write_random_model(
        tmp_path / "model.gguf", n_layer=3, n_embd=256, n_head=8, n_head_kv=2, n_ff=512, type="F16", tied=False, context=1024
    )


def test_the_model_as_floats_is_the_model(model: Path) -> None:
    with edge_rt.open(model, threads=1, context=256) as opened:
        (rows,) = opened.engine.step([SequenceBatch(opened.engine.new_sequence(), TOKENS[: sensitivity.PIECE], "all")])
        expected = np.array(rows)
    with ModelFile.open(model) as source, contextlib.closing(sensitivity.FloatModel(source, 1)) as floats:
        found = floats.distributions(TOKENS)[0]
    expected -= expected.max(1, keepdims=True)
    log_softmax = expected - np.log(np.exp(expected).sum(1, keepdims=True))
    assert np.abs(found - log_softmax).max() < 0.02


def test_replaced_weights_disturb_and_come_back(model: Path) -> None:
    with ModelFile.open(model) as source, contextlib.closing(sensitivity.FloatModel(source, 1)) as floats:
        reference = floats.distributions(TOKENS)
        assert floats.divergence(TOKENS, reference) == 0.0
        found = []
        for kind in ("Q8_0", "Q4_0"):
            with floats.replaced(("blk.1.ffn_down.weight", "blk.0.attn_q.weight"), kind):
                found.append(floats.divergence(TOKENS, reference))
            assert floats.divergence(TOKENS, reference) == 0.0
        assert 0 < found[0] < found[1] / 20


def test_groups_hold_every_matrix_once(model: Path) -> None:
    with ModelFile.open(model) as source:
        found = sensitivity.groups(source.header)
        names = [name for group in found for name in group.tensors]
        assert sorted(names) == sorted(name for name, info in source.header.tensors.items() if len(info.shape) > 1)
        assert all(source.header.tensors[name].shape[0] == group.width for group in found for name in group.tensors)


def test_mixed_types_of_the_same_bytes_diverge_less_than_uniform_ones(model: Path) -> None:
    with ModelFile.open(model) as source:
        measured = sensitivity.measure(source, TOKENS, passes.TYPES, 1)
        assert all(one.divergence["Q8_0"] < one.divergence["Q4_0"] for one in measured)
        situation = Situation(source.header, targets.load("x86-avx512"), Goals(), measured)
        plan = passes._apply_precision(Plan("x86-avx512"), situation)
        uniform = {name: "Q4_0" for one in measured for name in one.group.tensors}
        mixed = {name: plan.types.get(name, "F16") for name in uniform}
        shape = situation.shape(plan)
        assert shape.weights <= situation.shape(Plan("", types=uniform)).weights
        ours, theirs = (sensitivity.divergence(source, types, TOKENS, 1) for types in (mixed, uniform))
        assert ours < theirs
        assert plan.gains[0].quality == pytest.approx(ours, rel=0.5)  # what was predicted from parts
        assert passes._apply_precision(plan, situation._replace(sensitivities=())) == plan


def test_the_command_requantises_within_bytes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    words = ["compile", str(model), "--target", "rpi-5", "--calibration", str(text), "--output", str(out)]
    assert main([*words, "--weights", "1M"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("precision")
    with ModelFile.open(out / "model.gguf") as written, ModelFile.open(model) as source:
        assert sum(info.nbytes for info in written.header.tensors.values()) <= 1 << 20
        assert sum(info.nbytes for info in source.header.tensors.values()) > 2 << 20
    assert main([*words, "--weights", "1K"]) == 1
    assert "raise --weights" in capsys.readouterr().err
    assert main(words) == 1
    assert "--calibration is of use only with" in capsys.readouterr().err


def test_a_text_that_is_too_short_or_no_text_is_told(model: Path, tmp_path: Path) -> None:
    with ModelFile.open(model) as source:
        assert len(sensitivity.calibration(source)) == sensitivity.TOKENS
        (tmp_path / "short.txt").write_text("hello")
        with pytest.raises(OptionError, match="tokens; give one of"):
            sensitivity.calibration(source, tmp_path / "short.txt")
        (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(OptionError, match="give a text file in UTF-8"):
            sensitivity.calibration(source, tmp_path / "bytes.txt")
