"""The pre-norm decoder: llama (Mistral, SmolLM, TinyLlama, Mixtral), qwen2, qwen3 and qwen3moe are this graph with other parts.

``deci`` is what GGUF calls a llama whose blocks differ in size; here only their feed-forward networks may."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from edge_rt.core.graph import layers
from edge_rt.core.graph.builder import GraphBuilder, c
from edge_rt.core.graph.config import ModelConfig, read_config
from edge_rt.errors import OptionError, UnsupportedModel
from edge_rt.native import ggml

if TYPE_CHECKING:
    from edge_rt.core.gguf.model_file import ModelFile


class Family(NamedTuple):
    """How an architecture differs: rotation of neighbouring pairs or of halves, norms on queries and keys, frequency factors."""

    rope_mode: int
    qk_norm: bool = False
    rope_factors: bool = False


FAMILIES = {
    "llama": Family(ggml.ROPE_NORMAL, rope_factors=True),
    "deci": Family(ggml.ROPE_NORMAL, rope_factors=True),
    "qwen2": Family(ggml.ROPE_NEOX),
    "qwen3": Family(ggml.ROPE_NEOX, qk_norm=True),
    "qwen3moe": Family(ggml.ROPE_NEOX, qk_norm=True),
}


Output = Literal["logits", "hidden"]
"""What a step gives of each wanted token: logits [V], or the normalised hidden state [E] that they are made of."""


def build(b: GraphBuilder, family: Family, output: Output | None) -> int | None:
    """Build one step: x += attention(norm(x)); x += ffn(norm(x)) for each block, then the head. Returns the output's address.

    Without ``output`` the last block only stores its keys and values: that is all a later step needs of this one.
    """
    h = b.config
    b.begin("embedding")
    x = layers.embed(b)  # [E, T]
    for layer in range(h.n_layer):
        prefix, last = f"blk.{layer}", layer == h.n_layer - 1
        x = b.border(x, prefix)
        factors = b.weights.get("rope_freqs.weight") if family.rope_factors else None
        normed = layers.rms_norm(b, x, f"{prefix}.attn_norm.weight")
        q, k, v = rotated(b, normed, prefix, family, factors)
        layers.store_kv(b, layer, k, v)
        layers.keep_queries(b, layer, q)
        if last and output is None:
            return None
        attended = layers.linear(b, layers.attend(b, layer, q), f"{prefix}.attn_output")
        if last:
            attended, x = b.wanted_rows(attended), b.wanted_rows(x)
        x = c.add(b.ctx, attended, x)
        normed = layers.rms_norm(b, x, f"{prefix}.ffn_norm.weight")
        fed = layers.experts(b, normed, prefix) if h.n_expert else layers.swiglu(b, normed, prefix)
        x = c.add(b.ctx, fed, x)
    if output == "hidden":  # the norm is always in memory: under a memory limit nothing waits for the head's weights
        return layers.last_hidden(b, x)
    return layers.logits_head(b, b.border(x, "head"))


def rotated(b: GraphBuilder, x: int, prefix: str, family: Family, factors: int | None) -> tuple[int, int, int]:
    """Queries [D, H, T] and keys [D, G, T] by position, and values [D, G, T], of normalised hidden states x [E, T]."""
    q, k, v = layers.project_qkv(b, x, prefix)
    if family.qk_norm:
        q = layers.rms_norm(b, q, f"{prefix}.attn_q_norm.weight")
        k = layers.rms_norm(b, k, f"{prefix}.attn_k_norm.weight")
    elif both := b.beside(q, k):  # heads are rotated alike, whether of queries or of keys
        both = layers.rope(b, both, family.rope_mode, factors)
        b.expand(both)
        return b.heads(both, 0, b.config.n_head), b.heads(both, b.config.n_head, b.config.n_head_kv), v
    q, k = layers.rope(b, q, family.rope_mode, factors), layers.rope(b, k, family.rope_mode, factors)
    b.expand(q)
    return q, k, v


# What the ggml engine has graphs and caches for; told from a model's header, before anything is opened.

_KEY_TYPES = {"f16": ggml.TYPE_F16, "q8_0": ggml.TYPE_Q8_0}


def ggml_unsupported(file: ModelFile) -> str | None:
    """Why this engine has no graph for a model, None if it has one. Reads the header only."""
    if file.header.architecture not in FAMILIES:
        return f"no graph for architecture {file.header.architecture!r}"
    try:
        config = read_config(file.header)
    except UnsupportedModel as error:
        return str(error)
    if config.n_expert and "blk.0.ffn_gate_exps.weight" not in file.header.tensors:
        return "experts in separate tensors (an old Mixtral conversion)"
    strange = next((name for name in file.header.tensors if name.endswith(".scale") or "_shexp" in name or "lora" in name), None)
    return f"no graph for the tensor {strange}" if strange else None


def key_type(name: Literal["f16", "q8_0"], config: ModelConfig) -> int:
    """Element type of cached keys. Raises OptionError where heads do not divide into its blocks."""
    if name not in _KEY_TYPES:
        raise OptionError(f"--key-type {name} is unknown; choose f16 or q8_0")
    if config.head_dim % ggml.c.blck_size(_KEY_TYPES[name]):
        raise OptionError(f"heads of {config.head_dim} do not divide into {name} blocks; use --key-type f16")
    return _KEY_TYPES[name]
