"""Adapter files: what fits a model is read, and whatever does not is refused in one sentence, before native code sees it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_rt.core.gguf import model_file
from edge_rt.core.gguf.lora import LoraFile, open_lora
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.gguf.reader import Header, read_header
from edge_rt.errors import ModelFileError
from edge_rt.testing import gguf_bytes
from edge_rt.testing.random_models import write_random_adapter


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Path]) -> Header:
    raw = random_model("llama", n_layer=2).read_bytes()
    return read_header(raw, len(raw))


def opened(path: Path, model: Header) -> LoraFile:
    found = open_lora(path, model)
    found.file.close()
    return found


def test_what_a_file_holds(model: Header, tmp_path: Path) -> None:
    found = opened(write_random_adapter(tmp_path / "a.gguf", model, rank=3, alpha=6.0), model)
    assert {pair.base for pair in found.pairs} == {
        f"blk.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    assert {pair.rank for pair in found.pairs} == {3}
    assert {found.scale(pair, 1.5) for pair in found.pairs} == {3.0}
    plain = opened(write_random_adapter(tmp_path / "b.gguf", model, alpha=None), model)
    assert plain.scale(plain.pairs[0], 0.25) == 0.25


def test_the_scale_is_rounded_as_llama_cpp_rounds_it(model: Header, tmp_path: Path) -> None:
    import numpy as np

    found = opened(write_random_adapter(tmp_path / "a.gguf", model, rank=7, alpha=0.3), model)
    for wanted in (0.1, 0.7, -3.3, 1e-3):
        expected = np.float32(np.float32(wanted) * np.float32(0.3)) / np.float32(7)
        assert found.scale(found.pairs[0], wanted) == float(expected)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": ("str", "qwen2")}, "is for qwen2 models"),
    "a model": ({"general.type": ("str", "model")}, "is no adapter"),
    "no type": ({"general.type": None}, "is no adapter"),
    "another kind": ({"adapter.type": ("str", "ia3")}, "only lora"),
    "no kind": ({"adapter.type": None}, "adapter.type is missing"),
    "a kind that is a number": ({"adapter.type": ("u32", 1)}, "adapter.type has type u32"),
    "an alpha that is text": ({"adapter.lora.alpha": ("str", "8")}, "adapter.lora.alpha has type str"),
    "an alpha of another width": ({"adapter.lora.alpha": ("f64", 8.0)}, "adapter.lora.alpha is 8.0"),
    "an alpha that is no number": ({"adapter.lora.alpha": ("f32", float("nan"))}, "adapter.lora.alpha is nan"),
    "an alpha without end": ({"adapter.lora.alpha": ("f32", float("inf"))}, "adapter.lora.alpha is inf"),
    "activated": ({"adapter.alora.invocation_tokens": ("[u32]", [1, 2])}, "activated LoRA"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_metadata_that_cannot_be(kind: str, model: Header, tmp_path: Path) -> None:
    changes, said = WRONG[kind]
    with pytest.raises(ModelFileError, match=said) as caught:
        open_lora(write_random_adapter(tmp_path / "a.gguf", model, changes=changes), model)
    assert str(caught.value).startswith(f"{tmp_path / 'a.gguf'}: ")


F32, F16, Q4_0, I32 = 0, 1, 2, 26
Q = "blk.0.attn_q.weight"  # 64 x 64
SHAPES: dict[str, tuple[list[tuple[str, tuple[int, ...], int]], str]] = {
    "nothing": ([], "changes nothing"),
    "only A": ([(f"{Q}.lora_a", (64, 4), F32)], "only blk.0.attn_q.weight.lora_a of a pair"),
    "only B": ([(f"{Q}.lora_b", (4, 64), F32)], "only blk.0.attn_q.weight.lora_b of a pair"),
    "of no weight": ([("blk.9.attn_q.weight.lora_a", (64, 4), F32), ("blk.9.attn_q.weight.lora_b", (4, 64), F32)], "none of the model's"),
    "of a norm": ([("blk.0.attn_norm.weight.lora_a", (64, 1), F32), ("blk.0.attn_norm.weight.lora_b", (1, 1), F32)], "none of the model's"),
    "A too narrow": ([(f"{Q}.lora_a", (32, 4), F32), (f"{Q}.lora_b", (4, 64), F32)], "do not fit its"),
    "B too short": ([(f"{Q}.lora_a", (64, 4), F32), (f"{Q}.lora_b", (4, 32), F32)], "do not fit its"),
    "ranks that differ": ([(f"{Q}.lora_a", (64, 4), F32), (f"{Q}.lora_b", (8, 64), F32)], "do not fit its"),
    "A not transposed": ([(f"{Q}.lora_a", (4, 64), F32), (f"{Q}.lora_b", (4, 64), F32)], "do not fit its"),
    "more dimensions": ([(f"{Q}.lora_a", (64, 4, 2), F32), (f"{Q}.lora_b", (4, 64, 2), F32)], "do not fit its"),
    "a type without products": ([(f"{Q}.lora_a", (64, 4), I32), (f"{Q}.lora_b", (4, 64), F32)], "lora_a is I32"),
    "another tensor": ([("control.vector", (64,), F32)], "neither a .lora_a nor a .lora_b"),
    "the embedding where it is the head": (
        [("token_embd.weight.lora_a", (4, 368), F32), ("token_embd.weight.lora_b", (4, 64), F32)],
        "which is the head",
    ),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_tensors_that_do_not_fit(kind: str, model: Header, tmp_path: Path) -> None:
    tensors, said = SHAPES[kind]
    with pytest.raises(ModelFileError, match=said):
        open_lora(_write(tmp_path / "a.gguf", tensors), model)


def _write(path: Path, tensors: list[tuple[str, tuple[int, ...], int]]) -> Path:
    infos, size = [], 0
    for name, shape, kind in tensors:
        infos.append(gguf_bytes.tensor(name, shape, kind, size))
        count = 4
        for length in shape:
            count *= length
        size += -(-count // 32) * 32
    texts = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    path.write_bytes(gguf_bytes.build([gguf_bytes.metadata(key, "str", value) for key, value in texts.items()], infos, bytes(size)))
    return path


def test_norms_are_named_and_not_applied(model: Header, tmp_path: Path) -> None:
    tensors = [(f"{Q}.lora_a", (64, 4), F32), (f"{Q}.lora_b", (4, 64), F32), ("blk.0.attn_norm.weight", (64,), F32)]
    found = opened(_write(tmp_path / "a.gguf", tensors), model)
    assert (found.norms, len(found.pairs)) == (("blk.0.attn_norm.weight",), 1)


def test_no_damage_gets_past_the_check(model: Header, tmp_path: Path) -> None:
    """Whatever is changed in a file, it is refused in good order, or all its factors fit the model's weights."""
    raw = write_random_adapter(tmp_path / "whole.gguf", model).read_bytes()
    path, chance, through, refused = tmp_path / "a.gguf", random.Random(0), 0, list[str]()
    size = read_header(raw, len(raw)).data_offset
    for _ in range(600):
        mutant = bytearray(raw)
        for _ in range(chance.choice((1, 1, 2, 4))):
            at = chance.randrange(size)
            if chance.random() < 0.1:
                del mutant[chance.randrange(len(mutant)) :]
            else:
                mutant[at : at + 1] = bytes([chance.choice((0, 1, 2, 8, 32, 64, 65, 255, chance.randrange(256)))])
        path.write_bytes(mutant)
        try:
            found = opened(path, model)
        except ModelFileError as error:
            refused.append(str(error))
            continue
        through += 1
        for pair in found.pairs:
            assert pair.a.shape == (model.tensors[pair.base].shape[0], pair.rank)
            assert pair.b.shape == (pair.rank, model.tensors[pair.base].shape[1])
    assert 0 < through < 500
    assert [said for said in refused if "\n" in said] == []


def test_an_adapter_is_no_model(model: Header, tmp_path: Path) -> None:
    with ModelFile.open(write_random_adapter(tmp_path / "a.gguf", model)) as file, pytest.raises(ModelFileError, match="a LoRA adapter"):
        model_file.check_metadata(file)
