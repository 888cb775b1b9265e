"""KL from the float model to another, in nats a token, as corrections are judged by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.quantise.walk import side_by_side

CHUNK = 512
"""Positions whose distributions over the whole vocabulary are held at once."""


class Batch(NamedTuple):
    """Tokens [B, T], which are real [B, T], and the float model's hidden states [n, D] at the real ones: logits are exact from these."""

    tokens: Tensor
    real: Tensor
    hidden: Tensor


def references(teacher: Decoder, sequences: Sequence[Sequence[int]], batch_tokens: int = CHUNK) -> list[Batch]:
    """What other models are compared with. 4 D bytes a token; D is the width."""
    return [reference(teacher, rows) for rows in side_by_side(sequences, batch_tokens)]


@torch.no_grad()
def reference(teacher: Decoder, rows: Rows) -> Batch:
    """One batch of them."""
    return Batch(rows.tokens, rows.real, teacher(rows.tokens).hidden[rows.real])


def divergence(teacher: Decoder, model: Decoder, batch: Batch) -> Tensor:
    """KL at each real position of a batch [n], with gradients."""
    hidden = model(batch.tokens).hidden[batch.real]
    return torch.cat(list(_chunks(teacher, model, batch.hidden, hidden)))


def _chunks(teacher: Decoder, model: Decoder, reference: Tensor, hidden: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(hidden), CHUNK):
        with torch.no_grad():
            expected = teacher.logits(reference[start : start + CHUNK]).log_softmax(-1)
        found = model.logits(hidden[start : start + CHUNK]).log_softmax(-1)
        yield torch.nn.functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def mean_divergence(teacher: Decoder, model: Decoder, batches: Sequence[Batch]) -> float:
    """Mean KL over all positions, nats a token."""
    found = torch.cat([divergence(teacher, model, batch) for batch in batches])
    return float(found.double().mean())
