"""Level 3, attention: each head looks where the teacher's looks.

The loss of a pair of heads is the mean over queries of a divergence of the rows, in which key 0 is dropped (an attention sink, Xiao et al.
2023, arXiv:2309.17453: what it gets is what was left over) and the rest renormalised to p and q. A key counts with

    w = importance of the position x (1 + far x log(1 + distance) / log(length))

so that links to positions that mattered for the answer, and long ones, weigh more. As in token.py weights inside a KL would move its
minimum, and so the sum is of w (p log(p/q) - p + q). Heads are weighted by softmax(log importance), which is importance / sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt.hooks import OptionError
from edge_rt_distill.losses.hidden import teacher_layers
from edge_rt_distill.model.architecture import Architecture

TINY = 1e-9
"""Probabilities count as at least this much in logarithms."""


class HeadMatch(NamedTuple):
    """A student's layer, the teacher's that it is compared with, and for each of the student's heads the teacher's it came from."""

    student: int
    teacher: int
    heads: tuple[int, ...]


def match_heads(
    student: Architecture, teacher: Architecture, layers: Sequence[int] | None = None, heads: Sequence[Sequence[int]] | None = None
) -> list[HeadMatch]:
    """Which maps are compared, for some layers of the student (None: a third, two thirds and the last: maps are slow to make).

    ``heads``: for each layer of the student the teacher's head each of its heads came from, as the cut says; None where all were kept.
    Raises OptionError for layers that do not exist, or where heads were cut and no table says which.
    """
    count = len(student.layers)
    chosen = sorted({max(0, count // 3 - 1), max(0, 2 * count // 3 - 1), count - 1}) if layers is None else sorted(set(layers))
    sources, found = teacher_layers(student, len(teacher.layers)), []
    for layer in chosen:
        if not 0 <= layer < count:
            raise OptionError(f"attention is to be compared at layer {layer}, and the student has {count}; choose 0 to {count - 1}")
        source = sources[layer]
        here = range(student.layers[layer].heads) if heads is None else heads[layer]
        theirs = teacher.layers[source].heads
        if len(here) != student.layers[layer].heads or (heads is None and len(here) != theirs) or not all(0 <= h < theirs for h in here):
            raise OptionError(
                f"layer {layer} has {student.layers[layer].heads} heads of the teacher's {theirs}; say which, with the table of the cut"
            )
        found.append(HeadMatch(layer, source, tuple(here)))
    return found


def priorities(importance: Tensor) -> Tensor:
    """softmax(log importance), which is importance / sum, over all elements; not important at all counts as a millionth of the mean."""
    kept = importance.clamp(min=max(float(importance.mean()) * 1e-6, torch.finfo(importance.dtype).tiny))
    return kept / kept.sum()


def key_weights(length: int, importance: Tensor | None = None, far: float = 1.0) -> Tensor:
    """w [B or 1, T, T] for query (dimension 1) and key (dimension 2). ``importance`` [B, T] of the keys' positions, None: all equal."""
    places = torch.arange(length)
    distance = (places[:, None] - places).clamp(min=0)
    weights = 1 + far * torch.log1p(distance.float()) / math.log(max(2, length))
    return weights[None] if importance is None else weights * importance[:, None, :]


def attention_loss(student: Tensor, teacher: Tensor, weights: Tensor, head_weights: Tensor, keys: Tensor) -> Tensor:
    """Sum over heads of their weight times the weighted mean divergence of their rows, in nats.

    ``student``, ``teacher`` [B, H, T, T]: probabilities of heads that stand for each other. ``weights`` [B, T]: of the queries; those at
    positions 0 and 1 never count, as without key 0 there is nothing to choose. ``head_weights`` [H]. ``keys``: of ``key_weights``.
    """
    length = student.shape[-1]
    w = weights.to(student).clone()
    w[:, :2] = 0
    visible = torch.ones(length, length, dtype=torch.bool).tril()[:, 1:]
    p, q = (_renormalised(maps, visible) for maps in (teacher, student))
    apart = p * (p.clamp(min=TINY).log() - q.clamp(min=TINY).log()) - p + q
    rows = (apart * keys[:, None, :, 1:].to(apart)).sum(-1)  # [B, H, T]
    each = torch.einsum("bht,bt->h", rows, w) / w.sum().clamp(min=torch.finfo(w.dtype).tiny)
    return head_weights.to(each) @ each


def _renormalised(maps: Tensor, visible: Tensor) -> Tensor:
    """Rows without key 0 that sum to 1 [B, H, T, T - 1]; what lies ahead of the query is 0."""
    rest = maps[..., 1:] * visible
    return rest / rest.sum(-1, keepdim=True).clamp(min=TINY)
