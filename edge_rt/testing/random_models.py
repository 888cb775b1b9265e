"""Writes random GGUF models of the architectures edge-rt runs: small ones for tests in milliseconds, gigabytes for measurements.

The weights are random but scaled so that a model behaves: logits are finite, of standard deviation 1 to 3, and depend on the
whole context. Adapters and compensations for a model are written in the same way. Use it in a plugin's tests:

>>> from edge_rt.testing.random_models import write_random_model
>>> write_random_model(tmp_path / "tiny.gguf", "qwen3", type="Q4_0")
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edge_rt.core.gguf.lora import EMBEDDING
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.gguf.reader import GGML_TYPES, Header
from edge_rt.core.weights.error_correction import compensation_fingerprint
from edge_rt.errors import OptionError
from edge_rt.testing import gguf_bytes

# ---- vocabularies ----------------------------------------------------------------------------------------------------

Kind = Literal["bpe", "spm"]

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_WORDS = (
    "the and of to in is it that you for with this are on not be as have from one all can will what there which when how an at by we"
    " model device weight token memory answer question hello world"
)
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # llama_token_type


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in order of their ids, with what GGUF says of each."""

    model: str
    tokens: list[str]
    types: list[int]
    bos: int
    eos: int
    pre: str = ""
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def write(self, writer: Any, *, add_eos: bool = False) -> None:
        """Add the metadata to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        if self.pre:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.bos)
        writer.add_eos_token_id(self.eos)
        writer.add_add_bos_token(self.model == "llama")
        if add_eos:
            writer.add_add_eos_token(True)


def make_vocabulary(kind: Kind, size: int | None = None) -> Vocabulary:
    """A byte-level BPE ("bpe") or SentencePiece ("spm") vocabulary of at least 256 bytes, 3 control tokens and some words.

    ``size`` beyond that is filled with words no text is split into (a model can still produce them); less raises ValueError.
    """
    return _byte_pair(size) if kind == "bpe" else _sentence_piece(size)


def _byte_pair(size: int | None) -> Vocabulary:
    letters = _byte_letters()
    tokens = [*CONTROL_TOKENS, *letters.values()]
    merges: list[str] = []
    known = set(tokens)
    for word in _WORDS.split():
        left = letters[ord(" ")]
        for letter in word:
            if left + letter not in known:
                known.add(left + letter)
                tokens.append(left + letter)
                merges.append(f"{left} {letter}")
            left += letter
    n_control = len(CONTROL_TOKENS)
    tokens += _fillers(letters[ord(" ")], len(tokens), size)
    types = [_CONTROL] * n_control + [_NORMAL] * (len(tokens) - n_control)
    return Vocabulary(model="gpt2", pre="smollm", tokens=tokens, types=types, merges=merges, bos=1, eos=2)


def _sentence_piece(size: int | None) -> Vocabulary:
    tokens = ["<unk>", "<s>", "</s>", *CONTROL_TOKENS[1:]]
    types = [_UNKNOWN, *[_CONTROL] * 4]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [_BYTE] * 256
    pieces = dict.fromkeys(["▁", *map(chr, range(0x21, 0x7F))])
    for word in _WORDS.split():  # pieces are joined two at a time: every beginning must be one
        pieces.update(dict.fromkeys("▁" + word[:end] for end in range(1, len(word) + 1)))
    tokens += pieces
    tokens += _fillers("▁", len(tokens), size)
    types += [_NORMAL] * (len(tokens) - len(types))
    return Vocabulary(model="llama", tokens=tokens, types=types, scores=[-float(i) for i in range(len(tokens))], bos=1, eos=2)


def _byte_letters() -> dict[int, str]:
    """GPT-2's table: the visible letter that stands for each byte. Printable Latin-1 stands for itself, the rest is moved up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}


def _fillers(space: str, count: int, size: int | None) -> list[str]:
    if size is not None and size < count:
        raise ValueError(f"the vocabulary needs at least {count} tokens")
    return [f"{space}w{i}" for i in range((size or count) - count)]


# ---- weights ---------------------------------------------------------------------------------------------------------

Array = npt.NDArray[Any]
TYPE_NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()}


@dataclass(frozen=True, slots=True)
class _Block:
    """How to make a block of a quantised type from random bytes.

    ``scale``, ``offset``: where the block's F16 scale and its second F16 (a minimum) lie; ``ratio``: second / first, so that the
    mean is zero; ``deviation``: standard deviation of the weights when the scale is 1 and all other bytes are uniformly random;
    ``signed``: give the scale a random sign, because the codes are not centred on zero.
    """

    scale: int
    deviation: float
    offset: int | None = None
    ratio: float = 0.0
    signed: bool = False


_BLOCKS = {
    "Q4_0": _Block(scale=0, deviation=4.64, signed=True),
    "Q4_1": _Block(scale=0, deviation=4.61, offset=2, ratio=-7.5),
    "Q5_0": _Block(scale=0, deviation=9.25, signed=True),
    "Q5_1": _Block(scale=0, deviation=9.23, offset=2, ratio=-15.5),
    "Q8_0": _Block(scale=0, deviation=73.9, signed=True),
    "IQ4_NL": _Block(scale=0, deviation=68.0, signed=True),
    "Q2_K": _Block(scale=80, deviation=13.9, offset=82, ratio=1.5),
    "Q3_K": _Block(scale=108, deviation=43.3),
    "Q4_K": _Block(scale=0, deviation=258.0, offset=2, ratio=7.5),
    "Q5_K": _Block(scale=0, deviation=526.0, offset=2, ratio=15.5),
    "Q6_K": _Block(scale=208, deviation=1366.0),
}
WEIGHT_TYPES = ("F32", "F16", "BF16", *_BLOCKS)


def random_tensor(name: str, shape: tuple[int, ...], type_name: str, deviation: float, mean: float, seed: int) -> Array:
    """Weights with the given standard deviation: [..., ne1, ne0] for F32 and F16, else bytes [..., ne1, bytes of a row].

    The same name, shape, type and seed give the same tensor. Weights of float types are normal. For quantised types the bytes of
    a block are random and only its scale is set (a tensor is then made as fast as it is written), so their mean is always 0.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    rows = shape[::-1]
    if type_name in _BLOCKS:
        return _random_blocks(rng, rows, type_name, deviation)
    weights = rng.standard_normal(rows, dtype=np.float32)
    weights *= np.float32(deviation)
    weights += np.float32(mean)
    if type_name == "F16":
        return weights.astype(np.float16)
    if type_name == "BF16":  # the upper half of an F32
        return np.ascontiguousarray(weights.view(np.uint16)[..., 1::2]).view(np.uint8)
    return weights


def _random_blocks(rng: np.random.Generator, rows: tuple[int, ...], type_name: str, deviation: float) -> Array:
    spec = _BLOCKS[type_name]
    _, elements, size = GGML_TYPES[TYPE_NUMBERS[type_name]]
    count = int(np.prod(rows)) // elements
    noise = rng.integers(0, 2**64 - 1, -(-count * size // 8), dtype=np.uint64, endpoint=True)  # eight bytes at a time
    blocks = noise.view(np.uint8)[: count * size].reshape(count, size)
    # Scales differ a little from block to block, as they do in real models.
    scale = rng.uniform(0.85, 1.15, count).astype(np.float32) * np.float32(deviation / spec.deviation)
    if spec.signed:
        scale *= rng.integers(0, 2, count).astype(np.float32) * 2 - 1
    blocks[:, spec.scale : spec.scale + 2] = scale.astype(np.float16).view(np.uint8).reshape(count, 2)
    if spec.offset is not None:
        second = scale.astype(np.float16).astype(np.float32) * np.float32(spec.ratio)
        blocks[:, spec.offset : spec.offset + 2] = second.astype(np.float16).view(np.uint8).reshape(count, 2)
    return blocks.reshape(*rows[:-1], rows[-1] // elements * size)


# ---- models ----------------------------------------------------------------------------------------------------------

ARCHITECTURES = ("llama", "deci", "qwen2", "qwen3", "qwen3moe", "gemma")
"""``gemma`` is here because edge-rt has no graph of its own for it: it goes to the fallback engine."""

_LOGIT_DEVIATION = 2.0


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor to write: shape in ggml's order, and how its weights are spread."""

    name: str
    shape: tuple[int, ...]
    type: str
    deviation: float = 0.0
    mean: float = 0.0


@dataclass(frozen=True, slots=True)
class _Plan:
    """The model's measures, after defaults."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: tuple[int, ...]
    n_vocab: int
    n_expert: int
    type: str
    embedding_type: str
    output_type: str
    tied: bool
    bias: bool
    fused_qkv: bool

    @property
    def moe(self) -> bool:
        return self.n_expert > 0


def write_random_model(
    path: str | os.PathLike[str],
    architecture: str = "llama",
    *,
    seed: int = 0,
    n_layer: int = 2,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int | None = None,
    n_ff: int | Sequence[int] = 128,
    n_vocab: int | None = None,
    context: int = 512,
    type: str = "F32",
    embedding_type: str | None = None,
    output_type: str | None = None,
    tied: bool = True,
    bias: bool = False,
    fused_qkv: bool = False,
    rope_base: float = 10000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    rope_freqs: Sequence[float] | None = None,
    n_expert: int = 0,
    n_expert_used: int = 0,
    n_ff_exp: int | None = None,
    alignment: int = 32,
    vocabulary: Kind = "bpe",
    chat_template: str | None = CHATML,
    name: str = "random",
    pooling_type: int | None = None,
    add_eos: bool = False,
) -> Path:
    """Write a model and return its path. The same arguments give the same file.

    ``type`` is the element type of matrices (``embedding_type`` and ``output_type`` default to it); vectors are F32.
    Quantised weights are random blocks with a sane scale, not quantised floats, so K-quants cost no more than others.
    ``rope_scaling`` is ``{"type": "linear" | "yarn", "factor": ..., "original_context": ...}``; ``rope_freqs`` are llama3's
    head_dim / 2 factors. ``bias`` adds attention biases (qwen2 always has them). ``qwen3moe`` defaults to 4 experts, 2 of them used.
    ``pooling_type`` is llama.cpp's number of how embeddings are pooled, ``add_eos`` whether the end-of-text token belongs after a text.
    ``n_ff`` may be of each layer, for deci. ``n_vocab`` None is the vocabulary's own size.
    Raises OptionError for measures that do not fit together.
    """
    if architecture == "qwen3moe" and n_expert == 0:
        n_expert, n_expert_used = 4, 2
    widths = (n_ff,) * n_layer if isinstance(n_ff, int) else tuple(n_ff)
    if len(widths) != n_layer or (len(set(widths)) > 1 and architecture != "deci"):
        raise OptionError(f"n_ff is of {len(widths)} layers; give one for all {n_layer}, or of a deci one for each")
    try:
        words = make_vocabulary(vocabulary, n_vocab)
    except ValueError as error:
        raise OptionError(f"n_vocab is {n_vocab}, but {error}; leave it out or raise it") from None
    plan = _Plan(
        architecture=architecture,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim or n_embd // n_head,
        n_ff=(n_ff_exp,) * n_layer if n_expert and n_ff_exp else widths,
        n_vocab=len(words.tokens),
        n_expert=n_expert,
        type=type,
        embedding_type=embedding_type or type,
        output_type=output_type or type,
        tied=tied or architecture == "gemma",
        bias=bias or architecture == "qwen2",
        fused_qkv=fused_qkv,
    )
    tensors = list(_tensors(plan))
    if rope_freqs is not None:
        tensors.append(_Tensor("rope_freqs.weight", (plan.head_dim // 2,), "F32"))
    _check(plan, n_expert_used, rope_freqs, tensors)

    import gguf

    writer = gguf.GGUFWriter(None, architecture)
    writer.add_custom_alignment(alignment)
    writer.add_name(name)
    _write_hyperparameters(writer, plan, context, rope_base, rope_scaling, n_expert_used)
    if pooling_type is not None:
        writer.add_uint32(f"{architecture}.pooling_type", pooling_type)
    words.write(writer, add_eos=add_eos)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    _write_tensors(writer, Path(path), tensors, rope_freqs, seed)
    return Path(path)


def _check(plan: _Plan, n_expert_used: int, rope_freqs: Sequence[float] | None, tensors: list[_Tensor]) -> None:
    """Raise OptionError for a model no engine could run."""
    if plan.architecture not in ARCHITECTURES:
        raise OptionError(f"there is no random model of architecture {plan.architecture!r}; choose one of {', '.join(ARCHITECTURES)}")
    if plan.n_head % plan.n_head_kv or plan.head_dim % 2:
        raise OptionError(f"{plan.n_head} heads of size {plan.head_dim} cannot share {plan.n_head_kv} key-value heads; change one of them")
    if plan.moe and plan.architecture not in ("llama", "qwen3moe"):
        raise OptionError(f"{plan.architecture} has no experts; use llama or qwen3moe")
    if plan.moe != (n_expert_used > 0) or n_expert_used > plan.n_expert:
        raise OptionError(f"{n_expert_used} of {plan.n_expert} experts cannot be used; give n_expert and n_expert_used together")
    if rope_freqs is not None and len(rope_freqs) != plan.head_dim // 2:
        raise OptionError(f"rope_freqs has {len(rope_freqs)} factors; give head_dim / 2 = {plan.head_dim // 2}")
    blocks = {type_name: block for type_name, block, _ in GGML_TYPES.values()}
    for tensor in tensors:
        if tensor.type not in WEIGHT_TYPES:
            raise OptionError(f"random weights of type {tensor.type} cannot be made; choose one of {', '.join(WEIGHT_TYPES)}")
        if tensor.shape[0] % blocks[tensor.type]:
            raise OptionError(f"{tensor.name} has rows of {tensor.shape[0]}, no multiple of the {tensor.type} block; change n_embd or n_ff")


def _tensors(plan: _Plan) -> Iterator[_Tensor]:
    """Every tensor, in the order the forward pass touches them (which is file order)."""
    # Logits are the normalised hidden state times these rows: their standard deviation is sqrt(n_embd) times the rows'.
    embedding_deviation = _LOGIT_DEVIATION / math.sqrt(plan.n_embd)
    yield _Tensor("token_embd.weight", (plan.n_embd, plan.n_vocab), plan.embedding_type, embedding_deviation)
    for i in range(plan.n_layer):
        for tensor in (*_attention(plan), *_feed_forward(plan, plan.n_ff[i])):
            yield _Tensor(f"blk.{i}.{tensor.name}", tensor.shape, tensor.type, tensor.deviation, tensor.mean)
    yield _norm("output_norm.weight", plan.n_embd)
    if not plan.tied:
        yield _Tensor("output.weight", (plan.n_embd, plan.n_vocab), plan.output_type, embedding_deviation)


def _norm(name: str, size: int, mean: float = 1.0) -> _Tensor:
    return _Tensor(name, (size,), "F32", 0.1, mean)


def _matrix(plan: _Plan, name: str, rows: int, columns: int, gain: float = 1.0) -> _Tensor:
    """A matrix from ``rows`` inputs to ``columns`` outputs that gives inputs of size 1 outputs of size ``gain``."""
    return _Tensor(name, (rows, columns), plan.type, gain / math.sqrt(rows))


def _attention(plan: _Plan) -> Iterator[_Tensor]:
    query, cells = plan.n_head * plan.head_dim, plan.n_head_kv * plan.head_dim
    yield _norm("attn_norm.weight", plan.n_embd)
    # Queries and keys of 1.5 make scores of about 2: neither an average over the context nor a single cell.
    parts = {"attn_q": (query, 1.5), "attn_k": (cells, 1.5), "attn_v": (cells, 1.0)}
    if plan.fused_qkv:
        parts = {"attn_qkv": (query + 2 * cells, 1.3)}
    for name, (size, gain) in parts.items():
        yield _matrix(plan, f"{name}.weight", plan.n_embd, size, gain)
    if plan.bias:
        for name, (size, _) in parts.items():
            yield _Tensor(f"{name}.bias", (size,), "F32", 0.3)
    if plan.architecture.startswith("qwen3"):
        yield _norm("attn_q_norm.weight", plan.head_dim, 1.5)
        yield _norm("attn_k_norm.weight", plan.head_dim, 1.5)
    yield _matrix(plan, "attn_output.weight", query, plan.n_embd, _residual_gain(plan))
    if plan.bias and plan.architecture in ("llama", "deci"):
        yield _Tensor("attn_output.bias", (plan.n_embd,), "F32", 0.1)


def _feed_forward(plan: _Plan, n_ff: int) -> Iterator[_Tensor]:
    yield _norm("ffn_norm.weight", plan.n_embd)
    experts: tuple[int, ...] = ()
    if plan.moe:
        yield _Tensor("ffn_gate_inp.weight", (plan.n_embd, plan.n_expert), "F32", 1.5 / math.sqrt(plan.n_embd))
        experts = (plan.n_expert,)
    suffix = "_exps" if plan.moe else ""
    # silu(gate) * up is about half as large as its factors: the way down makes up for it.
    gains = {"gate": 1.0, "up": 1.0, "down": 2 * _residual_gain(plan)}
    for name, gain in gains.items():
        rows, columns = (n_ff, plan.n_embd) if name == "down" else (plan.n_embd, n_ff)
        matrix = _matrix(plan, f"ffn_{name}{suffix}.weight", rows, columns, gain)
        yield _Tensor(matrix.name, (*matrix.shape, *experts), matrix.type, matrix.deviation)


def _residual_gain(plan: _Plan) -> float:
    """How much a block adds to the hidden state: more than the embedding, or a tied model would only repeat its input."""
    return 4.0 if plan.architecture == "gemma" else 1.0  # gemma scales its embedding by sqrt(n_embd)


def _write_hyperparameters(
    writer: Any, plan: _Plan, context: int, rope_base: float, rope_scaling: Mapping[str, Any] | None, n_expert_used: int
) -> None:
    """Add what llama.cpp needs to know of the architecture."""
    import gguf

    writer.add_context_length(context)
    writer.add_embedding_length(plan.n_embd)
    writer.add_block_count(plan.n_layer)
    writer.add_feed_forward_length(list(plan.n_ff) if plan.architecture == "deci" else plan.n_ff[0])
    writer.add_head_count(plan.n_head)
    writer.add_head_count_kv(plan.n_head_kv)
    writer.add_key_length(plan.head_dim)
    writer.add_value_length(plan.head_dim)
    writer.add_rope_dimension_count(plan.head_dim)
    writer.add_rope_freq_base(rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(plan.n_vocab)
    writer.add_quantization_version(2)
    if plan.moe:
        writer.add_expert_count(plan.n_expert)
        writer.add_expert_used_count(n_expert_used)
        if plan.architecture == "qwen3moe":
            writer.add_expert_feed_forward_length(plan.n_ff[0])
    if rope_scaling is not None:
        kinds = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
        if rope_scaling.get("type") not in kinds or not rope_scaling.get("factor", 0) > 0:
            raise OptionError(f"rope_scaling is {dict(rope_scaling)}; give a type ({' or '.join(kinds)}) and a positive factor")
        writer.add_rope_scaling_type(kinds[rope_scaling["type"]])
        writer.add_rope_scaling_factor(float(rope_scaling["factor"]))
        if "original_context" in rope_scaling:
            writer.add_rope_scaling_orig_ctx_len(int(rope_scaling["original_context"]))


def _write_tensors(writer: Any, path: Path, tensors: list[_Tensor], rope_freqs: Sequence[float] | None, seed: int) -> None:
    """Make and write one tensor after the other: memory holds the largest one, not the model."""
    import gguf

    numbers = {type_name: (number, block, size) for number, (type_name, block, size) in GGML_TYPES.items()}
    for tensor in tensors:
        number, block, size = numbers[tensor.type]
        *outer, row = reversed(tensor.shape)
        dtype = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}.get(tensor.type, np.dtype(np.uint8))
        shape = (*outer, row // block * size) if dtype == np.uint8 else (*outer, row)
        nbytes = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(tensor.name, shape, dtype, nbytes, gguf.GGMLQuantizationType(number) if dtype == np.uint8 else None)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        if tensor.name == "rope_freqs.weight":
            writer.write_tensor_data(np.asarray(rope_freqs, dtype=np.float32))
        else:
            writer.write_tensor_data(random_tensor(tensor.name, tensor.shape, tensor.type, tensor.deviation, tensor.mean, seed))
    writer.close()


# ---- adapters and compensations --------------------------------------------------------------------------------------


class _RandomTensors:
    """Tensors of normal numbers, collected for a file."""

    def __init__(self, seed: int) -> None:
        self._rng, self._infos, self._data = np.random.default_rng(seed), list[bytes](), bytearray()

    def add(self, name: str, shape: tuple[int, ...], deviation: float, type: str) -> None:
        """Add a tensor: shape in ggml's order, F32, F16 or Q8_0."""
        import gguf

        kind = gguf.GGMLQuantizationType[type]
        values = (self._rng.standard_normal(shape[::-1]) * deviation).astype(np.float32)
        self._infos.append(gguf_bytes.tensor(name, shape, int(kind), len(self._data)))
        self._data.extend(gguf.quants.quantize(values, kind).tobytes())
        self._data.extend(bytes(-len(self._data) % 32))

    def write(self, path: str | os.PathLike[str], entries: Mapping[str, tuple[str, Any] | None]) -> Path:
        """Write a file with these metadata, as (kind, value); None is left out."""
        values = [gguf_bytes.metadata(key, *entry) for key, entry in entries.items() if entry is not None]
        Path(path).write_bytes(gguf_bytes.build(values, self._infos, bytes(self._data)))
        return Path(path)


LINEAR = r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.weight"
"""Matrices of a block, the usual targets."""


def write_random_adapter(
    path: str | os.PathLike[str],
    model: Header,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float | None = 8.0,
    gain: float = 0.3,
    target: str = LINEAR,
    type: str = "F32",
    changes: Mapping[str, tuple[str, Any] | None] | None = None,
) -> Path:
    """Write an adapter of every weight whose name matches ``target``, and return its path. The same arguments give the same file.

    ``gain``: how large what it adds is beside inputs of size 1, before the scale; 0: B is all zeros. ``type``: F32, F16 or Q8_0.
    ``changes`` replaces metadata, as (kind, value), or leaves it out (None).
    """
    made = _RandomTensors(seed)
    for base, info in model.tensors.items():
        if not re.fullmatch(target, base):
            continue
        inner, outer, *more = info.shape
        a, b = ((rank, outer), (rank, inner)) if base == EMBEDDING else ((inner, rank), (rank, outer))
        made.add(f"{base}.lora_a", (*a, *more), 1 if base == EMBEDDING else 1 / math.sqrt(inner), type)
        made.add(f"{base}.lora_b", (*b, *more), gain / math.sqrt(rank), type)
    entries: dict[str, tuple[str, Any] | None] = {
        "general.architecture": ("str", model.architecture),
        "general.type": ("str", "adapter"),
        "adapter.type": ("str", "lora"),
        "adapter.lora.alpha": ("f32", alpha) if alpha is not None else None,
        **(changes or {}),
    }
    return made.write(path, entries)


SITES = r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight"
"""All weights that can be corrected."""


def write_random_compensation(
    path: str | os.PathLike[str],
    model: ModelFile,
    *,
    seed: int = 0,
    rank: int = 4,
    rows: int = 4,
    offsets: bool = True,
    bias: bool = True,
    gain: float = 0.3,
    target: str = SITES,
    type: str = "F32",
    changes: Mapping[str, tuple[str, Any] | None] | None = None,
) -> Path:
    """Write a compensation of every weight whose name matches ``target``, and return its path. The same arguments give the same file.

    ``rank`` of the low-rank terms and ``rows`` of the tables: 0 for none. ``gain``: how large what each kind adds is beside inputs of size
    1. ``type`` of matrices: F32, F16 or Q8_0. ``changes`` replaces metadata, as (kind, value), or leaves it out (None).
    """
    made = _RandomTensors(seed)
    for weight, info in model.header.tensors.items():
        if not re.fullmatch(target, weight):
            continue
        (inner, outer), site = info.shape, weight.removesuffix(".weight")
        if rank:
            made.add(f"{site}.low_a", (inner, rank), 1 / math.sqrt(inner), type)
            made.add(f"{site}.low_b", (rank, outer), gain / math.sqrt(rank), type)
        if rows:
            made.add(f"{site}.centroids", (inner, rows), 1 / math.sqrt(inner), type)
            if offsets:
                made.add(f"{site}.offsets", (rows,), 0.3, "F32")
            made.add(f"{site}.rows", (outer, rows), gain, type)
        if bias:
            made.add(f"{site}.bias", (outer,), gain, "F32")
    entries: dict[str, tuple[str, Any] | None] = {
        "general.architecture": ("str", model.header.architecture),
        "general.type": ("str", "compensation"),
        "edge_rt.compensation.version": ("u32", 1),
        "edge_rt.compensation.model": ("str", compensation_fingerprint(model)),
        **(changes or {}),
    }
    return made.write(path, entries)
