"""A layer made narrower: rows and columns of its matrices by head, channel and residual dimension, and norms that allow for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edge_rt_distill.surgery.cut import LayerCut

AXES: Mapping[str, tuple[str, str]] = {
    "attn_q": ("heads", "hidden"), "attn_k": ("groups", "hidden"), "attn_v": ("groups", "hidden"), "attn_output": ("hidden", "heads"),
    "ffn_gate": ("channels", "hidden"), "ffn_up": ("channels", "hidden"), "ffn_down": ("hidden", "channels"),
}  # fmt: skip
"""What rows (output) and columns (input) of a matrix stand for."""
RESIDUAL_NORMS = ("attn_norm", "ffn_norm", "output_norm")
"""Norms over the residual stream; those of queries and keys are over one head, which keeps its size."""


def indices(layer: LayerCut, hidden: Sequence[int], head: int) -> dict[str, Tensor]:
    """Rows or columns that stay, by what they stand for. ``head``: elements of a head."""
    heads = {name: [h * head + i for h in getattr(layer, name) for i in range(head)] for name in ("heads", "groups")}
    kept = {"hidden": list(hidden), "channels": list(layer.channels), **heads}
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in kept.items()}


def narrow(tensors: Mapping[str, Tensor], layer: LayerCut, hidden: Sequence[int], width: int, head: int) -> dict[str, Tensor]:
    """A layer's tensors (by GGUF's names without the block) with what the cut keeps. ``width``: of the teacher's residual stream."""
    kept = indices(layer, hidden, head)
    made = {}
    for name, tensor in tensors.items():
        site, kind = name.split(".")
        if site in AXES:
            rows, columns = (kept[axis] for axis in AXES[site])
            made[name] = tensor[rows] if kind == "bias" else tensor[rows][:, columns]
        elif site in RESIDUAL_NORMS:
            made[name] = norm(tensor, kept["hidden"], width)
        else:
            made[name] = tensor
    return made


def norm(weight: Tensor, kept: Tensor, width: int) -> Tensor:
    """The weight of an RMSNorm over fewer dimensions: [D] to [kept].

    The mean of squares now runs over those that stay. Where the others carry nothing, it is larger by ``width / kept``, and what is normed
    smaller by the root of that: the weight makes up for it (and ``norm_epsilon`` grows by the same, see ``student_architecture``).
    """
    return weight[kept] * (width / len(kept)) ** 0.5 if len(kept) < width else weight[kept]
