"""Weights packed for another CPU: the bytes are those of the library where it runs, and a file is believed only where they are."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge_rt
from edge_rt.core import sequences
from edge_rt.core.engine import SequenceBatch
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.gguf.reader import GGML_TYPES, TensorInfo
from edge_rt.core.weights import repack
from edge_rt.core.weights.interleave import CHOICES
from edge_rt.core.weights.repack import Entry, PackDamaged, PackedFile
from edge_rt.deploy import target as targets
from edge_rt.deploy import writer
from edge_rt.deploy.passes import Goals, Situation, built_in, decide
from edge_rt.deploy.plan import Deployed
from edge_rt.native import ggml, memory

INTERLEAVED = {name: type_ for name, type_ in ggml.extra_buffer_types().items() if name == "CPU_REPACK"}
NAMES = {"fp16_va": "fp16", "matmul_int8": "i8mm", "avx512": "avx512f"}
HERE = frozenset(NAMES.get(name, name) for name in ggml.ggml_features()) | {f"sve{8 * ggml.ggml_vector_length()}"}
NUMBERS = {name: (number, elements, nbytes) for number, (name, elements, nbytes) in GGML_TYPES.items()}
TYPES = sorted({choice.type for choice in CHOICES} | {"Q4_1", "Q5_0", "Q3_K", "IQ4_XS"})
SIZES = {"n_layer": 2, "n_embd": 256, "n_head": 8, "n_head_kv": 2, "n_ff": 512, "context": 512}
pytestmark = pytest.mark.skipif(not INTERLEAVED, reason="this build has no interleaved rows")


@pytest.fixture(autouse=True)
def _interleaved_rows_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CPU without AMX, whose tiles are not made elsewhere, and a cache for each test."""
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(repack, "layouts", lambda: INTERLEAVED)
    # Which layout of values decodes faster is timed, and on a busy machine two runs may find otherwise: their bits then differ.
    monkeypatch.setattr(sequences, "autotune_v_layout", lambda *_: False)


def weight(type_: str, shape: tuple[int, ...]) -> TensorInfo:
    number, elements, nbytes = NUMBERS[type_]
    return TensorInfo("a.weight", shape, number, type_, 0, math.prod(shape) // elements * nbytes)


# ---- the bytes -------------------------------------------------------------------------------------------------------


@given(st.sampled_from(TYPES), st.integers(1, 3), st.integers(1, 40), st.sampled_from([None, 1, 2, 3]), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=300)
def test_numpy_packs_what_the_library_packs(type_: str, blocks: int, rows: int, experts: int | None, seed: int) -> None:
    """The same weights have kernels, and their bytes are the same: any type, any shape, any blocks."""
    shape = (NUMBERS[type_][1] * blocks, rows, *([] if experts is None else [experts]))
    info = weight(type_, shape)
    library, interleaver = repack.library_packer(INTERLEAVED), repack.interleaver(HERE)
    found = library.kernels({info.name: info})
    assert interleaver.kernels({info.name: info}) == found
    if found:
        layout, nbytes = found[info.name]
        data = np.random.default_rng(seed).integers(0, 256, info.nbytes, dtype=np.uint8).tobytes()
        entry = Entry(info.name, info.type, shape, 0, nbytes, layout)
        assert bytes(library.pack(entry, data)) == bytes(interleaver.pack(entry, data))


def test_every_type_that_the_library_packs_here_is_packed_in_numpy() -> None:
    """So the test above cannot pass for want of kernels."""
    infos = {f"{name}.weight": weight(name, (2 * elements, 32)) for name, (_, elements, _) in NUMBERS.items()}
    found = repack.library_packer(INTERLEAVED).kernels(infos)
    assert repack.interleaver(HERE).kernels(infos) == found
    if "avx512f" in HERE:
        assert set(found) == {f"{name}.weight" for name in ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4", "Q2_K")}


# ---- what a file beside its model is known by ------------------------------------------------------------------------


def header(*infos: TensorInfo) -> Any:
    return SimpleNamespace(tensors={f"blk.{i}.{info.name}": info for i, info in enumerate(infos)})


def test_fingerprints_are_of_kinds_and_not_of_who_packs() -> None:
    some = header(*(weight(name, (1024, rows)) for name in ("Q4_0", "Q4_1", "Q2_K", "F16") for rows in (64, 96, 8, 6)))
    found = repack.fingerprints(some)
    assert found == repack.fingerprints(some, packer=repack.interleaver(HERE))
    assert len(found) == 3 * 3  # a float weight is none, and rows of 64 and 96 are of one kind
    assert "Q4_0 512x2: plain" in found
    centred = [one for one in found if one.startswith("Q4_1")]
    plain = [one for one in repack.fingerprints(some, centre=False) if one.startswith("Q4_1")]
    assert all(one.endswith(": plain") for one in plain)
    assert "avx2" not in HERE or "Q4_1 512x32: Q4_0 CPU_REPACK" in centred[1]


@pytest.mark.parametrize("features", [{"neon"}, {"neon", "dotprod"}, {"neon", "dotprod", "i8mm"}, {"avx2"}, {"avx2", "avx512f"}])
def test_other_layouts_have_other_fingerprints(features: set[str]) -> None:
    some = header(*(weight(name, (1024, 64)) for name in ("Q4_0", "Q2_K")))
    packer = repack.interleaver(features)
    same = packer.kernels(some.tensors) == repack.interleaver(HERE).kernels(some.tensors) and ("neon" in features) == ("neon" in HERE)
    assert (repack.fingerprints(some) == repack.fingerprints(some, packer=packer)) == same


def test_they_take_no_time(random_model: Callable[..., Path]) -> None:
    path = random_model("qwen3moe", type="Q4_0", n_embd=256, n_ff_exp=256, n_layer=8)
    with ModelFile.open(path) as file:
        repack.fingerprints(file.header)

        def once() -> float:
            start = time.perf_counter()
            repack.fingerprints(file.header)
            return time.perf_counter() - start

        assert min(once() for _ in range(20)) < 0.002


# ---- compiled for another --------------------------------------------------------------------------------------------


def compiled(path: Path, folder: Path, name: str) -> Deployed:
    with ModelFile.open(path) as source:
        target = targets.load(name)
        return writer.write(source, target, decide(Situation(source.header, target, Goals()), built_in()), folder, here=False)


def logits(path: Path) -> np.ndarray[Any, Any]:
    with edge_rt.open(path, threads=1, context=256) as model:
        sequence = model.engine.new_sequence()
        (rows,) = model.engine.step([SequenceBatch(sequence, list(range(1, 60)), "all")])
        before = np.array(rows)
        (last,) = model.engine.step([SequenceBatch(sequence, [7])])
        return np.concatenate([before, np.array(last)])


def own_packs(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache/packed").glob("*.pack")]


@pytest.fixture
def avx2() -> None:
    if "avx2" not in HERE:
        pytest.skip("this CPU has other layouts")


@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512"])
@pytest.mark.parametrize(
    "changes",
    [{"type": "Q4_0"}, {"type": "Q4_1"}, {"type": "Q4_K"}, {"architecture": "qwen3moe", "type": "Q4_0", "n_ff": 256}],
    ids=["Q4_0", "centred", "Q4_K", "experts"],
)
def test_what_was_packed_elsewhere_is_mapped_and_not_packed_again(
    random_model: Callable[..., Path], tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    path = random_model(**{"architecture": "llama", **SIZES, **changes})
    deployed = compiled(path, tmp_path / "out", name)
    assert set(deployed.files) == {"model.gguf", "model.pack"}
    writer.verify(deployed)
    copy = shutil.copytree(deployed.folder, tmp_path / "copy", copy_function=shutil.copyfile)  # without times
    found = logits(copy)
    assert own_packs(tmp_path) == []
    with ModelFile.open(copy / "model.gguf") as file, closing(PackedFile(copy / "model.pack", repack.copied_key(file))) as pack:
        pack.verify()
        assert pack.data_offset % repack.ELSEWHERE_PAGE == 0
        assert pack.size % repack.ELSEWHERE_PAGE == 0
    assert np.array_equal(found, logits(path))
    assert len(own_packs(tmp_path)) == 1  # of the model that was not compiled


@pytest.mark.usefixtures("avx2")
def test_it_holds_byte_by_byte_what_the_library_packs(random_model: Callable[..., Path], tmp_path: Path) -> None:
    deployed = compiled(random_model("llama", type="Q4_1", **SIZES), tmp_path / "out", "x86-avx2")
    with ModelFile.open(deployed.model) as file:
        base, plan = memory.address_of(file.map), repack.plan_repack(file.header)
        assert plan is not None
        with closing(PackedFile(deployed.folder / "model.pack", repack.copied_key(file))) as pack:
            data = (deployed.folder / "model.pack").read_bytes()[pack.data_offset :]
            for (ours, packed), theirs in zip(repack.pack_tensors(plan, file.header, base), pack.entries, strict=True):
                assert (ours.name, ours.type, ours.shape, ours.layout) == (theirs.name, theirs.type, theirs.shape, theirs.layout)
                assert bytes(packed) == data[theirs.offset : theirs.offset + theirs.nbytes]


@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize("name", ["rpi-5", "android-arm64"])
def test_another_cpus_layouts_are_packed_anew(random_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    path = random_model("llama", type="Q4_0", **SIZES)
    deployed = compiled(path, tmp_path / "out", name)
    assert "model.pack" in deployed.files
    with ModelFile.open(deployed.model) as file, pytest.raises(PackDamaged, match="another model, library or CPU"):
        PackedFile(deployed.folder / "model.pack", repack.copied_key(file))
    assert np.array_equal(logits(deployed.folder), logits(path))
    assert any(name.startswith("model-") for name in own_packs(tmp_path))


@pytest.mark.skipif("avx512f" not in HERE, reason="this CPU packs no more types than AVX2")
def test_types_that_were_not_packed_there_but_are_here_are_packed_anew(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("llama", type="Q2_K", **SIZES)
    assert "model.pack" not in compiled(path, tmp_path / "plain", "x86-avx2").files
    for name, files in (("x86-avx512", 0), ("x86-avx2", 1)):
        deployed = compiled(path, tmp_path / name, name)
        logits(deployed.model)  # alone: the plan for AVX2 says that nothing is packed
        assert len(own_packs(tmp_path)) == files


def test_the_same_directory_is_made_again_to_the_byte(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("llama", type="Q4_1", **SIZES)
    assert compiled(path, tmp_path / "out", "rpi-5").files == compiled(path, tmp_path / "again", "rpi-5").files


@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_damaged_file_is_packed_anew(random_model: Callable[..., Path], tmp_path: Path, place: int) -> None:
    path = random_model("llama", type="Q4_0", **SIZES)
    deployed = compiled(path, tmp_path / "out", "x86-avx512")
    pack = deployed.folder / "model.pack"
    data = bytearray(pack.read_bytes())
    data = data[:-1] if place < 0 else data
    data[place] ^= 0xFF
    pack.write_bytes(data)
    assert np.array_equal(logits(deployed.folder), logits(path))
    assert len(own_packs(tmp_path)) == 2


@pytest.mark.usefixtures("avx2")
def test_another_model_beside_it_is_not_taken_for_its_own(random_model: Callable[..., Path], tmp_path: Path) -> None:
    deployed = compiled(random_model("llama", type="Q4_0", **SIZES), tmp_path / "out", "x86-avx512")
    other = compiled(random_model("llama", type="Q4_0", seed=5, **SIZES), tmp_path / "other", "x86-avx512")
    shutil.copyfile(deployed.folder / "model.pack", other.folder / "model.pack")
    logits(other.folder)
    assert len(own_packs(tmp_path)) == 1


@pytest.mark.usefixtures("avx2")
def test_larger_pages_than_it_was_made_for(random_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack that another machine of 4 KB pages made for itself cannot be mapped where pages are larger; one made for a target can."""
    path = random_model("llama", type="Q4_0", n_layer=3, n_embd=256, n_head=8, n_head_kv=2, n_ff=512)
    small = shutil.copyfile(path, tmp_path / "small.gguf")
    with ModelFile.open(small) as file:
        assert repack.write_beside(file) is not None
        key = repack.copied_key(file)
        PackedFile(tmp_path / "small.pack", key).close()
        monkeypatch.setattr(memory, "PAGE", repack.ELSEWHERE_PAGE)
        with pytest.raises(PackDamaged, match="smaller pages"):
            PackedFile(tmp_path / "small.pack", key)
    deployed = compiled(path, tmp_path / "out", "x86-avx512")
    with ModelFile.open(deployed.model) as file, closing(PackedFile(deployed.folder / "model.pack", repack.copied_key(file))) as pack:
        assert pack.entries


def test_targets_without_packed_kernels_and_with_amx_get_none(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("llama", type="Q4_0", **SIZES)
    assert set(compiled(path, tmp_path / "cm4", "rpi-cm4").files) == {"model.gguf"}
    assert set(compiled(path, tmp_path / "a10g", "a10g").files) == {"model.gguf"}
    text = (targets.FOLDER / "x86-avx512.toml").read_text(encoding="utf-8").replace('"avx512_bf16"]', '"avx512_bf16", "amx_int8"]')
    (tmp_path / "sapphire.toml").write_text(text, encoding="utf-8")
    deployed = compiled(path, tmp_path / "sapphire", str(tmp_path / "sapphire.toml"))
    assert deployed.plan.pack
    assert set(deployed.files) == {"model.gguf"}


def test_offsets_beyond_f16_are_left_out(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = shutil.copyfile(random_model("llama", type="Q4_1", **SIZES), tmp_path / "large.gguf")
    with ModelFile.open(path) as file:
        place = file.header.tensors["blk.1.ffn_up.weight"].offset
    with path.open("r+b") as out:
        out.seek(place)
        out.write(np.array([60000, 1], np.float16).tobytes())
    with ModelFile.open(path) as file:
        assert repack.write_beside(file, packer=repack.interleaver({"neon", "dotprod"})) is None
    assert not path.with_suffix(".pack").exists()
    assert list(tmp_path.glob("*.tmp")) == []
