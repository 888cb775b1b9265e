"""What in a model carried an answer: tokens by gradient x input, layers and heads by leaving them out.

Gradient x input: Shrikumar et al. 2016 (arXiv:1605.01713), Denil et al. 2014 (arXiv:1412.6815). Importance of a head as the gradient of
its mask: Michel et al. 2019 (arXiv:1905.10650). It is exact only for small changes, so the heads it names first are then left out in fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt.hooks import DataError
from edge_rt_distill.library.record import uniform_heads
from edge_rt_distill.model.decoder import Decoder


class Aim(NamedTuple):
    """What is explained: the sum over places of log p(wrong), less log p(right) where that is given.

    ``positions`` [N]: at which the tokens ``wrong`` [N] (and ``right`` [N]) are predicted, that is, the positions before them.
    """

    positions: Sequence[int]
    wrong: Sequence[int]
    right: Sequence[int] | None = None


class Carried(NamedTuple):
    """How much each part added to the aim, in nats; above zero it spoke for the wrong answer.

    ``value``: the aim. ``tokens`` [T]: gradient x input at the embeddings. ``layers`` [L], ``heads`` [L, H]: the fall of the aim when left
    out; None for heads that were not tried. ``head_gradients`` [L, H]: the same by gradient, for all.
    """

    value: float
    tokens: list[float]
    layers: list[float]
    heads: list[list[float | None]]
    head_gradients: list[list[float]]


def explain_answer(model: Decoder, tokens: Sequence[int], aim: Aim, heads: int | None = 16) -> Carried:
    """Explain ``aim`` on a sequence [T]. ``heads``: of how many heads the fall is measured, those of the largest gradients; None: all.

    Costs 1 forward and backward pass and L + ``heads`` forward passes. The model's parameters get no gradients.
    Raises DataError for an aim outside the sequence, or one that is not finite; UnsupportedModel where layers differ in heads.
    """
    if not aim.positions or not all(0 <= position < len(tokens) for position in aim.positions):
        raise DataError("an answer to explain needs positions within its sequence; give others")
    count, layers = uniform_heads(model), len(model.layers)
    row = torch.tensor([list(tokens)])
    embedded = model.token_embd(row).detach().requires_grad_()
    mask = torch.ones(layers, count, requires_grad=True)
    with torch.enable_grad():
        value = _value(model, model.run(embedded, head_mask=mask).hidden[0], aim)
        by_input, by_mask = torch.autograd.grad(value, (embedded, mask))
    base = float(value.detach())
    if not torch.isfinite(value):
        raise DataError(f"the answer to explain has a log-probability of {base}; the model or the sample is damaged")
    with torch.no_grad():
        skipped = [base - float(_value(model, model(row, skip=(layer,)).hidden[0], aim)) for layer in range(layers)]
        left_out = _leave_out(model, row, aim, base, by_mask, layers * count if heads is None else heads)
    found = (by_input * embedded).detach().sum(-1)[0].tolist()
    return Carried(base, found, skipped, left_out, by_mask.tolist())


def _leave_out(model: Decoder, row: Tensor, aim: Aim, base: float, by_mask: Tensor, heads: int) -> list[list[float | None]]:
    """The fall of the aim without each of the ``heads`` heads of the largest gradients."""
    layers, count = by_mask.shape
    found: list[list[float | None]] = [[None] * count for _ in range(layers)]
    for index in by_mask.abs().flatten().argsort(descending=True, stable=True)[:heads].tolist():
        layer, head = divmod(index, count)
        mask = torch.ones(layers, count)
        mask[layer, head] = 0.0
        found[layer][head] = base - float(_value(model, model(row, head_mask=mask).hidden[0], aim))
    return found


def _value(model: Decoder, hidden: Tensor, aim: Aim) -> Tensor:
    """The aim at hidden states [T, D]; logits are made only where it looks."""
    logp = model.logits(hidden[list(aim.positions)]).log_softmax(-1)
    value = logp.gather(-1, torch.tensor(aim.wrong)[:, None]).sum()
    if aim.right is not None:
        value = value - logp.gather(-1, torch.tensor(aim.right)[:, None]).sum()
    return value
