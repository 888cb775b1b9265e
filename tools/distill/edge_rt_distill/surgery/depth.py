"""Several layers made one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edge_rt_distill.surgery.cut import Merge


def merge(layers: Sequence[Mapping[str, Tensor]], how: Merge) -> dict[str, Tensor]:
    """Tensors of neighbouring layers as those of one.

    ``laco``: the first's plus the sum of what each later one differs from it (Yang et al. 2024, arXiv:2402.11187, equation 1); of two
    layers that is the second. ``average``: the mean.
    """
    first = layers[0]
    if len(layers) == 1:
        return dict(first)
    if how == "average":
        return {name: torch.stack([layer[name] for layer in layers]).mean(0) for name in first}
    made = {}
    for name, tensor in first.items():
        made[name] = torch.stack([layer[name] for layer in layers[1:]]).sum(0) - (len(layers) - 2) * tensor
    return made
