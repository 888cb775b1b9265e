"""What each head looks at: how widely, how far, and how much of it goes to the first token.

Weight on the first token is mostly a place to put attention that is not needed (an attention sink, Xiao et al. 2023, arXiv:2309.17453); so
distances and far links are those of the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_rt_distill.model.rows import Rows

MEASURES = ("entropy", "distance", "sink", "far")
"""``entropy``: nats, mean over queries. ``distance``: tokens between query and key, mean over the attention that is not on the first
token. ``sink``: attention on the first token. ``far``: attention further back than ``FAR`` tokens, the first token excepted."""
FAR = 64


def measures(probabilities: Tensor, rows: Rows, far: int = FAR) -> Tensor:
    """[B, H, 4] of attention [B, H, T, T] in the order of MEASURES: means over each sequence's queries (the first has no choice)."""
    length = probabilities.shape[-1]
    place = torch.arange(length, device=probabilities.device)
    queries = rows.real & (place > 0)
    weight = queries.float() / queries.sum(1, keepdim=True).clamp_min(1)
    back = (place[:, None] - place[None, :]).clamp_min(0).float()
    back[:, 0] = 0.0
    entropy = torch.special.entr(probabilities).sum(-1)
    sink = probabilities[..., 0]
    distance = torch.einsum("bhqk,qk->bhq", probabilities, back)
    beyond = torch.einsum("bhqk,qk->bhq", probabilities, (back > far).float())
    entropy, sink, distance, beyond = (torch.einsum("bhq,bq->bh", each, weight) for each in (entropy, sink, distance, beyond))
    return torch.stack([entropy, distance / (1 - sink).clamp_min(1e-6), sink, beyond], -1)
