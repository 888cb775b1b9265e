"""Which products a block is made of: those that share an input are one where their weights lie side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.graph.hyper import TOGETHER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge_rt.core.graph.common import Weights
    from edge_rt.core.graph.hyper import Fused, Hyper

NEIGHBOURS = ("attn_q", "attn_v")
"""They lie side by side in most files: names are sorted, and attn_output comes before."""


class Joined(NamedTuple):
    """Several weights, one below the other, as one tensor, and their biases, None if they have none."""

    weight: int
    bias: int | None


def weight_names(prefix: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the weights of parts of a block."""
    return tuple(f"{prefix}.{part}.weight" for part in parts)


def joined(weights: Weights, fused: Fused, prefix: str, parts: tuple[str, ...]) -> Joined | None:
    """Several weights of a block as one; None where they are to stay apart, or do not lie side by side."""
    if fused.joined is not None and "|".join(parts) not in fused.joined:
        return None
    weight = weights.joined(weight_names(prefix, parts))
    biases = tuple(f"{prefix}.{part}.bias" for part in parts)
    bias = weights.joined(biases)
    if weight is None or (bias is None and any(weights.get(name) for name in biases)):
        return None
    return Joined(weight, bias)


def of_block(weights: Weights, hyper: Hyper, prefix: str) -> Iterator[tuple[str, ...]]:
    """Names of the weights of each product of a block but those of experts, as ``Builder`` makes them."""
    qkv, gate_up = TOGETHER
    if weights.get(f"{prefix}.attn_qkv.weight"):
        attention: tuple[tuple[str, ...], ...] = (("attn_qkv",),)
    elif joined(weights, hyper.fused, prefix, qkv):
        attention = (qkv,)
    elif joined(weights, hyper.fused, prefix, NEIGHBOURS):
        attention = (("attn_k",), NEIGHBOURS)
    else:
        attention = tuple((part,) for part in qkv)
    fed: tuple[tuple[str, ...], ...] = ()
    if not hyper.n_expert:
        fed = (gate_up,) if joined(weights, hyper.fused, prefix, gate_up) else tuple((part,) for part in gate_up)
        fed = (*fed, ("ffn_down",))
    for parts in (*attention, ("attn_output",), *fed):
        yield weight_names(prefix, parts)
