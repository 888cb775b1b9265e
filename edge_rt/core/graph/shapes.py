"""Checks that the tensors of a file are the ones a graph multiplies, in the shapes it expects: ggml ends the process otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edge_rt.errors import ModelFileError, UnsupportedModel

if TYPE_CHECKING:
    from edge_rt.core.graph.decoder import Family
    from edge_rt.core.graph.hyper import Hyper
    from edge_rt.core.load.header import TensorInfo

Shape = tuple[int, ...]


def check_shapes(tensors: Mapping[str, TensorInfo], hyper: Hyper, family: Family) -> None:
    """Raise ModelFileError for a tensor that is missing or misshapen, UnsupportedModel for one the graph would ignore."""
    required, optional = _whole(hyper, family)
    for layer in range(hyper.n_layer):
        in_layer = _block(tensors, f"blk.{layer}", hyper, family)
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


def _whole(h: Hyper, family: Family) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Required and optional tensors outside the blocks: name -> shape."""
    required: dict[str, Shape] = {"token_embd.weight": (h.n_embd, h.n_vocab), "output_norm.weight": (h.n_embd,)}
    optional: dict[str, Shape] = {"output.weight": (h.n_embd, h.n_vocab), "output.bias": (h.n_vocab,)}
    if family.rope_factors:
        optional["rope_freqs.weight"] = (h.rope.dims // 2,)
    return required, optional


def _block(tensors: Mapping[str, TensorInfo], prefix: str, h: Hyper, family: Family) -> tuple[dict[str, Shape], dict[str, Shape]]:
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
