"""How much the model's output minds an error at a linear's output: the diagonal of the Fisher information.

With g the gradient of the log-likelihood of tokens drawn from the model itself, an error e at a site raises the KL by about
sum over features of E[g^2] e^2 / 2 (Amari, 1998; used for compression by Theis and others, 2018, arXiv:1801.05787), so errors at different
sites, and gains by mending them, can be held against each other. Position 0 is counted apart: massive activations sit there (Sun and
others, 2024, arXiv:2402.17762), and what goes wrong there matters less than its size says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.quantise.walk import side_by_side

_FLOOR = 1e-4
"""Of the mean over features: no feature counts for less, because the estimate is one of few tokens."""


class Sensitivity(NamedTuple):
    """Mean squared gradients by feature [out], nats a squared unit of output: ``features`` at positions but the first, ``first`` there."""

    features: Tensor
    first: Tensor

    def first_weight(self, error: Tensor) -> float:
        """What position 0 counts for beside others if errors [n, out] there are weighed by ``features``: as much as by ``first``."""
        size = error.square().sum(0)
        common = float(size @ self.features)
        return float(size @ self.first) / common if common > 0 else 0.0


def sensitivities(model: Decoder, sequences: Sequence[Sequence[int]], *, seed: int = 0, batch_tokens: int = 512) -> dict[str, Sensitivity]:
    """Of every site, by the float model on some thousand tokens. Takes a forward and a backward pass."""
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, list[Tensor]] = {}
    counts = [0, 0]
    for rows in side_by_side(sequences, batch_tokens):
        real, caught = rows.real, _gradients(model, rows.tokens, rows.real, generator)
        counts[0] += int(real[:, 0].sum())
        counts[1] += int(real[:, 1:].sum())
        for site, gradient in caught.items():
            square = gradient.square()
            first, rest = square[:, 0].sum(0), square[:, 1:].sum((0, 1))
            have = sums.setdefault(site, [torch.zeros_like(first), torch.zeros_like(rest)])
            have[0] += first
            have[1] += rest
    return {site: _of(first / max(counts[0], 1), rest / max(counts[1], 1)) for site, (first, rest) in sums.items()}


def _of(first: Tensor, rest: Tensor) -> Sensitivity:
    return Sensitivity(rest.clamp_min(max(float(rest.mean()) * _FLOOR, 1e-20)), first)


def _gradients(model: Decoder, tokens: Tensor, real: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Gradients [B, T, out] of the summed log-likelihood of drawn tokens by the outputs of all sites."""
    caught: dict[str, Tensor] = {}
    handles = []
    for site in model.sites():

        def keep(_: object, __: object, output: Tensor, site: str = site) -> Tensor | None:
            if site in caught:
                return None  # a shared layer's second place
            caught[site] = output if output.requires_grad else output.detach().requires_grad_()
            return caught[site]

        handles.append(model.linear(site).register_forward_hook(keep))
    try:
        with torch.enable_grad():
            logits = model.logits(model(tokens).hidden[real])
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            loss = -logits.log_softmax(-1).gather(1, drawn).sum()
            found = torch.autograd.grad(loss, list(caught.values()))
    finally:
        for handle in handles:
            handle.remove()
    return dict(zip(caught, found, strict=True))
