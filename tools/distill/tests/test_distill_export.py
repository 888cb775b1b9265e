"""An exported student has the same logits in edge-rt and stock llama.cpp, which are the torch model's; a teacher comes back bit for bit."""

from __future__ import annotations

import errno
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
import torch
from edge_rt_distill.export import ALIGNMENT, PROVENANCE, export
from edge_rt_distill.model.architecture import LayerShape
from edge_rt_distill.model.decoder import LINEARS, Decoder
from edge_rt_distill.model.load import load, read_gguf, tensors
from edge_rt_distill.portable import portable
from edge_rt_distill.quantise.gptq import GptqOptions
from edge_rt_distill.quantise.matrices import Encoded, QuantiseOptions, encode, quantise_model

import edge_rt
from edge_rt.hooks import (
    EngineOptions,
    ModelFile,
    ModelFileError,
    OptionError,
    SequenceBatch,
    UnsupportedModel,
    UserError,
    open_ggml_engine,
)
from edge_rt.testing.random_models import write_random_model

FAMILIES = ("llama", "deci", "qwen2", "qwen3")
TOKENS = [5, 17, 3, 44, 90, 8, 120, 33, 7, 61]


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    widths = (128, 64, 96) if request.param == "deci" else 128
    return write_random_model(
        folder / f"{request.param}.gguf", request.param, n_layer=3, tied=request.param != "qwen3", context=64, n_ff=widths
    )


def _student(teacher: Path, seed: int = 1, second: int = 96) -> Decoder:
    """Fewer layers, fewer heads than the width has room for, another FFN width; weights of a size that gives sane logits."""
    a = load(teacher).model.architecture
    shape = LayerShape(heads=2, kv_heads=1, ffn=96, sources=(0,))
    model = Decoder(replace(a, layers=(shape, replace(shape, ffn=second, sources=(2,)))))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            size = 0.1 if tensor.ndim == 1 else 1.5 / tensor.shape[1] ** 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * size + (1.0 if "norm" in name else 0.0))
    return model.eval().requires_grad_(False)


def _torch(model: Decoder) -> npt.NDArray[np.float32]:
    """Logits [T, V] of the torch model."""
    found: npt.NDArray[np.float32] = model.logits(model(torch.tensor([TOKENS])).hidden)[0].numpy()
    return found


def _edge_rt(path: Path) -> npt.NDArray[np.float32]:
    """Logits [T, V] of edge-rt with the kernels for attention that stock llama.cpp has too."""
    options = EngineOptions(threads=1, context=64, extra={"ggml.transposed_values": False, "ggml.centred": False})
    with ModelFile.open(path) as file, closing(open_ggml_engine(file, options)) as engine:
        (found,) = engine.step([SequenceBatch(engine.new_sequence(), TOKENS, "all")])
        return np.array(found, dtype=np.float32)


def _llama_cpp(path: Path) -> npt.NDArray[np.float32]:
    """Logits [T, V] of stock llama-cpp-python."""
    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, flash_attn=True, verbose=False)
    model.eval(TOKENS)
    return np.array(model.scores[: len(TOKENS)], dtype=np.float32)


def _encoded(model: Decoder) -> dict[str, Encoded]:
    """GPTQ in Q4_0 on some random tokens."""
    draw = torch.Generator().manual_seed(0)
    sequences = torch.randint(3, 300, (6, 24), generator=draw).tolist()
    found = quantise_model(model, sequences, QuantiseOptions(type="Q4_0", gptq=GptqOptions(tried=2, sweeps=1)))
    for site in model.sites():
        model.linear(site).weight.copy_(found.model.linear(site).weight)
    return dict(found.tensors)


@pytest.mark.parametrize(("matrices", "embedding"), [("F32", "F32"), ("F16", "F16"), ("Q8_0", "F16"), ("gptq", "Q8_0")])
def test_a_student_runs_in_both_runtimes_as_in_torch(teacher: Path, tmp_path: Path, matrices: str, embedding: str) -> None:
    model = portable(_student(teacher))
    how = _encoded(model) if matrices == "gptq" else {}
    path = export(
        tmp_path / "s.gguf", model, load(teacher).tokeniser, matrices="F16" if how else matrices, embedding=embedding, how=how,
        name="tiny student", provenance={"teacher": "ab12", "run": "r1", "parameters": model.architecture.parameters()},
    )  # fmt: skip
    again = load(path).model
    mine, theirs, torchs = _edge_rt(path), _llama_cpp(path), _torch(again)
    assert np.array_equal(mine, theirs)
    with edge_rt.open(path, threads=1) as running:
        assert (running.logits(TOKENS) - mine).std() < 5e-2 * mine.std()
    # The runtimes round inputs of quantised matrices to 8 bits, and keys and values to float16.
    assert (mine - torchs).std() < (5e-2 if matrices in ("Q8_0", "gptq") else 5e-3) * torchs.std()
    assert torchs.std() > 0.1
    file = ModelFile.open(path)
    header = file.header
    assert header.get(f"{PROVENANCE}teacher") == "ab12"
    assert header.get("general.name") == "tiny student"
    assert list(header.tensors) == sorted(header.tensors, key=lambda name: header.tensors[name].offset)
    assert all((one.offset - header.data_offset) % ALIGNMENT == 0 for one in header.tensors.values())
    file.close()
    assert (_torch(model) - torchs).std() < 5e-2 * torchs.std()
    assert [(one.heads, one.kv_heads, one.ffn) for one in again.architecture.layers] == [(2, 1, 96)] * 2
    if how:
        for site in model.sites():
            assert torch.equal(again.linear(site).weight, model.linear(site).weight), site


def test_a_teacher_exported_in_f32_comes_back_bit_for_bit(teacher: Path, tmp_path: Path) -> None:
    first = load(teacher)
    second = load(export(tmp_path / "again.gguf", first.model, first.tokeniser, matrices="F32", embedding="F32"))
    assert second.model.architecture == first.model.architecture
    mine, theirs = tensors(first.model), tensors(second.model)
    assert set(mine) == set(theirs)
    for name in mine:
        assert np.array_equal(mine[name].numpy().view(np.uint32), theirs[name].numpy().view(np.uint32)), name
    assert second.tokeniser.encode("the device and 数字") == first.tokeniser.encode("the device and 数字")
    assert np.array_equal(_edge_rt(teacher), _edge_rt(tmp_path / "again.gguf"))


def test_factors_and_scaling_of_rotation_are_kept(tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    source = write_random_model(tmp_path / "a.gguf", "llama", rope_scaling=scaling, rope_freqs=[1.0, 1, 2, 2, 3, 3, 4, 4])
    first = load(source)
    export(tmp_path / "b.gguf", first.model, first.tokeniser, matrices="F32", embedding="F32")
    assert load(tmp_path / "b.gguf").model.architecture == first.model.architecture
    assert np.array_equal(_edge_rt(source), _edge_rt(tmp_path / "b.gguf"))


def test_layers_that_share_parameters_are_written_out(tiny: Path, tmp_path: Path) -> None:
    first = load(tiny)
    shape = first.model.architecture.layers[0]
    model = Decoder(replace(first.model.architecture, layers=(shape,) * 3, parameters_of=(0, 1, 0))).eval().requires_grad_(False)
    for name, tensor in tensors(first.model).items():
        tensors(model)[name].copy_(tensor)
    how = _encoded(model)
    assert sorted(how) == sorted(f"{site}.weight" for site in model.sites())
    path = export(tmp_path / "shared.gguf", model, first.tokeniser, how=how)
    again = read_gguf(path)
    for name in LINEARS:
        for layer, owner in enumerate((0, 1, 0)):
            assert torch.equal(again.linear(f"blk.{layer}.{name}").weight, model.linear(f"blk.{owner}.{name}").weight)
    assert np.array_equal(_edge_rt(path), _llama_cpp(path))


def test_rows_of_the_embedding_that_no_token_has_are_left_out(tiny: Path, tmp_path: Path) -> None:
    first = load(tiny)
    words = first.tokeniser.size
    model = Decoder(replace(first.model.architecture, vocabulary=words + 40)).eval().requires_grad_(False)
    for name, tensor in tensors(first.model).items():
        tensors(model)[name][: len(tensor)].copy_(tensor)
    path = export(tmp_path / "padded.gguf", model, first.tokeniser, matrices="F32", embedding="F32")
    assert read_gguf(path).architecture.vocabulary == words
    assert np.array_equal(_edge_rt(path), _edge_rt(tiny))


def test_a_full_disk_is_said_and_leaves_the_file_that_was_there(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(tiny)
    (tmp_path / "s.gguf").write_bytes(b"before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"s.gguf, which takes .* [kM]B: the disk is full; make room"):
        export(tmp_path / "s.gguf", first.model, first.tokeniser)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("s.gguf", b"before")]


def test_a_qwen2_with_fewer_heads_becomes_a_llama_that_computes_the_same(tmp_path: Path) -> None:
    first = load(write_random_model(tmp_path / "a.gguf", "qwen2"))
    assert portable(first.model) is first.model
    student = _student(tmp_path / "a.gguf")
    with pytest.raises(UnsupportedModel, match="make it a llama first"):
        export(tmp_path / "s.gguf", student, first.tokeniser)
    changed = portable(student)
    assert changed.architecture.family == "llama"
    assert portable(changed) is changed
    np.testing.assert_allclose(_torch(changed), _torch(student), atol=2e-5)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_student_whose_layers_differ_in_width_becomes_a_deci(family: str, quantised: bool, tmp_path: Path) -> None:
    first = load(write_random_model(tmp_path / "a.gguf", family, context=64))
    student = _student(tmp_path / "a.gguf", second=160)
    with pytest.raises(UnsupportedModel, match="make it a"):
        export(tmp_path / "s.gguf", student, first.tokeniser)
    changed = portable(student)
    np.testing.assert_allclose(_torch(changed), _torch(student), atol=2e-5)
    how = _encoded(changed) if quantised else {}
    bias = {"blk.1.ffn_down.bias": torch.linspace(-0.1, 0.1, changed.architecture.width)}
    path = export(tmp_path / "s.gguf", changed, first.tokeniser, how=how, biases=bias)
    mine = _edge_rt(path)
    assert np.array_equal(mine, _llama_cpp(path))
    plain = load(export(tmp_path / "plain.gguf", changed, first.tokeniser, how=how)).model
    assert [(one.heads, one.kv_heads, one.ffn) for one in plain.architecture.layers] == [(2, 1, 96), (2, 1, 160)]
    assert 0 < (mine - _torch(plain)).std() < 0.1 * mine.std()
    assert not np.array_equal(mine, _edge_rt(tmp_path / "plain.gguf")), "the bias is added in both runtimes"


def test_a_qwen3_whose_layers_differ_in_width_is_refused(tmp_path: Path) -> None:
    write_random_model(tmp_path / "a.gguf", "qwen3", context=64)
    with pytest.raises(UnsupportedModel, match="no qwen3 whose layers differ"):
        portable(_student(tmp_path / "a.gguf", second=160))


def _broken(model: Decoder, value: float) -> Decoder:
    model.linear("blk.1.attn_k").weight[0, 0] = value
    return model


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (float("nan"), {}, "not finite"),
        (1e6, {}, "beyond what F16 can hold"),
        (0.0, {"matrices": "Q4_K"}, "no multiple of Q4_K's 256"),
        (0.0, {"embedding": "Q9"}, "there is no type Q9"),
        (0.0, {"how": {"blk.7.attn_q.weight": "F32"}}, r"no tensor blk\.7\.attn_q\.weight"),
        (0.0, {"how": {"blk.0.attn_q.weight": Encoded("Q4_0", np.zeros((3, 36), np.uint8))}}, "are not Q4_0 of shape"),
        (0.0, {"provenance": {"tokens": 1 << 40}}, "cannot be 1099511627776"),
    ],
)
def test_what_cannot_be_written_is_said_and_no_file_is_left(
    tiny: Path, tmp_path: Path, value: float, options: dict[str, Any], message: str
) -> None:
    first = load(tiny)
    with pytest.raises(OptionError, match=message):
        export(tmp_path / "s.gguf", _broken(first.model, value), first.tokeniser, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_of_another_model_and_uneven_layers_are_refused(tiny: Path, tmp_path: Path) -> None:
    first = load(tiny)
    a = first.model.architecture
    with pytest.raises(ModelFileError, match="belongs to another model"):
        export(tmp_path / "s.gguf", Decoder(replace(a, vocabulary=64)), first.tokeniser)
    with pytest.raises(UnsupportedModel, match="cut all alike"):
        export(tmp_path / "s.gguf", Decoder(replace(a, layers=(a.layers[0], replace(a.layers[1], heads=2)))), first.tokeniser)


def test_a_type_with_importance_is_given_as_bytes(tiny: Path, tmp_path: Path) -> None:
    first = load(tiny)
    weight = first.model.token_embd.weight
    embedding = encode(weight, "Q5_0", torch.linspace(0.1, 2, weight.shape[1]))
    path = export(tmp_path / "s.gguf", first.model, first.tokeniser, how={"token_embd.weight": embedding})
    file = ModelFile.open(path)
    one = file.header.tensors["token_embd.weight"]
    assert one.type_name == "Q5_0"
    assert bytes(file.map[one.offset : one.offset + one.nbytes]) == embedding.data.tobytes()
    file.close()
