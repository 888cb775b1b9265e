"""Compensation through the runtime: found beside the model, never silently left out, and what was computed with it kept apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_rt
from edge_rt.cli import main
from edge_rt.compiler import folding, writer
from edge_rt.compiler import target as targets
from edge_rt.compiler.plan import Goals, Situation, built_in, decide
from edge_rt.core import sequences
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.weights.error_correction import SUFFIX, compensation_fingerprint, open_compensation
from edge_rt.errors import ModelFileError, OptionError, SessionMismatch, UnsupportedModel
from edge_rt.plugin_host.registry import Registry
from edge_rt.testing.null_device import NullPlugin
from edge_rt.testing.random_models import write_random_compensation, write_random_model

TOKENS = list(range(20, 60))


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which layout of values decodes faster is timed, and on a busy machine two runs may find otherwise: their bits then differ."""
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sequences, "autotune_v_layout", lambda *_: False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a compensation beside it."""
    return compensated(write_random_model(tmp_path / "model.v1.gguf", "llama", type="Q4_0", n_embd=128))


def compensated(path: Path, **measures: Any) -> Path:
    with ModelFile.open(path) as file:
        write_random_compensation(path.with_name(path.name.removesuffix(".gguf") + SUFFIX), file, **measures)
    return path


def side_of(model: Path) -> Path:
    return model.with_name("model.v1.compensation.gguf")


def logits(path: Path, **options: Any) -> Any:
    with edge_rt.open(path, threads=1, **options) as opened:
        return np.array(opened.logits(TOKENS))


def test_it_is_applied_unless_it_is_off_and_both_can_be_open(model: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copy(model, tmp_path / "elsewhere.gguf")
    plain = logits(elsewhere)
    with edge_rt.open(model, threads=1) as auto, edge_rt.open(model, compensation="off", threads=1) as off:
        assert off.compensation is None
        assert auto.compensation is not None
        assert auto.compensation.facts == {
            "path": str(side_of(model)), "sites": 14, "low_rank": 14, "tables": 14, "biases": 14,
            "bytes": sum(info.nbytes for info in tensors_of(side_of(model))),
        }  # fmt: skip
        corrected = np.array(auto.logits(TOKENS))
        np.testing.assert_array_equal(np.array(off.logits(TOKENS)), plain)
        assert np.abs(corrected - plain).max() > 0.5
        assert auto.memory().weights_mapped > off.memory().weights_mapped
    np.testing.assert_array_equal(logits(elsewhere, compensation=side_of(model)), corrected)
    with edge_rt.open(elsewhere) as opened:
        assert opened.compensation is None


def tensors_of(path: Path) -> list[Any]:
    with ModelFile.open(path) as file:
        return list(file.header.tensors.values())


def damage_other_model(side: Path) -> str:
    other = write_random_model(side.with_name("other.gguf"), "llama", type="Q4_0", n_embd=128, seed=9)
    compensated(other)
    side.with_name("other" + SUFFIX).replace(side)
    return "made for other weights than this model's; make it again for this file"


def damage_cut(side: Path) -> str:
    side.write_bytes(side.read_bytes()[:-1000])
    return "ends beyond|cut short|lies beyond"


def damage_empty(side: Path) -> str:
    side.write_bytes(b"")
    return "is empty"


def damage_link(side: Path) -> str:
    side.unlink()
    side.symlink_to("nowhere.gguf")
    return "does not exist"


@pytest.mark.parametrize("damage", [damage_other_model, damage_cut, damage_empty, damage_link])
def test_one_that_cannot_be_used_is_an_error_with_a_way_out(damage: Callable[[Path], str], model: Path) -> None:
    said = damage(side_of(model))
    with pytest.raises(ModelFileError, match=said) as caught:
        edge_rt.open(model)
    assert str(caught.value).startswith(str(side_of(model)))
    assert str(caught.value).endswith(", or run without it by --compensation off")
    assert logits(model, compensation="off").std() > 0


def test_a_file_that_is_asked_for_must_be_there(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        edge_rt.open(model, compensation=tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="this is no compensation"):
        edge_rt.open(model, compensation=model)
    with pytest.raises(ModelFileError, match="this is the compensation of a model and no model"):
        edge_rt.open(side_of(model))


def test_engines_that_apply_none_are_refused(model: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"llama.cpp applies no compensation.*--compensation off"):
        edge_rt.open(model, engine="llama_cpp")
    with edge_rt.open(model, engine="llama_cpp", compensation="off") as opened:
        assert opened.info.engine == "llama_cpp"
    with pytest.raises(OptionError, match=r"the engine null applies no compensation.*--compensation off"):
        edge_rt.open(model, engine="null", device="null", registry=Registry.load(plugins={"null": NullPlugin()}))


def test_a_session_belongs_to_model_and_compensation(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.session"
    with edge_rt.open(model, threads=1) as opened:
        with opened.session() as session:
            for _ in session.generate("once upon a time", max_tokens=4, temperature=0):
                pass
            session.save(saved)
            expected = "".join(getattr(e, "text", "") for e in session.generate("once upon a time there", max_tokens=8, temperature=0))
        with opened.restore(saved) as session:
            again = "".join(getattr(e, "text", "") for e in session.generate("once upon a time there", max_tokens=8, temperature=0))
        assert again == expected
    with edge_rt.open(model, compensation="off") as opened, pytest.raises(SessionMismatch):
        opened.restore(saved)
    compensated(model, seed=1)
    with edge_rt.open(model) as opened, pytest.raises(SessionMismatch):
        opened.restore(saved)


# ---- compiled --------------------------------------------------------------------------------------------------------


def compile_to(folder: Path, model: Path, *options: str) -> int:
    return main.main(["compile", str(model), "--target", "rpi-5", "--output", str(folder), *options])


@pytest.fixture
def compiled(model: Path, tmp_path: Path) -> Path:
    assert compile_to(tmp_path / "out", model) == 0
    return tmp_path / "out"


def test_a_compiled_model_brings_its_compensation_along(model: Path, compiled: Path) -> None:
    with ModelFile.open(model) as source, ModelFile.open(compiled / "model.gguf") as written:
        assert (source.header.alignment, written.header.alignment) == (32, 4096)
        assert compensation_fingerprint(source) == compensation_fingerprint(written)
    assert "model.compensation.gguf" in json.loads((compiled / "plan.json").read_text())["files"]
    with edge_rt.open(compiled, threads=1) as opened:
        assert opened.compensation is not None
    np.testing.assert_allclose(logits(compiled, pack=False), logits(model, pack=False), atol=2e-2, rtol=2e-2)
    assert np.abs(logits(compiled, compensation="off") - logits(compiled)).max() > 0.5


def test_a_compiled_model_that_lost_its_compensation_says_so(compiled: Path) -> None:
    (compiled / "model.compensation.gguf").unlink()
    with pytest.raises(ModelFileError, match=r"model.compensation.gguf does not exist.*--compensation off"):
        edge_rt.open(compiled)
    logits(compiled, compensation="off")


def test_other_types_leave_the_compensation_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = compensated(write_random_model(tmp_path / "model.v1.gguf", "llama", type="F16", n_embd=128, n_ff=256))
    (tmp_path / "text.txt").write_text("once upon a time there was a small house in the wood " * 40)
    weights = f"{int(model.stat().st_size * 0.8 / 1024)}K"
    assert compile_to(tmp_path / "small", model, "--weights", weights, "--calibration", str(tmp_path / "text.txt")) == 0
    assert "is left out, as" in capsys.readouterr().err
    assert not (tmp_path / "small" / "model.compensation.gguf").exists()
    logits(tmp_path / "small")
    assert compile_to(tmp_path / "off", model, "--compensation", "off") == 0
    assert not (tmp_path / "off" / "model.compensation.gguf").exists()


def test_norms_are_not_multiplied_into_weights_whose_inputs_a_compensation_knows(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.v1.gguf", "llama", type="F32")
    with open(path, "r+b") as file, ModelFile.open(path) as source:  # all scales of one norm are two
        info = source.header.tensors["blk.0.attn_norm.weight"]
        file.seek(info.offset)
        file.write(np.full(info.shape, 2, "<f4").tobytes())
    with ModelFile.open(path) as source:
        found = folding.norms(source)
        assert any(not norm.ones and not norm.lacks for norm in found), "one could be folded, or this test shows nothing"
        target = targets.load("rpi-5")
        plan = decide(Situation(source.header, target, Goals(), (), found), built_in())
        side = open_compensation(write_random_compensation(tmp_path / "side.gguf", source), source)
        with side.file:
            with pytest.raises(ModelFileError, match="made for other weights"):
                writer.write(source, target, plan, tmp_path / "folded", here=False, compensation=side)
            kept = decide(Situation(source.header, target, Goals(), (), folding.kept_for_compensation(found)), built_in())
            assert kept.folded == ()
            writer.write(source, target, kept, tmp_path / "kept", here=False, compensation=side)
    assert not (tmp_path / "folded").exists()
    with edge_rt.open(tmp_path / "kept") as opened:
        assert opened.compensation is not None


# ---- what a person sees ----------------------------------------------------------------------------------------------


def test_inspect_shows_it_and_what_is_wrong_with_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["inspect", str(model)]) == 0
    assert "at 14 weights: 14 low-rank terms, 14 tables, 14 biases" in capsys.readouterr().out
    assert main.main(["inspect", str(side_of(model))]) == 0
    assert "corrects 14 weights; run the model that it lies beside" in capsys.readouterr().out
    damage_other_model(side_of(model))
    assert main.main(["inspect", "--json", str(model)]) == 0
    found = json.loads(capsys.readouterr().out)["compensation"]
    assert "made for other weights" in found["problem"]


def test_run_says_what_it_ran_with(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "-v", "-m", str(model), "-n", "2", "--raw", "once"]) == 0
    assert "with model.v1.compensation.gguf at 14 products" in capsys.readouterr().err
    assert main.main(["run", "-v", "-m", str(model), "-n", "2", "--raw", "--compensation", "off", "once"]) == 0
    assert "compensation" not in capsys.readouterr().err
    assert main.main(["run", "-m", str(model), "--engine", "llama_cpp", "--raw", "once"]) == 1
    assert "--compensation off" in capsys.readouterr().err
