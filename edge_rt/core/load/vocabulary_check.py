"""Checks a model's vocabulary before libllama reads it: libllama asserts, or lets C++ exceptions out, on vocabularies it calls impossible.

What is refused here would end the process in llama.cpp's ``llama-vocab.cpp`` (ggml 0.25.3): at loading, or later while tokenising.
What libllama itself refuses in good order (an unknown pre-tokenizer, say) is left to it, except where a better sentence is possible.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_rt.core.load.header import Header
from edge_rt.errors import ModelFileError, UnsupportedModel

_SENTENCEPIECE = "llama"
_BYTE_PAIR = ("gpt2", "gemma4")
_NO_TOKENIZER = ("no_vocab", "none")
# These split text at spaces themselves and then trip over libllama's assertion that no part contains one.
_UNSAFE_PRE_TOKENIZERS = ("whitespace",)

_MAX_TOKEN = 1 << 16
# libllama spells an undecodable character of a token out together with the whole token: length squared, in memory.
_MAX_SPELLED = 1 << 28


def check_vocabulary(header: Header) -> None:
    """Raise ModelFileError unless libllama can read the vocabulary and tokenise any text with it; UnsupportedModel for other tokenizers.

    Takes about 15 ms for 49,152 tokens, most of it to find out that none occurs twice.
    """
    model = header.require("tokenizer.ggml.model", str)
    pre = header.optional("tokenizer.ggml.pre", str, "")
    if model in _NO_TOKENIZER:
        raise UnsupportedModel("the model file has no vocabulary; convert the model again with its tokenizer")
    if model != _SENTENCEPIECE and model not in _BYTE_PAIR:
        raise UnsupportedModel(f"the model has a tokenizer of the kind {model!r}; use one with a byte-pair or SentencePiece tokenizer")
    if pre in _UNSAFE_PRE_TOKENIZERS:
        raise UnsupportedModel(f"the model has the pre-tokenizer {pre!r}, which libllama cannot run safely; use another model")
    tokens = _tokens(header)
    _check_columns(header, len(tokens))
    if model in _BYTE_PAIR and pre != "kimi-k2" and header.type_of("tokenizer.ggml.merges") != "[str]":
        raise ModelFileError("the list of merges (tokenizer.ggml.merges) is missing or not text; convert the model again")
    _check_lengths(tokens)
    _check_distinct(tokens, model)


def _tokens(header: Header) -> list[bytes]:
    """The tokens as libllama reads them (up to a NUL). Raises ModelFileError if there are none, or not as many as embeddings."""
    key = "tokenizer.ggml.tokens"
    if header.type_of(key) != "[str]" or not header.count(key):
        raise ModelFileError(f"the list of tokens ({key}) is missing, empty or not text; convert the model again")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and (*embedding.shape, 1, 1, 1)[1:4] != (header.count(key), 1, 1):
        raise ModelFileError(
            f"the model has {header.count(key):,} tokens, but token_embd.weight has the shape {embedding.shape}; convert the model again"
        )
    tokens = header.raw_strings(key)
    if b"\0" in b"".join(tokens):
        tokens = [token.partition(b"\0")[0] for token in tokens]
    return tokens


def _check_columns(header: Header, n_tokens: int) -> None:
    """Scores and token types must cover every token, in the element types libllama reads."""
    for key, types in (("scores", ("[f32]", "[i32]")), ("token_type", ("[i32]",)), ("suppress_tokens", ("[i32]",))):
        found = header.type_of(f"tokenizer.ggml.{key}")
        if found is None:
            continue
        if found not in types:
            raise ModelFileError(f"tokenizer.ggml.{key} has the type {found} where {types[0]} is expected; convert the model again")
        count = header.count(f"tokenizer.ggml.{key}")
        if key != "suppress_tokens" and count < n_tokens:
            raise ModelFileError(f"tokenizer.ggml.{key} has {count:,} entries for {n_tokens:,} tokens; convert the model again")


def _check_lengths(tokens: Sequence[bytes]) -> None:
    """Tokens must not be so long that spelling them out takes gigabytes."""
    longest = max(map(len, tokens))
    if longest > _MAX_TOKEN:
        raise ModelFileError(f"a token is {longest:,} bytes long; the file is damaged")
    if longest * longest * len(tokens) > _MAX_SPELLED and sum(len(token) ** 2 for token in tokens) > _MAX_SPELLED:
        raise ModelFileError("the tokens are too long; the file is damaged")


def _check_distinct(tokens: Sequence[bytes], model: str) -> None:
    """libllama aborts if two tokens have the same text, and its SentencePiece throws at text for which it has no byte token."""
    distinct = set(tokens)
    if b"" in distinct:  # libllama makes up a name
        tokens = [token or b"[EMPTY_%d]" % i for i, token in enumerate(tokens)]
        distinct = set(tokens)
    if len(distinct) != len(tokens):
        seen: set[bytes] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise ModelFileError(f"the token {twice.decode('utf-8', 'replace')!r} occurs twice; convert the model again")
    if model == _SENTENCEPIECE:
        missing = [byte for byte in range(256) if b"<0x%02X>" % byte not in distinct and bytes((byte,)) not in distinct]
        if missing:
            raise ModelFileError(f"the vocabulary has no token for the byte 0x{missing[0]:02X}; convert the model again")
