"""What a graph must know of a model: sizes and constants from the GGUF metadata, and the shapes its tensors must have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.core.gguf.reader import FOLDED
from edge_rt.errors import ModelFileError, OptionError, UnsupportedModel

if TYPE_CHECKING:
    from edge_rt.core.gguf.reader import Header, TensorInfo
    from edge_rt.core.graph.decoder import Family

# What a graph must know of a model: sizes and constants from the GGUF metadata, checked before any tensor is made.

MAX_LAYERS, MAX_EXPERTS = 512, 1024
TOGETHER = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))
"""Products of a block that share their input, and so can be one."""


class Rope(NamedTuple):
    """Rotary embedding: the arguments of ggml_rope_ext. Scaling follows YaRN (Peng et al. 2023) as llama.cpp applies it."""

    dims: int
    base: float
    scale: float
    original_context: int
    ext_factor: float
    attn_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0


class FusedTensors(NamedTuple):
    """What a graph does in fewer nodes. ``joined``: which of TOGETHER become one product, their names joined by "|", where the weights
    lie side by side; None: all. ``folded``: names of norms whose scales are all one, so that nothing is multiplied with them.
    """

    joined: frozenset[str] | None = None
    folded: frozenset[str] = frozenset()


class ModelConfig(NamedTuple):
    """Sizes of a decoder-only transformer. ``n_ff``: where blocks differ, of the widest. ``n_expert`` 0: a dense feed-forward network."""

    architecture: str
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_expert: int
    n_expert_used: int
    eps: float
    attention_scale: float
    train_context: int
    rope: Rope
    fused: FusedTensors = FusedTensors()

    @property
    def kv_width(self) -> int:
        """Elements of one cell's keys (or values) in one layer."""
        return self.n_head_kv * self.head_dim


def read_config(header: Header) -> ModelConfig:
    """Read and check the hyperparameters. Raises ModelFileError (damaged) or UnsupportedModel (sound, but no graph here)."""
    arch = header.architecture
    whole = _Reader(header, arch)
    n_embd, n_layer, n_head = whole.count("embedding_length"), whole.count("block_count"), whole.alike("attention.head_count")
    n_head_kv = whole.alike("attention.head_count_kv", n_head)
    head_dim = whole.count("attention.key_length", max(1, n_embd // n_head))
    if whole.count("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"keys and values of {arch} differ in size; run it with --engine llama_cpp")
    if n_layer > MAX_LAYERS:
        raise ModelFileError(f"{arch}.block_count is {n_layer}, more than {MAX_LAYERS}; the file is damaged")
    if n_head % n_head_kv:
        raise ModelFileError(f"{n_head} attention heads cannot share {n_head_kv} key-value heads; the file is damaged")
    n_expert = whole.count("expert_count", 0, least=0)
    n_expert_used = whole.count("expert_used_count", 0, least=0)
    if n_expert > MAX_EXPERTS or n_expert_used > n_expert or (n_expert and not n_expert_used):
        raise ModelFileError(f"{arch} uses {n_expert_used} of {n_expert} experts; the file is damaged")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[0] != n_embd:
        raise ModelFileError("token_embd.weight is missing or has the wrong shape; the file is damaged")
    scale = whole.real("attention.scale", 0.0) if arch == "llama" else 0.0
    return ModelConfig(
        architecture=arch, n_vocab=embedding.shape[1], n_embd=n_embd, n_layer=n_layer, n_head=n_head, n_head_kv=n_head_kv,
        head_dim=head_dim, n_ff=whole.widest("feed_forward_length"), n_expert=n_expert, n_expert_used=n_expert_used,
        eps=whole.real("attention.layer_norm_rms_epsilon"), attention_scale=scale or 1.0 / math.sqrt(head_dim),
        train_context=whole.count("context_length"), rope=_rope(whole, head_dim),
    )  # fmt: skip


def fused(config: ModelConfig, header: Header, extra: Mapping[str, Any]) -> ModelConfig:
    """The same, with what is fused as an engine's settings have it (``ggml.joined``, ``ggml.folded``).

    A plan is not believed alone: that the scales of a norm are all one is said in the file too, by who wrote and looked at them
    (deploy/folding.py). Raises ModelFileError where the file does not say it, OptionError for settings that cannot be.
    """
    joined, folded = extra.get("ggml.joined"), frozenset(extra.get("ggml.folded", ()))
    known = ["|".join(names) for names in TOGETHER]
    if joined is not None and (unknown := sorted(set(joined) - set(known))):
        raise OptionError(f"ggml.joined names {unknown[0]}, and only {' and '.join(known)} can be one product")
    if folded and (unproved := sorted(folded.difference(header.optional(FOLDED, list, [])))):
        raise ModelFileError(f"the plan takes the scales of {unproved[0]} for ones, which the model does not say; compile it again")
    return config._replace(fused=FusedTensors(None if joined is None else frozenset(joined), folded))


def _rope(whole: _Reader, head_dim: int) -> Rope:
    dims = whole.count("rope.dimension_count", head_dim)
    if dims != head_dim:
        raise UnsupportedModel(f"{whole.arch} rotates {dims} of {head_dim} dimensions; run it with --engine llama_cpp")
    kind = whole.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"rope scaling {kind!r} has no graph here; run it with --engine llama_cpp")
    factor = whole.real("rope.scaling.factor", 0.0) or whole.real("rope.scale_linear", 0.0)
    if factor < 0:
        raise ModelFileError(f"{whole.arch}.rope.scaling.factor is {factor}; the file is damaged")
    scale = 1.0 / factor if factor and kind != "none" else 1.0
    train_context = whole.count("context_length")
    return Rope(
        dims=dims,
        base=whole.real("rope.freq_base", 10000.0),
        scale=scale,
        original_context=whole.count("rope.scaling.original_context_length", train_context),
        ext_factor=1.0 if kind == "yarn" else 0.0,
        attn_factor=_yarn_attention_factor(scale, kind) * whole.real("rope.scaling.attn_factor", 1.0),
    )


def _yarn_attention_factor(scale: float, kind: str) -> float:
    """llama.cpp's float32 arithmetic (llama-context.cpp): YaRN's magnitude term, and the division that cancels ggml's own."""
    if kind != "yarn":
        return 1.0
    import numpy as np

    one, tenth = np.float32(1.0), np.float32(0.1)
    factor = one / np.float32(scale)
    magnitude = one if factor <= 1 else tenth * np.log(factor, dtype=np.float32) + one
    return float(magnitude * (one / (one + tenth * np.log(factor, dtype=np.float32))))


class _Reader(NamedTuple):
    """Typed access to ``ARCH.key`` metadata."""

    header: Header
    arch: str

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        value = self.header.get(f"{self.arch}.{key}", default)
        if value is None:
            raise ModelFileError(f"the metadata has no {self.arch}.{key}; the file is damaged or not a language model")
        if isinstance(value, list):
            raise UnsupportedModel(f"{self.arch}.{key} differs from layer to layer; run it with --engine llama_cpp")
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ModelFileError(f"{self.arch}.{key} is not {what}; the file is damaged")
        return value

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        return self._counted(key, self._get(key, default, (int,), "a whole number"), least)

    def _counted(self, key: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise ModelFileError(f"{self.arch}.{key} is {value}; the file is damaged")
        return value

    def _each(self, key: str) -> list[Any]:
        """What is said of one block after the other; empty where it is said once, or not at all."""
        value = self.header.get(f"{self.arch}.{key}", None)
        if isinstance(value, list) and len(value) != self.count("block_count"):
            raise ModelFileError(f"{self.arch}.{key} is of {len(value)} blocks, and the model has others; the file is damaged")
        return value if isinstance(value, list) else []

    def alike(self, key: str, default: int | None = None) -> int:
        """A count that is the same in all blocks, however it is said."""
        each = self._each(key)
        if not each or len(set(each)) > 1:
            return self.count(key, default)
        return self._counted(key, each[0], 1)

    def widest(self, key: str) -> int:
        """The largest of a count that may differ; 0 where nothing is said. A block without is no block of the graphs here."""
        each = self._each(key)
        if 0 in each:
            raise UnsupportedModel(f"a block of {self.arch} has no {key}; run it with --engine llama_cpp")
        return max(self._counted(key, one, 1) for one in each) if each else self.count(key, 0, least=0)

    def real(self, key: str, default: float | None = None) -> float:
        value = float(self._get(key, default, (int, float), "a number"))
        if not math.isfinite(value):
            raise ModelFileError(f"{self.arch}.{key} is {value}; the file is damaged")
        return value

    def text(self, key: str, default: str) -> str:
        return str(self._get(key, default, (str,), "text"))


# Checks that the tensors of a file are the ones a graph multiplies, in the shapes it expects: ggml ends the process otherwise.

Shape = tuple[int, ...]


def check_shapes(tensors: Mapping[str, TensorInfo], config: ModelConfig, family: Family) -> None:
    """Raise ModelFileError for a tensor that is missing or misshapen, UnsupportedModel for one the graph would ignore."""
    required, optional = _whole(config, family)
    for layer in range(config.n_layer):
        in_layer = _block(tensors, f"blk.{layer}", config, family)
        required |= in_layer[0]
        optional |= in_layer[1]
    if missing := next((name for name in required if name not in tensors), None):
        raise ModelFileError(f"the model lacks the tensor {missing}; the file is incomplete, download it again")
    for name, info in tensors.items():
        shape = required.get(name) or optional.get(name)
        if shape is None:
            raise UnsupportedModel(f"no graph here uses the tensor {name}; run it with --engine llama_cpp")
        if _four(info.shape) != _four(shape):
            raise ModelFileError(f"the tensor {name} has the shape {info.shape} where {shape} is expected; the file is damaged")


def _four(shape: Shape) -> Shape:
    return (*shape, 1, 1, 1)[:4]


def _whole(h: ModelConfig, family: Family) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Required and optional tensors outside the blocks: name -> shape."""
    required: dict[str, Shape] = {"token_embd.weight": (h.n_embd, h.n_vocab), "output_norm.weight": (h.n_embd,)}
    optional: dict[str, Shape] = {"output.weight": (h.n_embd, h.n_vocab), "output.bias": (h.n_vocab,)}
    if family.rope_factors:
        optional["rope_freqs.weight"] = (h.rope.dims // 2,)
    return required, optional


def _block(tensors: Mapping[str, TensorInfo], prefix: str, h: ModelConfig, family: Family) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Required and optional tensors of one block: name -> shape. A linear layer's bias is optional."""
    query, kv = h.n_head * h.head_dim, h.kv_width
    norms = {"attn_norm": h.n_embd, "ffn_norm": h.n_embd}
    if family.qk_norm:
        norms |= {"attn_q_norm": h.head_dim, "attn_k_norm": h.head_dim}
    linears: dict[str, Shape] = {"attn_output": (query, h.n_embd)}
    optional: dict[str, Shape] = {}
    if f"{prefix}.attn_qkv.weight" in tensors:
        linears["attn_qkv"] = (h.n_embd, query + 2 * kv)
        optional |= {f"{prefix}.attn_{part}.bias": (query if part == "q" else kv,) for part in "qkv"}
    else:
        linears |= {"attn_q": (h.n_embd, query), "attn_k": (h.n_embd, kv), "attn_v": (h.n_embd, kv)}
    required: dict[str, Shape] = {f"{prefix}.{name}.weight": (size,) for name, size in norms.items()}
    if h.n_expert:
        experts = f"{prefix}.ffn_gate_exps.weight"
        n_ff = _inner(tensors, experts, h.n_ff)
        shape = (h.n_embd, n_ff, h.n_expert)
        required |= {experts: shape, f"{prefix}.ffn_up_exps.weight": shape, f"{prefix}.ffn_down_exps.weight": (n_ff, h.n_embd, h.n_expert)}
        required[f"{prefix}.ffn_gate_inp.weight"] = (h.n_embd, h.n_expert)
    else:
        n_ff = _inner(tensors, f"{prefix}.ffn_gate.weight", h.n_ff)
        linears |= {"ffn_gate": (h.n_embd, n_ff), "ffn_up": (h.n_embd, n_ff), "ffn_down": (n_ff, h.n_embd)}
    required |= {f"{prefix}.{name}.weight": shape for name, shape in linears.items()}
    optional |= {f"{prefix}.{name}.bias": (shape[1],) for name, shape in linears.items()}
    return required, optional


def _inner(tensors: Mapping[str, TensorInfo], gate: str, default: int) -> int:
    """The feed-forward width as the file has it (pruned models differ from block to block, qwen3moe names it elsewhere)."""
    info = tensors.get(gate)
    return info.shape[1] if info and len(info.shape) > 1 else default
