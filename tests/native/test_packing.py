"""Packed weights: made once, mapped after, made again when stale or damaged, and never a reason not to run."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from reference import Reference

from edge_rt import config
from edge_rt.core.engine import SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.weights import repack
from edge_rt.core.weights.repack import PackDamaged, PackedFile
from edge_rt.hooks import EngineOptions
from edge_rt.native import ggml

LAYOUTS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in repack.layouts(), reason="this CPU has no such layout"))
    for name in repack.LAYOUTS
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(random_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of its own, so that a test may alter it."""
    copy = tmp_path / "model.gguf"
    copy.write_bytes(random_model("llama", type="Q4_0", n_embd=128).read_bytes())
    return copy


def packs() -> list[Path]:
    return sorted(config.packed_dir().glob("*.pack"))


def run(model: Path, progress: Any = None) -> tuple[Any, list[str]]:
    """Open, feed five tokens; logits and notices."""
    with ModelFile.open(model) as file, closing(GgmlEngine(file, EngineOptions(threads=1, context=64, progress=progress))) as engine:
        (logits,) = engine.step([SequenceBatch(engine.new_sequence(), [1, 2, 3, 4, 5], "all")])
        return np.array(logits), engine.notices


def packing_steps(seen: list[tuple[str, int, int]]) -> int:
    return sum(phase == "packing" for phase, _, _ in seen)


def test_packed_once_then_only_mapped(model: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    first, _ = run(model, lambda *step: seen.append(step))
    assert packing_steps(seen) > 0
    assert [step for step in seen if step[0] == "packing"][-1][1] > 0
    assert len(packs()) == 1
    seen.clear()
    second, _ = run(model, lambda *step: seen.append(step))
    assert packing_steps(seen) == 0
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("cut", [0, 5, 20, 200, -1, -5000])
def test_a_cut_pack_is_made_again(model: Path, cut: int) -> None:
    first, _ = run(model)
    (pack,) = packs()
    data = pack.read_bytes()
    pack.write_bytes(data[:cut])
    second, notices = run(model)
    np.testing.assert_array_equal(first, second)
    assert notices == []
    assert pack.read_bytes() == data


def test_a_flipped_header_byte_makes_it_again(model: Path) -> None:
    run(model)
    (pack,) = packs()
    good = pack.read_bytes()
    for position in (0, 9, 13, 40):
        bad = bytearray(good)
        bad[position] ^= 0xFF
        pack.write_bytes(bytes(bad))
        run(model)
        assert pack.read_bytes() == good


def test_verify_finds_a_flipped_data_byte(model: Path) -> None:
    run(model)
    (pack,) = packs()
    with ModelFile.open(model) as file, closing(PackedFile(pack, repack.cache_key(file))) as sound:
        sound.verify()
        entry = sound.entries[len(sound.entries) // 2]
        position = sound.data_offset + entry.offset + entry.nbytes // 2
    data = bytearray(pack.read_bytes())
    data[position] ^= 1
    pack.write_bytes(bytes(data))
    with ModelFile.open(model) as file:
        damaged = PackedFile(pack, repack.cache_key(file))
    with closing(damaged), pytest.raises(PackDamaged, match=entry.name):
        damaged.verify()


def test_a_changed_model_is_packed_anew_and_the_old_pack_goes(model: Path, random_model: Callable[..., Path]) -> None:
    first, _ = run(model)
    (old,) = packs()
    model.write_bytes(random_model("llama", type="Q4_0", n_embd=128, seed=7).read_bytes())
    second, _ = run(model)
    assert not np.array_equal(first, second)
    assert len(packs()) == 1
    assert packs()[0] != old


def test_a_pack_of_an_older_format_goes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(repack, "FORMAT", repack.FORMAT - 1)
        run(model)
    (old,) = packs()
    run(model)
    assert len(packs()) == 1
    assert packs()[0] != old


def test_a_full_disk_runs_unpacked_and_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(repack, "write_header", full)
    logits, notices = run(model)
    assert np.isfinite(logits).all()
    assert "No space left" in notices[0]
    assert list(config.packed_dir().glob("*.tmp")) == []


def test_too_little_free_space_is_seen_before_writing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=100, used=99, free=1))
    _, notices = run(model)
    assert "0 MB free" in notices[0]


def test_a_cache_that_is_a_file_runs_unpacked_and_says_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("EDGE_RT_CACHE", str(blocked))
    logits, notices = run(model)
    assert np.isfinite(logits).all()
    assert "running without packed weights" in notices[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_runs_unpacked_and_says_so(model: Path) -> None:
    config.packed_dir().mkdir(parents=True)
    config.packed_dir().chmod(0o500)
    _, notices = run(model)
    assert "running without packed weights" in notices[0]


def test_a_killed_packing_leaves_nothing_that_is_believed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = repack.pack_tensors

    def killed(*arguments: Any) -> Any:
        yield next(iter(original(*arguments)))
        raise KeyboardInterrupt

    monkeypatch.setattr(repack, "pack_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert packs() == []
    assert list(config.packed_dir().glob("*.tmp")) == []


def test_two_processes_at_once_make_one_pack(model: Path) -> None:
    program = (
        "import sys; from edge_rt.core.gguf.model_file import ModelFile; from edge_rt.core.weights.repack import open_packed\n"
        "steps = []\n"
        "file = ModelFile.open(sys.argv[1]); packed, notice = open_packed(file, lambda *s: steps.append(s))\n"
        "packed.verify(); print(len(steps), notice)"
    )
    children = [subprocess.Popen([sys.executable, "-c", program, str(model)], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [child.communicate(timeout=60)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert sum(int(steps) > 0 for steps, _ in answers) == 1  # the others waited for it
    assert len(packs()) == 1


def test_units_lie_on_page_borders_in_forward_order(model: Path) -> None:
    run(model)
    with ModelFile.open(model) as file, closing(PackedFile(packs()[0], repack.cache_key(file))) as pack:
        assert pack.data_offset % 4096 == 0
        first_of = {}
        for entry in pack.entries:
            first_of.setdefault(entry.name.split(".")[1] if entry.name.startswith("blk.") else entry.name, entry.offset)
        blocks = [first_of[str(i)] for i in range(2)]
        assert all(offset % 4096 == 0 for offset in blocks)
        assert blocks == sorted(blocks)


def test_a_model_with_nothing_to_pack_makes_no_file(random_model: Callable[..., Path]) -> None:
    _, notices = run(random_model("llama", type="F32"))
    assert notices == []
    assert packs() == []


# ---- layouts ---------------------------------------------------------------------------------------------------------


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A CPU with these layouts."""
    available = ggml.extra_buffer_types()
    monkeypatch.setattr(repack, "layouts", lambda: {name: available[name] for name in names})


def layouts_in(pack: Path) -> dict[str, str]:
    with pack.open("rb") as file:
        return {entry[0]: entry[5] for entry in repack._read_body(file.fileno())["entries"]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("type_", ["Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_each_layout_gives_the_bits_it_gives_in_libllama(
    random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, layout: str, type_: str
) -> None:
    """A prompt, single tokens, and few at once, which may have kernels of their own."""
    only(monkeypatch, layout)
    path = random_model("llama", type=type_, n_embd=256, n_ff=512, n_head=4, n_head_kv=2)
    options = EngineOptions(threads=2, context=512, extra={"ggml.transposed_values": False, "ggml.centred": False})
    with (
        ModelFile.open(path) as file,
        closing(GgmlEngine(file, options)) as engine,
        closing(Reference(path, flash=True, layouts=(layout,))) as libllama,
    ):
        sequence, tokens = engine.new_sequence(), [int(t) for t in np.random.default_rng(0).integers(0, engine.info.n_vocab, 60)]
        for part in (tokens[:50], *([t] for t in tokens[50:55]), tokens[55:]):
            (ours,), theirs = engine.step([SequenceBatch(sequence, part, "all")]), libllama.feed(part)
            assert np.isfinite(theirs).all()
            np.testing.assert_array_equal(np.array(ours).view(np.uint32), theirs.view(np.uint32))
    assert {used for pack in packs() for used in layouts_in(pack).values()} <= {layout, ""}


@pytest.mark.skipif(set(repack.layouts()) != set(repack.LAYOUTS), reason="this CPU has one layout")
def test_experts_have_another_layout_than_what_all_tokens_use(random_model: Callable[..., Path]) -> None:
    run(random_model("qwen3moe", type="Q4_0", n_embd=128, n_ff_exp=64))
    found = layouts_in(packs()[0])
    assert found["blk.0.attn_q.weight"] == "AMX"
    assert found["blk.0.ffn_up_exps.weight"] == "CPU_REPACK"
    assert found["blk.0.attn_norm.weight"] == ""


def test_weights_of_another_cpu_are_packed_anew(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache may move to another machine, or the system may withhold a part of this one."""
    run(model)
    seen: list[tuple[str, int, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(ggml, "ggml_vector_length", lambda: 32)
        run(model, lambda *step: seen.append(step))
    assert packing_steps(seen) > 0
    only(monkeypatch)
    logits, notices = run(model)
    with ModelFile.open(model) as file, closing(GgmlEngine(file, EngineOptions(threads=1, context=64, pack=False))) as plain:
        (expected,) = plain.step([SequenceBatch(plain.new_sequence(), [1, 2, 3, 4, 5], "all")])
        np.testing.assert_array_equal(logits, np.array(expected))
    assert notices == []
