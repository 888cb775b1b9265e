"""What a decoder says at positions of given tokens: hidden states by batches, and log-probabilities without keeping all logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt_distill.model.decoder import Decoder, Output
from edge_rt_distill.model.logits import pieces
from edge_rt_distill.model.rows import fill, grouped
from edge_rt_distill.progress import Told


class Said(NamedTuple):
    """Of N positions: log-probability of the token that came [N], the K likeliest tokens [N, K] and theirs [N, K], falling.

    ``tail`` [N]: probability of all others, ``entropy`` [N] in nats, both of the whole distribution.
    """

    chosen: Tensor
    top_ids: Tensor
    top: Tensor
    tail: Tensor
    entropy: Tensor


@torch.no_grad()
def each_output(
    model: Decoder, rows: Sequence[Sequence[int]], tokens: int, *, states: Sequence[int] = (), told: Told
) -> Iterator[tuple[int, Output]]:
    """Each row's index and Output, [T, D] without batch or padding, in order of length, ``tokens`` a batch. ``told`` (done, total)."""
    done = 0
    for batch in grouped([len(row) for row in rows], tokens):
        out = model(fill([rows[i] for i in batch]).tokens, states=states)
        for place, i in enumerate(batch):
            length = len(rows[i])
            yield i, Output(out.hidden[place, :length], {key: state[place, :length] for key, state in out.states.items()}, {})
        done += len(batch)
        told(done, len(rows))


@torch.no_grad()
def measure(model: Decoder, hidden: Tensor, came: Tensor, top: int) -> Said:
    """What is said at hidden states [N, D] of the tokens ``came`` [N] and of the ``top`` likeliest."""
    parts = [_measure(model, hidden[some], came[some], top) for some in pieces(max(1, len(came)), model.architecture.vocabulary)]
    return Said(*map(torch.cat, zip(*parts, strict=True)))


def _measure(model: Decoder, hidden: Tensor, came: Tensor, top: int) -> Said:
    logp = model.logits(hidden).float().log_softmax(-1)
    best, ids = logp.topk(min(top, logp.shape[-1]), -1)
    chosen = logp.gather(-1, came[:, None])[:, 0]
    p = logp.exp()
    entropy = -(p * logp).nan_to_num(0.0).sum(-1)
    # Summed over what is left: 1 - sum(top) has nothing but rounding errors where the tail is small.
    tail = p.scatter(-1, ids, 0.0).sum(-1)
    return Said(chosen, ids, best, tail, entropy)
