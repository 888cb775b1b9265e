"""Vocabularies that would end the process in libllama are refused with a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_rt.core.gguf.reader import read_header
from edge_rt.core.gguf.validate import check_vocabulary
from edge_rt.errors import ModelFileError, UnsupportedModel
from edge_rt.testing.gguf_bytes import edit_metadata

T = "tokenizer.ggml."


@pytest.fixture(scope="module", params=["bpe", "spm"])
def raw(request: pytest.FixtureRequest, random_model: Callable[..., Path]) -> bytes:
    return random_model(vocabulary=request.param).read_bytes()


@pytest.fixture(scope="module")
def bpe(random_model: Callable[..., Path]) -> bytes:
    return random_model(vocabulary="bpe").read_bytes()


@pytest.fixture(scope="module")
def spm(random_model: Callable[..., Path]) -> bytes:
    return random_model(vocabulary="spm").read_bytes()


def check(raw: bytes, **changes: tuple[str, Any] | None) -> None:
    edited = edit_metadata(raw, {T + key: change for key, change in changes.items()})
    check_vocabulary(read_header(edited, len(edited)))


def refused(raw: bytes, words: str, kind: type[ModelFileError] = ModelFileError, **changes: tuple[str, Any] | None) -> None:
    with pytest.raises(ModelFileError, match=words) as caught:
        check(raw, **changes)
    assert type(caught.value) is kind


def tokens_of(raw: bytes) -> list[bytes]:
    return read_header(raw, len(raw)).raw_strings(T + "tokens")


def test_sound_vocabularies_pass(raw: bytes) -> None:
    check(raw)


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "plamo2", "whitespace", "hybriddna", "test", "", "none", "no_vocab"])
def test_other_tokenizers(raw: bytes, model: str) -> None:
    refused(raw, "vocabulary" if model in ("none", "no_vocab") else "tokenizer", UnsupportedModel, model=("str", model))


def test_unsafe_pre_tokenizer(bpe: bytes) -> None:
    refused(bpe, "pre-tokenizer 'whitespace'", UnsupportedModel, pre=("str", "whitespace"))


@pytest.mark.parametrize("key", ["model", "pre"])
def test_names_must_be_text(raw: bytes, key: str) -> None:
    refused(raw, f"{key} has type u32", **{key: ("u32", 1)})


def test_tokens_must_be_there(raw: bytes) -> None:
    refused(raw, "list of tokens", tokens=None)
    refused(raw, "list of tokens", tokens=("[str]", []))
    refused(raw, "list of tokens", tokens=("[u32]", [1, 2]))
    refused(raw, "list of tokens", tokens=("str", "a"))
    refused(raw, "tokenizer.ggml.model is missing", model=None)


def test_as_many_tokens_as_embeddings(raw: bytes) -> None:
    refused(raw, r"tokens, but token_embd.weight has the shape \(64,", tokens=("[str]", tokens_of(raw)[:-1]))


def test_no_token_twice(raw: bytes) -> None:
    tokens = tokens_of(raw)
    refused(raw, "occurs twice", tokens=("[str]", [*tokens[:-1], tokens[40]]))


def test_tokens_end_at_a_nul_as_they_do_in_c(raw: bytes) -> None:
    tokens = tokens_of(raw)
    refused(raw, "occurs twice", tokens=("[str]", [*tokens[:-1], tokens[40] + b"\0more"]))
    check(raw, tokens=("[str]", [*tokens[:-1], b"unique\0more"]))


def test_empty_tokens_get_a_name(raw: bytes) -> None:
    tokens = tokens_of(raw)
    last = len(tokens) - 1
    check(raw, tokens=("[str]", [*tokens[:-2], b"", b"\0"]))
    refused(raw, "EMPTY", tokens=("[str]", [*tokens[:-2], b"[EMPTY_%d]" % last, b""]))


def test_very_long_tokens(raw: bytes) -> None:
    tokens = tokens_of(raw)
    refused(raw, "70,000 bytes long", tokens=("[str]", [*tokens[:-1], b"x" * 70000]))
    check(raw, tokens=("[str]", [*tokens[:-1], b"x" * 10000]))
    long = [b"%05d" % i + b"\xff" * 10000 for i in range(10)]
    refused(raw, "too long", tokens=("[str]", [*tokens[:-10], *long]))


@pytest.mark.parametrize(("key", "kind"), [("scores", "[f64]"), ("scores", "f32"), ("token_type", "[u32]"), ("token_type", "i32")])
def test_columns_of_another_type(raw: bytes, key: str, kind: str) -> None:
    refused(raw, f"{key} has the type", **{key: (kind, [1] * len(tokens_of(raw)) if kind.startswith("[") else 1)})


def test_columns_that_are_too_short(raw: bytes) -> None:
    n = len(tokens_of(raw))
    refused(raw, f"scores has {n - 1} entries for {n} tokens", scores=("[f32]", [0.0] * (n - 1)))
    refused(raw, f"token_type has {n - 1} entries for {n} tokens", token_type=("[i32]", [1] * (n - 1)))
    refused(raw, "suppress_tokens has the type", suppress_tokens=("[f32]", [1.0]))
    check(raw, token_type=None, scores=("[i32]", [1] * n), suppress_tokens=("[i32]", [1]))


def test_merges(bpe: bytes, spm: bytes) -> None:
    refused(bpe, "merges", merges=None)
    refused(bpe, "merges", merges=("[u32]", [1]))
    check(bpe, merges=("[str]", ["", " ", "a", "a b c", "\xff"]))  # libllama makes nothing of these, and no harm comes of it
    check(spm, merges=None)


@pytest.mark.parametrize("byte", [0x00, 0x0A, 0xFF])
def test_sentencepiece_needs_every_byte(spm: bytes, byte: int) -> None:
    tokens = [b"other" if token == b"<0x%02X>" % byte else token for token in tokens_of(spm)]
    refused(spm, f"no token for the byte 0x{byte:02X}", tokens=("[str]", tokens))


def test_byte_itself_will_do(spm: bytes) -> None:
    tokens = [b"\x0a" if token == b"<0x0A>" else token for token in tokens_of(spm)]
    check(spm, tokens=("[str]", tokens))
