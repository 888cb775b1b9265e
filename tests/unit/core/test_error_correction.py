"""Side files of compensation: what fits a model is read, and whatever does not is refused in one sentence, before native code sees it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.gguf.reader import read_header
from edge_rt.core.weights.error_correction import (
    Compensation,
    compensation_fingerprint,
    compensation_path,
    find_compensation,
    open_compensation,
)
from edge_rt.errors import ModelFileError, UnsupportedModel
from edge_rt.testing import gguf_bytes
from edge_rt.testing.random_models import write_random_compensation, write_random_model

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
OFF = ", or run without it by --compensation off"


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Path]) -> Iterator[ModelFile]:
    with ModelFile.open(random_model("llama")) as file:
        yield file


def opened(path: Path, model: ModelFile) -> Compensation:
    found = open_compensation(path, model)
    found.file.close()
    return found


def test_what_a_file_holds(model: ModelFile, tmp_path: Path) -> None:
    path = write_random_compensation(tmp_path / "a.gguf", model, rank=3, rows=5, target=r"blk\.1\..*(q|down)\.weight")
    found = open_compensation(path, model)
    with found.file:
        assert set(found.sites) == {"blk.1.attn_q.weight", "blk.1.ffn_down.weight"}
        site = found.sites["blk.1.ffn_down.weight"]
        assert site.low is not None
        assert site.table is not None
        assert (site.low.a.shape, site.low.b.shape, site.table.centroids.shape, site.table.rows.shape) == (
            (128, 3), (3, 64), (128, 5), (64, 5),
        )  # fmt: skip
        assert found.facts() == {"path": str(path), "sites": 2, "low_rank": 2, "tables": 2, "biases": 2, "bytes": found.size}
        assert found.key == found.file.key()
    other = opened(write_random_compensation(tmp_path / "b.gguf", model, rank=0, offsets=False, bias=False), model)
    assert len(other.sites) == 14
    assert all(site.low is None and site.bias is None and site.table and not site.table.offsets for site in other.sites.values())


def test_which_file_is_found(tmp_path: Path) -> None:
    model, side = tmp_path / "model.v1.Q4_0.gguf", tmp_path / "model.v1.Q4_0.compensation.gguf"
    assert compensation_path(model) == side
    assert compensation_path(tmp_path / "plain") == tmp_path / "plain.compensation.gguf"
    assert find_compensation(model) is find_compensation(model, "off") is None
    assert find_compensation(model, "other.gguf") == Path("other.gguf")
    side.symlink_to("nowhere")  # is told, not overlooked
    assert find_compensation(model) == side
    assert find_compensation(model, "off") is None


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    with ModelFile.open(path) as file:
        return compensation_fingerprint(file)


def test_a_fingerprint_is_of_the_weights_alone(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "a.gguf", "llama", type="Q4_0")
    expected = fingerprint(path)
    shutil.copy(path, tmp_path / "copy.gguf")
    os.utime(tmp_path / "copy.gguf", (1, 1))
    assert fingerprint(tmp_path / "copy.gguf") == expected
    raw = gguf_bytes.edit_metadata(path.read_bytes(), {"general.name": ("str", "another"), "edge_rt.target": ("str", "rpi-5")})
    (tmp_path / "named.gguf").write_bytes(raw)
    assert fingerprint(tmp_path / "named.gguf") == expected
    header = read_header(raw, len(raw))
    tensors = [gguf_bytes.tensor(one.name, one.shape, one.type, one.offset - header.data_offset) for one in header.tensors.values()]
    values = [
        gguf_bytes.metadata(key, header.type_of(key) or "", header.raw_strings(key) if header.type_of(key) == "[str]" else header.get(key))
        for key in header
    ]
    (tmp_path / "turned.gguf").write_bytes(gguf_bytes.build(values, reversed(tensors), raw[header.data_offset :]))
    assert fingerprint(tmp_path / "turned.gguf") == expected


def test_other_weights_have_another(tmp_path: Path) -> None:
    base: dict[str, Any] = {"type": "Q4_0"}
    variants = [
        ("llama", base), ("llama", {**base, "seed": 1}), ("llama", {"type": "Q4_1"}), ("llama", {**base, "n_ff": 160}),
        ("llama", {**base, "n_layer": 3}), ("llama", {**base, "bias": True}), ("qwen3", base),
    ]  # fmt: skip
    found = {fingerprint(write_random_model(tmp_path / f"{i}.gguf", kind, **measures)) for i, (kind, measures) in enumerate(variants)}
    assert len(found) == len(variants)


def test_each_changed_matrix_of_a_small_model_is_seen(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "a.gguf", "llama")
    raw, expected = path.read_bytes(), fingerprint(path)
    header = read_header(raw, len(raw))
    for info in header.tensors.values():
        if len(info.shape) > 1:
            changed = bytearray(raw)
            changed[info.offset + info.nbytes // 2] ^= 1
            path.write_bytes(changed)
            assert fingerprint(path) != expected, info.name


# ---- what cannot be --------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": ("str", "qwen2")}, "is for qwen2 models and this one is llama"),
    "a model": ({"general.type": ("str", "model")}, "is no compensation"),
    "no type": ({"general.type": None}, "is no compensation"),
    "another model": ({"edge_rt.compensation.model": ("str", "0" * 32)}, "made for other weights"),
    "no model": ({"edge_rt.compensation.model": None}, "edge_rt.compensation.model is missing"),
    "a model that is a number": ({"edge_rt.compensation.model": ("u32", 1)}, "has type u32"),
    "a newer version": ({"edge_rt.compensation.version": ("u32", 2)}, "has version 2, and this edge-rt reads 1; update edge-rt"),
    "version zero": ({"edge_rt.compensation.version": ("u32", 0)}, "has version 0"),
    "no version": ({"edge_rt.compensation.version": None}, "edge_rt.compensation.version is missing"),
    "a version that is text": ({"edge_rt.compensation.version": ("str", "1")}, "has type str"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_metadata_that_cannot_be(kind: str, model: ModelFile, tmp_path: Path) -> None:
    changes, said = WRONG[kind]
    with pytest.raises(ModelFileError, match=said) as caught:
        open_compensation(write_random_compensation(tmp_path / "a.gguf", model, changes=changes), model)
    assert str(caught.value).startswith(f"{tmp_path / 'a.gguf'}: ")
    assert str(caught.value).endswith(OFF)
    assert isinstance(caught.value, UnsupportedModel) is (kind in ("a newer version", "version zero"))


Q, DOWN = "blk.0.attn_q", "blk.0.ffn_down"  # 64 x 64, 128 x 64
SHAPES: dict[str, tuple[list[tuple[str, tuple[int, ...], int]], str]] = {
    "nothing": ([], "corrects nothing; make it again, or remove it"),
    "a alone": ([(f"{Q}.low_a", (64, 4), F32)], "its low_b is not"),
    "b alone": ([(f"{Q}.low_b", (4, 64), F32)], "its low_a is not"),
    "centroids alone": ([(f"{Q}.centroids", (64, 4), F32)], "its rows is not"),
    "rows alone": ([(f"{Q}.rows", (64, 4), F32)], "its centroids is not"),
    "offsets alone": ([(f"{Q}.offsets", (4,), F32)], "its centroids is not"),
    "another input": ([(f"{DOWN}.low_a", (64, 4), F32), (f"{DOWN}.low_b", (4, 64), F32)], r"\(64, 4\) where \(128, 4\) fits"),
    "another output": ([(f"{Q}.low_a", (64, 4), F32), (f"{Q}.low_b", (4, 32), F32)], r"\(4, 32\) where \(4, 64\) fits"),
    "another rank": ([(f"{Q}.low_a", (64, 4), F32), (f"{Q}.low_b", (5, 64), F32)], r"\(5, 64\) where \(4, 64\) fits"),
    "other rows": ([(f"{Q}.centroids", (64, 4), F32), (f"{Q}.rows", (64, 5), F32)], r"\(64, 5\) where \(64, 4\) fits"),
    "short offsets": (
        [(f"{Q}.centroids", (64, 4), F32), (f"{Q}.rows", (64, 4), F32), (f"{Q}.offsets", (3,), F32)],
        r"\(3,\) where \(4,\) fits",
    ),
    "a cube": ([(f"{Q}.low_a", (64, 4, 2), F32), (f"{Q}.low_b", (2, 64), F32)], "where"),
    "a long bias": ([(f"{Q}.bias", (65,), F32)], r"\(65,\) where \(64,\) fits"),
    "a half bias": ([(f"{Q}.bias", (64,), F16)], "is F16; make the compensation in F32"),
    "quantised factors": ([(f"{Q}.low_a", (64, 4), Q4_0), (f"{Q}.low_b", (4, 64), F32)], "is Q4_0; make the compensation in F32 or F16"),
    "another block": ([("blk.7.attn_q.bias", (64,), F32)], "blk.7.attn_q.bias corrects nothing that this model has"),
    "another weight": ([("blk.0.attn_qkv.bias", (64,), F32)], "corrects nothing"),
    "the head": ([("output.bias", (64,), F32)], "corrects nothing"),
    "another part": ([(f"{Q}.low_c", (64,), F32)], "corrects nothing"),
    "a model's tensor": ([(f"{Q}.weight", (64, 64), F32)], "corrects nothing"),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_tensors_that_cannot_be(kind: str, model: ModelFile, tmp_path: Path) -> None:
    tensors, said = SHAPES[kind]
    infos, at = [], 0
    for name, shape, type_ in tensors:
        infos.append(gguf_bytes.tensor(name, shape, type_, at))
        size = {F32: 4.0, F16: 2.0, Q4_0: 18 / 32}[type_]
        for n in shape:
            size *= n
        at += -(-int(size) // 32) * 32
    values = [
        gguf_bytes.metadata("general.architecture", "str", "llama"),
        gguf_bytes.metadata("general.type", "str", "compensation"),
        gguf_bytes.metadata("edge_rt.compensation.version", "u32", 1),
        gguf_bytes.metadata("edge_rt.compensation.model", "str", compensation_fingerprint(model)),
    ]
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes.build(values, infos, bytes(at)))
    with pytest.raises(ModelFileError, match=said) as caught:
        open_compensation(path, model)
    assert str(caught.value).endswith(OFF)


def test_damage_anywhere_is_an_error_or_harmless(model: ModelFile, tmp_path: Path) -> None:
    """Cut at any length and with any byte of its header changed: never another exception, and no file stays open."""
    path = write_random_compensation(tmp_path / "a.gguf", model, rank=2, rows=2)
    raw, chance = path.read_bytes(), random.Random(5)
    size = read_header(raw, len(raw)).data_offset
    before, said = len(os.listdir("/proc/self/fd")), list[str]()
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[chance.randrange(size)] = chance.randrange(256)
        path.write_bytes(damaged if chance.random() < 0.7 else raw[: chance.randrange(len(raw))])
        try:
            opened(path, model)
        except ModelFileError as error:
            said.append(str(error))
    assert len(said) > 100
    assert all(one.endswith(OFF) for one in said)
    assert len(os.listdir("/proc/self/fd")) == before
