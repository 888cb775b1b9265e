"""Mixture of experts with softmax routing (Mixtral, Qwen3-MoE): every token goes through its likeliest experts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import linear, silu

_SMALLEST = 6.103515625e-5
"""Floor under the sum of weights, as in llama.cpp: the smallest normal number of half precision."""


class Experts(NamedTuple):
    """``router`` [N, E] in float32: a choice that rounding decides would be another model's. ``gate_up`` [N, 2F, E] and ``down`` [N, E, F]
    in the device's type. ``used``: experts of each token.
    """

    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    used: int

    @property
    def inner(self) -> int:
        """Width of one expert."""
        return int(self.down.shape[2])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, E], normalised, in float32 -> [T, E] in float32: the experts' results by normalised weight.

        Those of a token are added in the order of the experts' numbers, so they do not depend on what else is in the step. Which experts
        are needed must be known here, so a device is waited for once in each layer.
        """
        likeliest = linear(x, self.router).softmax(-1).topk(self.used, dim=-1)
        weights = likeliest.values / likeliest.values.sum(-1, keepdim=True).clamp(min=_SMALLEST)  # [T, used]
        chosen = likeliest.indices.flatten().cpu().numpy()  # by token
        order = np.argsort(chosen, kind="stable")
        ends = np.searchsorted(chosen[order], np.arange(len(self.router)), side="right")
        places = torch.from_numpy(order).to(x.device)
        tokens, weights = places // self.used, weights.flatten()[places][:, None]  # expert by expert
        narrow, result, start = x.to(self.gate_up.dtype), torch.zeros_like(x), 0
        for expert, end in enumerate(ends.tolist()):
            if start < end:
                own = tokens[start:end]
                gate, up = linear(narrow[own], self.gate_up[expert]).float().chunk(2, dim=-1)
                fed = linear((silu(gate) * up).to(narrow.dtype), self.down[expert]).float()
                result.index_add_(0, own, fed * weights[start:end])
            start = end
        return result
