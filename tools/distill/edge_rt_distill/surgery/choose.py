"""Which channels stay, chosen with their repair in mind: those that the others cannot stand in for.

Importance says what a channel carries; but what a channel shares with others, least squares gives to them. The optimal brain surgeon
(Hassibi and Stork 1992), for structures as ZipLM has it (Kurtic et al. 2023, arXiv:2302.04089), removes the channel whose removal leaves
the least error after the others were refitted, and goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from edge_rt_distill.model.decoder import Decoder, Layer
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.progress import Told, quiet
from edge_rt_distill.surgery.cut import Cut
from edge_rt_distill.surgery.least_squares import CHUNK
from edge_rt_distill.surgery.streams import attend, gated, soft, weights

STEPS = 64
"""In so many steps the channels go; what is left is refitted after each."""


def least_needed(gram: Tensor, matrix: Tensor, keep: int, *, block: int = 1, ridge: float = 1e-3) -> tuple[int, ...]:
    """The ``keep`` inputs of a matrix [out, in] that stay, by blocks of neighbours; ``gram`` [in, in] of its inputs, float64.

    A last, partial block is never kept when something goes. Raises torch.linalg.LinAlgError for a gram that is not finite.
    """
    n = len(gram)
    if keep >= n:
        return tuple(range(n))
    whole = n - n % block
    damped = gram[:whole, :whole] + torch.eye(whole, dtype=gram.dtype) * (ridge * gram.diagonal().mean()).clamp_min(1e-30)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    left, alive = matrix[:, :whole].to(gram.dtype).clone(), torch.arange(whole)
    blocks, wanted = whole // block, keep // block
    at_once = max(1, -(-(blocks - wanted) // STEPS))
    while len(alive) > wanted * block:
        costs = _costs(inverse, left, block)
        number = min(at_once, len(alive) // block - wanted)
        gone = (torch.sort(costs, stable=True).indices[:number, None] * block + torch.arange(block)).flatten()
        stay = torch.ones(len(alive), dtype=torch.bool)
        stay[gone] = False
        solved = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        left = (left - left[:, gone] @ solved)[:, stay]
        inverse = (inverse - inverse[:, gone] @ solved)[stay][:, stay]
        alive = alive[stay]
    return tuple(int(i) for i in alive)


def _costs(inverse: Tensor, left: Tensor, block: int) -> Tensor:
    """Squared error that the removal of each block leaves after the others were refitted."""
    if block == 1:
        return left.pow(2).sum(0) / inverse.diagonal()
    count = len(inverse) // block
    own = torch.stack([inverse[i * block : (i + 1) * block, i * block : (i + 1) * block] for i in range(count)])
    columns = left.T.reshape(count, block, len(left))
    costs: Tensor = (columns * torch.linalg.solve(own, columns)).sum((1, 2))
    return costs


@torch.no_grad()
def rechosen(
    teacher: Decoder, cut: Cut, batches: Sequence[Rows], *, block: int = 1, told: Told = quiet
) -> Cut:  # fmt: skip
    """The cut with its channels chosen anew on calibration text, as many as before in each layer; ``block``: as ``least_needed``.

    Merged layers, and layers that share parameters, keep theirs. ``told(layers done, all)`` is called before each layer, and may raise.
    """
    layers = list(cut.layers)
    places = {one.sources[0]: i for i, one in enumerate(layers) if len(one.sources) == 1}
    sharing = {one.like for one in layers} | {i for i, one in enumerate(layers) if one.like is not None}
    streams = [teacher.token_embd(batch.tokens) for batch in batches]
    counts = [weights(batch, 0.25, 1.0) for batch in batches]
    for number, layer in enumerate(teacher.layers):
        told(number, len(teacher.layers))
        assert isinstance(layer, Layer)
        attended = attend(teacher, layer, [layer.attn_norm(x) for x in streams])
        streams = [x + layer.attn_output(a) for x, a in zip(streams, attended, strict=True)]
        inner = [gated(layer, layer.ffn_norm(x)) for x in streams]
        place = places.get(number)
        if place is not None and place not in sharing and len(layers[place].channels) < inner[0].shape[-1]:
            gram = _gram(inner, [soft(one, x, 10.0) for one, x in zip(counts, streams, strict=True)])
            kept = least_needed(gram, layer.ffn_down.weight, len(layers[place].channels), block=block)
            reason = layers[place].reason + "; channels chosen with their repair in mind"
            layers[place] = replace(layers[place], channels=kept, reason=reason.removeprefix("; "))
        streams = [x + layer.ffn_down(z) for x, z in zip(streams, inner, strict=True)]
    return replace(cut, layers=tuple(layers))


def _gram(inner: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    """Sum over tokens of weighted products of inputs, [in, in] in float64."""
    total = torch.zeros(inner[0].shape[-1], inner[0].shape[-1], dtype=torch.float64)
    for x, weight in zip(inner, counts, strict=True):
        flat, own = x.flatten(0, 1), weight.flatten()
        for at in range(0, len(flat), CHUNK):
            part = flat[at : at + CHUNK].double() * own[at : at + CHUNK].double().sqrt()[:, None]
            total += part.T @ part
    return total
