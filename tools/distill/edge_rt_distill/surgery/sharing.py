"""Layers that compute with the same parameters: what those parameters are.

Cross-layer sharing is Universal Transformers' and ALBERT's (Dehghani et al. 2018, arXiv:1807.03819; Lan et al. 2019, arXiv:1909.11942). A
student that shares has fewer parameters to train and to keep in memory; a GGUF names each layer's tensors, so its file is no smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edge_rt_distill.surgery.cut import Cut, LayerCut


def sharers(cut: Cut, place: int) -> list[LayerCut]:
    """The layers that compute with the parameters of the student's layer at a place, itself first."""
    return [cut.layers[place], *(one for one in cut.layers if one.like == place)]


def deciding(cut: Cut, place: int) -> list[LayerCut]:
    """Those of the sharers whose teacher layers the parameters are made of: all of them, or the one that matters most."""
    members = sharers(cut, place)
    return members if cut.share == "average" else [max(members, key=lambda one: one.importance)]


def average(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of layers' tensors; one layer stays as it is, bit by bit."""
    if len(layers) == 1:
        return dict(layers[0])
    return {name: torch.stack([layer[name] for layer in layers]).mean(0) for name in layers[0]}
