"""Compiled models: the same logits from another file, by its own plan; checksums; and stock llama.cpp reads the GGUF."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import edge_rt
from edge_rt import deployment
from edge_rt.cli.main import main
from edge_rt.compiler import gguf_file, writer
from edge_rt.compiler import target as targets
from edge_rt.compiler.plan import Goals, Situation, built_in, decide
from edge_rt.core import sequences
from edge_rt.core.engine import SequenceBatch
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.deployment import Deployed, Plan
from edge_rt.errors import ModelFileError, OptionError
from edge_rt.testing.random_models import write_random_model

SIZES = {"n_layer": 3, "n_embd": 256, "n_head": 8, "n_head_kv": 2, "n_ff": 512, "context": 1024}
TOKENS = list(range(1, 90))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path / "cache"))
    # Which layout of values decodes faster is timed, and on a busy machine two runs may find otherwise: their bits then differ.
    monkeypatch.setattr(sequences, "autotune_v_layout", lambda *_: False)


def made(tmp_path: Path, **changes: object) -> Path:
    return write_random_model(tmp_path / "model.gguf", **{**SIZES, "type": "Q4_0", **changes})  # type: ignore[arg-type]


def compiled(path: Path, folder: Path, name: str = "x86-avx512", *, here: bool = True, goals: Goals = Goals()) -> Deployed:  # noqa: B008
    with ModelFile.open(path) as source:
        target = targets.load(name)
        return writer.write(source, target, decide(Situation(source.header, target, goals), built_in()), folder, here=here)


def logits(path: Path) -> np.ndarray:
    with edge_rt.open(path, threads=1, context=256) as model:
        sequence = model.engine.new_sequence()
        (rows,) = model.engine.step([SequenceBatch(sequence, TOKENS, "all")])
        before = np.array(rows)  # a copy: the next step writes where these are
        (last,) = model.engine.step([SequenceBatch(sequence, [7])])
        return np.concatenate([before, np.array(last)])


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"type": "Q4_1"}, {"type": "Q5_0"}, {"type": "F16", "tied": False}, {"architecture": "qwen2"},
        {"architecture": "qwen3moe", "n_ff": 256}, {"architecture": "deci", "n_layer": 2, "n_ff": (256, 512)},
    ],
    ids=["packed", "centred", "plain", "float", "biases", "experts", "widths"],
)  # fmt: skip
def test_the_logits_are_the_same_to_the_bit(tmp_path: Path, changes: dict[str, object]) -> None:
    path = made(tmp_path, **changes)
    deployed = compiled(path, tmp_path / "out")
    writer.verify(deployed)
    assert np.array_equal(logits(deployed.folder), logits(path))


def test_the_packed_weights_beside_the_model_are_used_wherever_the_directory_is(tmp_path: Path) -> None:
    deployed = compiled(made(tmp_path), tmp_path / "out")
    if "model.pack" not in deployed.files:
        pytest.skip("the library has no packed kernels here")
    copy = shutil.copytree(deployed.folder, tmp_path / "copy", copy_function=shutil.copyfile)  # without times
    with edge_rt.open(copy, threads=1, context=256) as model:
        assert any(unit.packed for unit in model.units())
        assert model.notices == []
    assert list((tmp_path / "cache" / "packed").glob("*.pack")) == []


def test_packed_weights_of_another_cpu_are_made_anew(tmp_path: Path) -> None:
    deployed = compiled(made(tmp_path), tmp_path / "out")
    pack = deployed.folder / "model.pack"
    pack.write_bytes(b"of another machine")
    before = logits(tmp_path / "model.gguf")
    assert np.array_equal(logits(deployed.folder), before)


def test_stock_llama_cpp_reads_the_file_and_the_metadata_is_kept(tmp_path: Path) -> None:
    path = made(tmp_path)
    deployed = compiled(path, tmp_path / "out")
    with ModelFile.open(path) as source, ModelFile.open(deployed.model) as written:
        assert written.header.alignment == deployed.plan.alignment
        assert tuple(written.header.tensors) == deployed.plan.order
        assert all(info.offset % deployed.plan.alignment == 0 for info in written.header.tensors.values())
        kept = [key for key in source.header if key != "general.alignment"]
        assert [key for key in written.header if key not in ("general.alignment", "edge_rt.target")] == kept
        assert all(written.header.get(key) == source.header.get(key) for key in kept)
        assert written.header.get("edge_rt.target") == "x86-avx512"
    with edge_rt.open(deployed.model, engine="llama_cpp", threads=1, context=256) as model:
        (rows,) = model.engine.step([SequenceBatch(model.engine.new_sequence(), TOKENS, "all")])
        assert np.abs(np.array(rows) - logits(path)[: len(TOKENS)]).max() < 0.05


def test_other_types_are_quantised_from_the_source(tmp_path: Path) -> None:
    path = made(tmp_path, type="F32")
    plan = Plan("x86-avx2", types={"blk.1.ffn_down.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_0", "token_embd.weight": "F16"})
    with ModelFile.open(path) as source, open(tmp_path / "other.gguf", "wb") as out:
        gguf_file.write_gguf(source, out, plan)
    with ModelFile.open(path) as source, ModelFile.open(tmp_path / "other.gguf") as other:
        for name, most in (("blk.1.ffn_down.weight", 0.01), ("blk.0.attn_q.weight", 0.15), ("token_embd.weight", 0.001)):
            assert other.header.tensors[name].type_name == plan.types[name]
            ours = np.concatenate(list(gguf_file.float_rows(other, other.header.tensors[name])))
            theirs = np.concatenate(list(gguf_file.float_rows(source, source.header.tensors[name])))
            error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            assert 0 < error < most
    with ModelFile.open(path) as source, open(tmp_path / "no.gguf", "wb") as out, pytest.raises(OptionError, match="there is no type Q3"):
        gguf_file.write_gguf(source, out, Plan("x", types={"blk.0.attn_q.weight": "Q3"}))


def test_the_plan_is_followed(tmp_path: Path) -> None:
    deployed = compiled(made(tmp_path, type="F32"), tmp_path / "out", goals=Goals(context=512))
    plan = deployed.plan._replace(chunk=64, threads=1, prefetch=1 << 20, locked=("blk.0", "head"))
    (deployed.folder / "plan.json").write_text(deployment.to_json(plan, deployed.files, deployed.provenance), encoding="utf-8")
    with edge_rt.open(deployed.folder) as model:
        assert model.info.chunk == 64
        assert model.info.max_context == 512
        assert model.engine._threads == 1  # type: ignore[attr-defined]
        prefetcher = model.engine._paging._prefetcher  # type: ignore[attr-defined]
        assert prefetcher.wait(20)
        wanted = sum(unit.size for unit in model.engine.units() if unit.name in plan.locked)  # type: ignore[attr-defined]
        assert prefetcher.locked in (0, wanted)  # 0: the system does not let this process lock so much
    # Prompts in other pieces are added up in another order.
    assert np.abs(logits(deployed.folder) - logits(tmp_path / "model.gguf")).max() < 0.05


def test_a_changed_or_missing_file_is_found(tmp_path: Path) -> None:
    deployed = compiled(made(tmp_path), tmp_path / "out", here=False)
    with open(deployed.model, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(ModelFileError, match="SHA-256 differs"):
        writer.verify(deployed)
    deployed.model.unlink()
    with pytest.raises(ModelFileError, match="is missing"):
        writer.verify(deployed)


def test_nothing_is_overwritten_but_what_was_compiled_before(tmp_path: Path) -> None:
    path = made(tmp_path)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(OptionError, match="was not made by edge-rt compile"):
        compiled(path, mine)
    assert (mine / "thesis.txt").read_text() == "years of work"
    first = compiled(path, tmp_path / "out", here=False)
    again = compiled(path, tmp_path / "out", "rpi-cm4", here=False)
    assert (first.plan.target, again.plan.target) == ("x86-avx512", "rpi-cm4")
    assert sorted(one.name for one in tmp_path.iterdir() if one.name.startswith(".")) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_gguf", full)
    with pytest.raises(OptionError, match="no space left on device; choose another --output"):
        compiled(path, tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model.gguf"]


def test_the_command_prints_what_each_pass_decided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = made(tmp_path), tmp_path / "out"
    assert main(["compile", str(path), "--target", "rpi-5", "--power", "6", "--output", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == str(out)
    assert [gain["by"] for gain in found["plan"]["gains"]] == ["fusion", "layout", "pipeline", "power"]
    assert found["predicted"]["tokens_per_second"] > 0
    assert main(["compile", str(path), "--target", "rpi-5", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("fusion")
    assert main(["run", "-m", str(out), "--raw", "-n", "4", "--temp", "0", "hello"]) == 0
    assert main(["compile", str(path), "--target", "rpi-6"]) == 1
    assert main(["compile", str(path), "--target", "rpi-5", "--power", "1", "--dry-run"]) == 1
