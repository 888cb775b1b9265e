"""Which tokens the answer was made of, and which heads brought them there.

Gradient x input (Shrikumar et al. 2016, arXiv:1605.01713) says how much of the answer's log-probability a token's embedding accounts for;
attention roll-out (Abnar and Zuidema 2020, arXiv:2005.00928) follows attention back from the answer through all layers, half of each
layer's stream being carried straight on. The first token is left out of both: it is where attention goes that is not needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt_distill.diagnose.heads import HeadImportance
from edge_rt_distill.diagnose.passes import backward, walk
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.rows import Rows


class Trace(NamedTuple):
    """``heads`` [L, H]: how much each head matters for the answer by what it brings from positions that matter; mean 1 over all heads.

    ``positions`` [B, T]: how much each position matters as a source; sums to 1 over a sequence, 0 at the first token and in padding.
    What they were made of: ``owed`` [B, T], see ``token_paths``; ``flow`` [B, T], the roll-out, summing to 1.
    """

    heads: Tensor
    positions: Tensor
    owed: Tensor
    flow: Tensor


def token_paths(embeddings: Tensor, gradient: Tensor, rows: Rows) -> Tensor:
    """[B, T]: what each token's embedding adds to the answer's log-probability (nats, summed over the answer; signed).

    ``gradient``: of the LOSS by the embeddings, as ``passes.backward`` gives it.
    """
    owed = -(embeddings * gradient).sum(-1)
    return torch.where(rows.real, owed, torch.zeros_like(owed))


class Rollout:
    """Follows attention back. Give it the layers' attention from the first to the last; then ask for the flow.

    Kept are means over heads, [B, T, T] by layer.
    """

    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def add(self, attention: Tensor) -> None:
        """The next layer's [B, H, T, T]: the mean over heads, without the first token and with rows summing to one again."""
        mean = attention.mean(1)
        mean[:, 1:, 0] = 0.0
        total = mean.sum(-1, keepdim=True)
        stay = torch.eye(mean.shape[-1], device=mean.device)
        self.means.append(torch.where(total > 1e-6, mean / total.clamp_min(1e-6), stay))

    def flow(self, start: Tensor) -> list[Tensor]:
        """[B, T] at each layer's entry, and last at the end, where it is ``start``: how much of what arrives there went through here."""
        found = [start]
        for mean in reversed(self.means):
            found.append(0.5 * found[-1] + 0.5 * (found[-1][:, None, :] @ mean).squeeze(1))
        return found[::-1]


def answer_start(rows: Rows) -> Tensor:
    """[B, T]: evenly over the positions whose predictions count."""
    return rows.mask / rows.mask.sum(1, keepdim=True).clamp_min(1)


def trace(teacher: Decoder, rows: Rows) -> Trace:
    """Heads and positions of a batch by what they did for the answer.

    A position's weight is the mean of its shares of |gradient x input| and of the roll-out. A head's importance is |dLoss / d mask| (Michel
    et al. 2019) times the attention it carries from such positions to where the roll-out goes through its layer. One pass forward and
    back, and two forward with attention maps, a layer at a time. Raises DataError if something is no number.
    """
    rows = rows._replace(numbers=tuple(range(len(rows.tokens))))
    importance = HeadImportance(teacher, len(rows.tokens))
    found = backward(teacher, rows, importance.watch(teacher, lambda: rows))
    rollout = Rollout()
    for step in walk(teacher, rows.tokens, attention=True):
        assert step.attention is not None
        rollout.add(step.attention)
    flows = rollout.flow(answer_start(rows))
    owed, flow = token_paths(found.embeddings, found.gradient, rows), _shares(flows[0], rows)
    positions = (_shares(owed.abs(), rows) + flow) / 2
    carried = []
    for step in walk(teacher, rows.tokens, attention=True):
        assert step.attention is not None
        brought = torch.einsum("bhqk,bk->bhq", step.attention, positions)
        carried.append(torch.einsum("bhq,bq->h", brought, flows[step.layer + 1]) / len(rows.tokens))
    heads = importance.heads()
    for number, row in enumerate(carried):
        heads[number, : len(row)] *= row
    mean = heads[~heads.isnan()].mean()
    heads = heads / mean if mean > 0 else torch.where(heads.isnan(), heads, torch.ones_like(heads))
    return Trace(heads, positions, owed, flow)


def _shares(values: Tensor, rows: Rows) -> Tensor:
    """Non-negative values [B, T] without padding and the first token, summing to one in each sequence."""
    kept = values * rows.real
    kept[:, 0] = 0.0
    return kept / kept.sum(1, keepdim=True).clamp_min(1e-30)
