"""Residual streams of a model that is walked layer by layer over calibration text, and how much each token counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_rt.hooks import DataError
from edge_rt_distill.model.decoder import Decoder, Layer
from edge_rt_distill.model.rows import Rows


def attend(model: Decoder, layer: Layer, normed: Sequence[Tensor]) -> list[Tensor]:
    """Inputs of ``attn_output``, of normed streams [B, T, D] a batch."""
    turns = [model.turn(torch.arange(h.shape[1])) for h in normed]
    return [
        layer.attend(h, turn, mask=None, head_mask=None, maps=False, cache=None, past=0)[0] for h, turn in zip(normed, turns, strict=True)
    ]  # fmt: skip


def gated(layer: Layer, h: Tensor) -> Tensor:
    """Input of ``ffn_down`` [B, T, F], of a normed stream."""
    made: Tensor = F.silu(layer.ffn_gate(h)) * layer.ffn_up(h)
    return made


def split(sizes: Sequence[int], share: float) -> list[Tensor]:
    """Which passages of batches of some sizes are kept apart: every n-th, at least one, and at least one is not. Raises DataError."""
    count = sum(sizes)
    if count < 2:
        raise DataError("least-squares repair needs at least two passages, one of them to judge by; take more samples, or shorter passages")
    every = max(2, round(1 / share))
    chosen = torch.arange(count) % every == min(every, count) - 1
    return list(torch.split(chosen, list(sizes)))


def some(batch: Rows, which: Tensor) -> Rows:
    """Those passages of a batch that ``which`` [B] says."""
    return Rows(batch.tokens[which], batch.mask[which], batch.lengths[which])


def weights(batch: Rows, background: float, first: float) -> Tensor:
    """[B, T]: 1 where the prediction counts, ``background`` elsewhere, ``first`` at the first position, nothing for padding."""
    found = torch.maximum(batch.mask.float(), torch.tensor(background))
    found[:, 0] = first
    return found * batch.real


def soft(weights: Tensor, stream: Tensor, outlier: float) -> Tensor:
    """Weights of tokens [B, T], smaller where the stream [B, T, D] is more than ``outlier`` times as large as usual."""
    size = stream.norm(dim=-1)
    usual = size[weights > 0].median() if bool((weights > 0).any()) else size.median()
    made: Tensor = weights * (outlier * usual / size.clamp_min(1e-30)).clamp_max(1).square()
    return made
