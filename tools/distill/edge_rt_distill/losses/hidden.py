"""Level 2, hidden states: the residual stream at a few depths points where the teacher's does.

The loss at a depth is the weighted mean over tokens of 1 - cos_d(a P, b), a the student's state, b the teacher's, with the cosine under
per-dimension weights d = 1 / variance of the teacher's state: a few dimensions are a hundred times as large as the others and would be all
that a plain one sees. Position 0 is left out: a state there can be 170 times as large as any other (massive activations, Sun et al. 2024,
arXiv:2402.17762), and carries no meaning. P is the identity where the widths are equal, else a least-squares solution, which may be
trained on (as in FitNets, Romero et al. 2014, arXiv:1412.6550).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt.hooks import OptionError
from edge_rt_distill.model.architecture import Architecture

DEPTHS = (0.25, 0.5, 0.75, 1.0)
"""Fractions of the teacher's layers behind which states are compared: 6, 12, 18 and 24 of 24."""


class Match(NamedTuple):
    """States that stand for each other: entry of the teacher's layer ``teacher`` and of the student's ``student`` (L: behind the last)."""

    teacher: int
    student: int


def teacher_layers(student: Architecture, layers: int) -> list[int]:
    """For each layer of a student the teacher's layer it stands for: the first it came from, whose input it gets.

    Where that is not recorded, layers stand for those at the same depth of the teacher's ``layers``.
    """
    count = len(student.layers)
    return [shape.sources[0] if shape.sources else i * layers // count for i, shape in enumerate(student.layers)]


def match_states(student: Architecture, layers: int, depths: Sequence[float] = DEPTHS) -> list[Match]:
    """Pairs of states nearest to some depths, rising; ``layers``: how many the teacher has.

    The state at the entry of a student's layer stands for that at the entry of the teacher's layer it came from: where layers were dropped
    the one before them is to do their work too, so that what follows gets what it is used to (surgery/repair.py fits it the same way).
    The last states always match, as the logits are made of them.
    Raises OptionError for depths outside 0 < depth <= 1.
    """
    if not depths or not all(0 < depth <= 1 for depth in depths):
        raise OptionError(f"depths {list(depths)} are fractions of the teacher's layers; give some above 0 and up to 1")
    entries = [*teacher_layers(student, layers), layers]
    found: dict[int, int] = {}
    for depth in depths:
        wanted = max(1, round(depth * layers))
        best = min(range(1, len(entries)), key=lambda i: (abs(entries[i] - wanted), -i))
        found[best] = entries[best]
    return [Match(teacher, state) for state, teacher in sorted(found.items())]


def without_first(mask: Tensor) -> Tensor:
    """Weights of positions [B, T] with position 0 left out."""
    kept = mask.clone()
    kept[:, 0] = 0
    return kept


def inverse_variance(states: Tensor, weights: Tensor, floor: float = 1e-3) -> Tensor:
    """d [D]: 1 / variance of states [B, T, D] over the positions that weigh [B, T], scaled to a mean of 1.

    A variance below ``floor`` of the median one counts as that much, so that no dimension that hardly moves rules the cosine.
    """
    flat, w = states.flatten(0, 1), weights.flatten().to(states)
    w = w / w.sum().clamp(min=torch.finfo(w.dtype).tiny)
    mean = w @ flat
    variance = w @ (flat - mean).square()
    inverse = 1 / variance.clamp(min=float(floor * variance.median()) or 1.0)
    return inverse / inverse.mean()


def least_squares(student: Tensor, teacher: Tensor, weights: Tensor, ridge: float = 1e-4) -> Tensor:
    """P [Ds, Dt] with the smallest weighted |a P - b|^2 + ridge |P|^2 (ridge as a share of the mean squared norm of a dimension).

    ``student`` [N, Ds], ``teacher`` [N, Dt], ``weights`` [N]. Solved in double precision.
    """
    a, b, w = student.double(), teacher.double(), weights.double()
    gram = (a * w[:, None]).T @ a
    gram += torch.eye(len(gram), dtype=gram.dtype) * (ridge * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    solution: Tensor = torch.linalg.solve(gram, (a * w[:, None]).T @ b)
    return solution.to(student)


def hidden_loss(student: Tensor, teacher: Tensor, weights: Tensor, dimensions: Tensor, projection: Tensor | None = None) -> Tensor:
    """Weighted mean of 1 - cosine, 0 to 2.

    ``student`` [B, T, Ds], ``teacher`` [B, T, Dt], ``weights`` [B, T] of the tokens (position 0 never counts), ``dimensions`` [Dt],
    ``projection`` [Ds, Dt], None for the identity. 0 where no token counts.
    """
    w = without_first(weights)
    counted = w.flatten().nonzero().squeeze(-1)
    a, b = student.flatten(0, 1)[counted], teacher.flatten(0, 1)[counted]
    if projection is not None:
        a = a @ projection
    w = w.flatten()[counted].to(a)
    scale = dimensions.sqrt()
    apart = 1 - torch.nn.functional.cosine_similarity(a * scale, b * scale, dim=-1, eps=1e-12)
    return (w @ apart) / w.sum().clamp(min=torch.finfo(w.dtype).tiny)
