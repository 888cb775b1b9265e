"""Checks hyperparameters, weight types and vocabulary before native code, which ends the process on bad ones, reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edge_rt.core.gguf.reader import Header
from edge_rt.errors import ModelFileError, UnsupportedModel

# Checks hyperparameters and weight types before any engine builds a graph: ggml ends the process when they do not fit together.
#
# Each rule stands for an assertion (or a null kernel) in llama.cpp (ggml 0.25.3) that a damaged file could reach.
# What llama.cpp or an engine of ours refuses in good order, such as a tensor of the wrong shape, is left to it.

MAX_LAYERS = 512
MAX_EXPERTS = 1024
_MOST = 2**31 - 1
_GGML_ALIGNMENT = 32

_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_NOT_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})
"""Types without a matrix product: ggml would call a null pointer."""

_MAY_BE_INTEGER = ("_tid2eid.weight", "d2t")
"""Look-up tables of a few architectures, which no product touches."""

_OPTIONAL_EXPERTS = ("hunyuan_vl", "hunyuan-dense")
"""Here an expert count of 1 means none."""

_FULL_ROTATION = (
    "apertus arcee arctic baichuan chameleon codeshell cogvlm cohere2moe dbrx deci deepseek dots1 dream ernie4_5 ernie4_5-moe exaone"
    " exaone-moe exaone4 falcon granite graniteswitch granite_swa grok grovemoe hunyuan-moe hunyuan_vl hy_v3 internlm2 jais2 llada"
    " llada-moe llama llama4 maincoder mellum mistral3 olmo olmo2 olmoe orion paddleocr pangu-embedded plamo qwen2 qwen2moe qwen2vl"
    " qwen3 qwen3moe qwen3vl qwen3vlmoe rnd1 seed_oss smallthinker smollm3 starcoder2 talkie xverse"
)
"""Architectures, between spaces, whose graph in llama.cpp asserts that keys, values and rotary dimensions have one size."""

_PLAIN_ATTENTION = _FULL_ROTATION + (
    " bloom chatglm cohere2 command-r deepseek2-ocr gemma gpt2 gptneox jais jamba lfm2 lfm2moe mpt nemotron phi2 phi3 phimoe qwen"
    " stablelm starcoder"
)
"""Architectures whose projections have heads times head size columns, which llama.cpp takes for granted in some of them."""


def check_hyperparameters(header: Header) -> None:
    """Raise ModelFileError for hyperparameters that would abort ggml, UnsupportedModel for weights of a type it has no kernels for.

    Architectures without a rule of their own (recurrent ones, say) are checked only as far as the rules are common to all.
    """
    numbers = _Numbers(header)
    numbers.check_ranges()
    n_layer = numbers.scalar("block_count", 1, MAX_LAYERS)
    numbers.scalar("embedding_length", 1, _MOST)
    numbers.scalar("context_length", 1, _MOST)
    numbers.scalar("nextn_predict_layers", 0, n_layer, default=0)
    _check_heads(numbers, header.architecture, n_layer)
    if header.architecture not in _OPTIONAL_EXPERTS:
        _check_experts(numbers, n_layer)
    scaling = header.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling not in _ROPE_SCALINGS:
        raise UnsupportedModel(f"the model scales rotary positions by the unknown method {scaling!r}; update edge-rt")
    _check_weights(header)


class _Numbers:
    """The numbers under the architecture's name: each a scalar, or an array with an element for each layer."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.prefix = f"{header.architecture}."

    def wrong(self, key: str, value: Any) -> ModelFileError:
        return ModelFileError(f"{self.prefix}{key} is {value}, which is impossible; the file is damaged")

    def check_ranges(self) -> None:
        """Every number must be finite and fit an int; an epsilon must not be negative."""
        for key in self.header:
            if not key.startswith(self.prefix):
                continue
            value = self.header.get(key)
            for number in value if isinstance(value, list) else (value,):
                if not isinstance(number, int | float):
                    continue
                too_big = isinstance(number, int) and abs(number) > _MOST
                if too_big or not math.isfinite(number) or (number < 0 and key.endswith("epsilon")):
                    raise self.wrong(key.removeprefix(self.prefix), number)

    def scalar(self, key: str, least: int, most: int, default: int | None = None) -> int:
        """One whole number within bounds. Raises ModelFileError."""
        if default is not None and f"{self.prefix}{key}" not in self.header:
            return default
        value = self.header.require(f"{self.prefix}{key}", int)
        if not least <= value <= most:
            raise self.wrong(key, value)
        return value

    def layers(self, key: str, n_layer: int) -> list[int] | None:
        """A whole number for each layer, written as such or as one for all. None if absent. Raises ModelFileError."""
        value = self.header.get(f"{self.prefix}{key}")
        if value is None:
            return None
        values = value if isinstance(value, list) else [value] * n_layer
        if len(values) != n_layer or not all(isinstance(number, int) and number >= 0 for number in values):
            raise self.wrong(key, "not a number" if isinstance(value, str) else value)
        return values


def _check_heads(numbers: _Numbers, architecture: str, n_layer: int) -> None:
    """Query heads must divide among key-value heads, and the parts of a head have sizes that fit together."""
    heads = numbers.layers("attention.head_count", n_layer)
    if heads is None or not max(heads):
        return  # not a transformer; libllama then ignores the rest
    kv_heads = numbers.layers("attention.head_count_kv", n_layer) or heads
    for query, kv in zip(heads, kv_heads, strict=True):
        if query and kv and query % kv:
            raise ModelFileError(f"{query} attention heads cannot share {kv} key-value heads; the file is damaged")
    if not heads[0]:
        return
    embedding = numbers.scalar("embedding_length", 1, _MOST)
    default = embedding // heads[0]
    key_length = numbers.scalar("attention.key_length", 1, _MOST, default=default)
    value_length = numbers.scalar("attention.value_length", 1, _MOST, default=default)
    rotated = numbers.scalar("rope.dimension_count", 2, _MOST, default=key_length)  # 0: ggml would loop for ever
    rotated_in_window = numbers.scalar("rope.dimension_count_swa", 2, _MOST, default=rotated)
    if rotated % 2 or rotated_in_window % 2 or rotated > key_length or not key_length:
        raise ModelFileError(f"{rotated} of {key_length} dimensions of a head are to be rotated, which is impossible; the file is damaged")
    if architecture in _FULL_ROTATION.split() and not key_length == value_length == rotated:
        raise ModelFileError(
            f"heads with keys of {key_length}, values of {value_length} and {rotated} rotary dimensions do not fit {architecture};"
            " the file is damaged"
        )
    if architecture in _PLAIN_ATTENTION.split():
        for layer, (query, kv) in enumerate(zip(heads, kv_heads, strict=True)):
            _check_projections(numbers.header, f"blk.{layer}.attn", query * key_length, kv * key_length, kv * value_length)


def _check_projections(header: Header, prefix: str, query: int, key: int, value: int) -> None:
    """The projections of one block must have as many columns as its heads have elements."""
    columns = {"q": query, "k": key, "v": value, "qkv": query + key + value}
    for name, expected in columns.items():
        info = header.tensors.get(f"{prefix}_{name}.weight")
        if info is not None and query and (len(info.shape) < 2 or info.shape[1] != expected):
            raise ModelFileError(f"{info.name} has the shape {info.shape} where {expected} columns are expected; the file is damaged")


def _check_experts(numbers: _Numbers, n_layer: int) -> None:
    """Experts in use must exist, and groups of experts be equal."""
    count = numbers.scalar("expert_count", 0, MAX_EXPERTS, default=0)
    used = max(numbers.layers("expert_used_count", n_layer) or [0])
    groups = numbers.scalar("expert_group_count", 0, _MOST, default=0)
    groups_used = numbers.scalar("expert_group_used_count", 0, _MOST, default=0)
    if used > count or (count and not used):
        raise ModelFileError(f"the model uses {used} of {count} experts, which is impossible; the file is damaged")
    if groups and (groups >= count or (groups > 1 and (count % groups or not 0 < groups_used < groups))):
        raise ModelFileError(f"the model uses {groups_used} of {groups} groups of {count} experts; the file is damaged")


def _check_weights(header: Header) -> None:
    """Matrices need a type with kernels; vectors (norms, biases) are added and multiplied as F32; all must be aligned for ggml."""
    for info in header.tensors.values():
        if info.offset % _GGML_ALIGNMENT:
            raise ModelFileError(f"the tensor {info.name} does not start on a multiple of {_GGML_ALIGNMENT} bytes; convert the model again")
        if info.name.endswith(_MAY_BE_INTEGER):
            continue
        vector = len(info.shape) == 1 or "norm" in info.name or info.name.endswith(".bias")
        if info.type_name in _NOT_WEIGHTS or (vector and info.type_name != "F32"):
            wanted = "F32" if vector else "a floating-point or quantised type"
            raise UnsupportedModel(f"the tensor {info.name} is {info.type_name} where {wanted} is needed; convert the model again")


# Checks a model's vocabulary before libllama reads it: libllama asserts, or lets C++ exceptions out, on vocabularies it calls impossible.
#
# What is refused here would end the process in llama.cpp's ``llama-vocab.cpp`` (ggml 0.25.3): at loading, or later while tokenising.
# What libllama itself refuses in good order (an unknown pre-tokenizer, say) is left to it, except where a better sentence is possible.

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
