"""Divergence of a student from its teacher, on passages of text: what surgery verifies its predictions with."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from edge_rt.hooks import DataError
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.rows import Rows


@torch.no_grad()
def final_states(model: Decoder, batches: Sequence[Rows]) -> list[Tensor]:
    """What a model makes its logits of, [B, T, D] a batch: worth keeping where many students are compared with one teacher."""
    return [model(batch.tokens).hidden for batch in batches]


@torch.no_grad()
def divergence(
    student: Decoder, teacher: Decoder, batches: Sequence[Rows], *, skip: Collection[int] = (), known: Sequence[Tensor] | None = None
) -> float:
    """Mean KL(teacher || student) in nats over the predictions that count. ``skip``: layers that the student leaves out.

    ``known``: the teacher's final states. Raises DataError where no prediction counts.
    """
    total, count = 0.0, 0.0
    for at, batch in enumerate(batches):
        own = student(batch.tokens, skip=skip).hidden
        other = teacher(batch.tokens).hidden if known is None else known[at]
        for row in range(len(batch.tokens)):  # a passage at a time: logits are by far the largest thing here
            counted = batch.mask[row].nonzero().squeeze(1)
            if not len(counted):
                continue
            p, q = teacher.logits(other[row, counted]).log_softmax(-1), student.logits(own[row, counted]).log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
            total, count = total + float(kl @ batch.mask[row, counted].to(kl.dtype)), count + float(batch.mask[row, counted].sum())
    if not count:
        raise DataError("no prediction counts in these samples; take longer or more samples")
    return total / count
