"""Hyperparameters that would end the process in ggml are refused with a sentence."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_rt.core.gguf.reader import read_header
from edge_rt.core.gguf.validate import check_hyperparameters
from edge_rt.errors import ModelFileError, UnsupportedModel
from edge_rt.testing.gguf_bytes import edit_metadata
from edge_rt.testing.random_models import ARCHITECTURES


@pytest.fixture(scope="module")
def dense(random_model: Callable[..., Path]) -> bytes:
    return random_model().read_bytes()


@pytest.fixture(scope="module")
def experts(random_model: Callable[..., Path]) -> bytes:
    return random_model(n_expert=4, n_expert_used=2).read_bytes()


@pytest.fixture(scope="module")
def gemma(random_model: Callable[..., Path]) -> bytes:
    return random_model("gemma").read_bytes()


def check(raw: bytes, **changes: tuple[str, Any] | None) -> None:
    """Changes to the architecture's own keys; a dot is written as two underscores."""
    architecture = read_header(raw, len(raw)).architecture
    edited = edit_metadata(raw, {f"{architecture}.{key.replace('__', '.')}": change for key, change in changes.items()})
    check_hyperparameters(read_header(edited, len(edited)))


def refused(raw: bytes, words: str, kind: type[ModelFileError] = ModelFileError, **changes: tuple[str, Any] | None) -> None:
    with pytest.raises(ModelFileError, match=words) as caught:
        check(raw, **changes)
    assert type(caught.value) is kind


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sound_models_pass(architecture: str, random_model: Callable[..., Path]) -> None:
    check(random_model(architecture).read_bytes())


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "context_length"])
@pytest.mark.parametrize("value", [("u32", 0), ("u32", 2**32 - 1), ("i64", -1), ("str", "2"), ("f32", 2.0), ("[u32]", [2]), None])
def test_sizes(dense: bytes, key: str, value: tuple[str, Any] | None) -> None:
    refused(dense, key, **{key: value})


def test_too_many_layers(dense: bytes) -> None:
    refused(dense, "block_count is 513", block_count=("u32", 513))
    refused(dense, "nextn_predict_layers is 3", nextn_predict_layers=("u32", 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(dense: bytes, value: float) -> None:
    refused(dense, "freq_base", rope__freq_base=("f32", value))
    refused(dense, "anything.at_all", anything__at_all=("[f32]", [1.0, value]))


def test_epsilon_must_not_be_negative(dense: bytes) -> None:
    refused(dense, "epsilon", attention__layer_norm_rms_epsilon=("f32", -1e-5))
    refused(dense, "epsilon", attention__layer_norm_rms_epsilon=("i8", -1))
    check(dense, attention__layer_norm_rms_epsilon=("f32", 0.0))


def test_heads(dense: bytes) -> None:
    refused(dense, "4 attention heads cannot share 3", attention__head_count_kv=("u32", 3))
    refused(dense, "4 attention heads cannot share 8", attention__head_count_kv=("u32", 8))
    refused(dense, "4 attention heads cannot share 3", attention__head_count=("[u32]", [4, 4]), attention__head_count_kv=("[u32]", [2, 3]))
    refused(dense, "4 attention heads cannot share 3", attention__head_count_kv=("[u32]", [2, 3]))
    refused(dense, "head_count is", attention__head_count=("[u32]", [4, 4, 4]))
    refused(dense, "head_count is", attention__head_count=("[i32]", [4, -4]))
    refused(dense, "head_count is", attention__head_count=("[u32]", []))
    refused(dense, "head_count is not a number", attention__head_count=("str", "4"))
    refused(dense, "attn_q.weight has the shape .* where 80 columns", attention__head_count=("u32", 5), attention__head_count_kv=("u32", 1))
    refused(dense, "attn_k.weight has the shape .* where 16 columns", attention__head_count_kv=("u32", 1))
    check(dense, attention__head_count=("[u32]", [4, 0]), attention__head_count_kv=("[u32]", [2, 0]))
    check(dense, attention__head_count=("u32", 0))


def test_head_sizes(dense: bytes, gemma: bytes) -> None:
    refused(dense, "do not fit llama", attention__key_length=("u32", 32), rope__dimension_count=("u32", 32))
    refused(dense, "do not fit llama", attention__value_length=("u32", 32))
    refused(dense, "do not fit llama", rope__dimension_count=("u32", 8))
    check(gemma, rope__dimension_count=("u32", 8))
    refused(gemma, "15 of 16 dimensions", rope__dimension_count=("u32", 15))
    refused(gemma, "rope.dimension_count is 0", rope__dimension_count=("u32", 0))
    refused(gemma, "rope.dimension_count_swa is 0", rope__dimension_count_swa=("u32", 0))
    refused(gemma, "18 of 16 dimensions", rope__dimension_count=("u32", 18))


def test_experts(experts: bytes, dense: bytes, gemma: bytes) -> None:
    check(experts)
    refused(experts, "uses 5 of 4", expert_used_count=("u32", 5))
    refused(experts, "uses 0 of 4", expert_used_count=("u32", 0))
    refused(experts, "uses 5 of 4", expert_used_count=("[u32]", [2, 5]))
    refused(experts, "expert_count is 1025", expert_count=("u32", 1025))
    refused(experts, "2 of 3 groups of 4", expert_group_count=("u32", 3), expert_group_used_count=("u32", 2))
    refused(experts, "2 of 2 groups of 4", expert_group_count=("u32", 2), expert_group_used_count=("u32", 2))
    refused(experts, "0 of 4 groups of 4", expert_group_count=("u32", 4))
    check(experts, expert_group_count=("u32", 2), expert_group_used_count=("u32", 1))
    refused(dense, "uses 2 of 0", expert_used_count=("u32", 2))
    refused(gemma, "0 of 1 groups of 0", expert_group_count=("u32", 1))


def test_rope_scaling(dense: bytes) -> None:
    for known in ("none", "linear", "yarn", "longrope"):
        check(dense, rope__scaling__type=("str", known))
    refused(dense, "unknown method 'magic'", UnsupportedModel, rope__scaling__type=("str", "magic"))
    refused(dense, "unknown method 3", UnsupportedModel, rope__scaling__type=("u32", 3))


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("blk.0.attn_norm.weight", 0, 26, "is I32 where F32"),
        ("blk.1.attn_q.weight", 0, 26, "is I32 where a floating-point"),
        ("blk.1.ffn_up.weight", 0, 26, "is I32 where a floating-point"),
        ("token_embd.weight", 0, 26, "is I32 where a floating-point"),
    ],
)
def test_weights_without_kernels(dense: bytes, name: str, old: int, new: int, words: str) -> None:
    shape = read_header(dense, len(dense)).tensors[name].shape
    before, after = (name.encode() + struct.pack(f"<I{len(shape)}QI", len(shape), *shape, kind) for kind in (old, new))
    assert dense.count(before) == 1
    refused(dense.replace(before, after), f"{name} {words}", UnsupportedModel)


def test_norms_and_biases_are_f32(random_model: Callable[..., Path]) -> None:
    raw = random_model("qwen2").read_bytes()
    header = read_header(raw, len(raw))
    for name in ("blk.0.attn_q.bias", "output_norm.weight"):
        size = header.tensors[name].shape[0]
        before, after = (name.encode() + struct.pack("<IQI", 1, size, kind) for kind in (0, 1))
        assert raw.count(before) == 1
        refused(raw.replace(before, after), f"{name} is F16 where F32", UnsupportedModel)


def test_tensors_aligned_for_ggml(random_model: Callable[..., Path]) -> None:
    for alignment in (8, 16):
        raw = random_model(alignment=alignment, n_embd=36, n_head=2, n_vocab=371).read_bytes()
        with pytest.raises(ModelFileError, match="multiple of 32 bytes"):
            check_hyperparameters(read_header(raw, len(raw)))
