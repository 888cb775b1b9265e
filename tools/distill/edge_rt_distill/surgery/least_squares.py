"""Ridge regression of a change to a matrix, by normal equations in float64.

Layer-wise least squares after a cut is what SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774), SliceGPT (Ashkboos et al. 2024,
arXiv:2401.15024) and ZipLM (Kurtic et al. 2023, arXiv:2302.04089) do. Here the ridge pulls to the weights there are, not to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 4096
"""Tokens at a time in float64."""
ROUNDING = 1e-10
"""Relative squared error that float32 makes by itself."""
NEARLY = 0.9
"""Share of the largest gain that a ridge must reach to be chosen."""


class Equations:
    """Sums over tokens of weight w: ``gram`` = w x x' [in, in], ``cross`` = w x e' [in, out], ``energy`` = w e^2 [out], of errors e."""

    def __init__(self, columns: int, rows: int) -> None:
        self.gram = torch.zeros(columns, columns, dtype=torch.float64)
        self.cross = torch.zeros(columns, rows, dtype=torch.float64)
        self.energy = torch.zeros(rows, dtype=torch.float64)
        self.target = torch.zeros(rows, dtype=torch.float64)

    def add(self, x: Tensor, error: Tensor, target: Tensor, weights: Tensor) -> None:
        """Tokens: inputs x [N, in], what is missing in the output [N, out], what the output should be [N, out], weights [N]."""
        for at in range(0, len(x), CHUNK):
            part = slice(at, at + CHUNK)
            root = weights[part].double().sqrt()[:, None]
            inputs, missing = x[part].double() * root, error[part].double() * root
            self.gram += inputs.T @ inputs
            self.cross += inputs.T @ missing
            self.energy += missing.pow(2).sum(0)
            self.target += (target[part].double() * root).pow(2).sum(0)

    def relative(self, change: Tensor | None = None) -> float:
        """Squared error relative to the target's energy; a mean over outputs, so that no large one decides alone. ``change`` [in, out]."""
        left = self.energy
        if change is not None:
            left = left - 2 * (change * self.cross).sum(0) + (change * (self.gram @ change)).sum(0)
        floor = self.target.mean() * 1e-6
        if not float(floor):
            return 0.0
        return float((left.clamp_min(0) / (self.target + floor)).mean())


class Fit(NamedTuple):
    """A change [out, in] to a matrix, None where none helps on the tokens kept apart; errors there before and after; the ridge."""

    change: Tensor | None
    before: float
    after: float
    ridge: float | None


def solve(equations: Equations, ridge: float) -> Tensor:
    """The change [in, out]; ``ridge`` is relative to the mean of the diagonal. Raises torch.linalg.LinAlgError for what is not finite."""
    gram = equations.gram
    size = float(gram.diagonal().mean())
    damped = gram + torch.eye(len(gram), dtype=gram.dtype) * (ridge * size)
    return torch.cholesky_solve(equations.cross, torch.linalg.cholesky(damped))


def fit(train: Equations, apart: Equations, ridges: Sequence[float]) -> Fit:
    """Judged on tokens that were kept apart: of the ridges that gain nearly as much as the best (``NEARLY``) the largest, which changes
    least and so harms other text least; no change where none helps.
    """
    before = apart.relative()
    none = Fit(None, before, before, None)
    if not float(train.gram.diagonal().mean()) or before < ROUNDING:  # nothing comes in, or nothing is missing
        return none
    found = []
    for ridge in ridges:
        change = solve(train, ridge)
        found.append(Fit(change.T.contiguous(), before, apart.relative(change), ridge))
    enough = before - NEARLY * (before - min(one.after for one in found))
    helping = [one for one in found if one.after < before and one.after <= enough]
    return max(helping, key=lambda one: one.ridge or 0.0, default=none)


def fit_scale(x: Tensor, target: Tensor, weights: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """A norm's weight [D] that takes x [N, D] nearest to a target [N, D], each dimension for itself, pulled to the weight it had."""
    w = weights.double()[:, None]
    x, target = x.double(), target.double()
    power = (w * x * x).sum(0)
    damping = ridge * power.mean()
    missing = (w * x * (target - x * weight.double())).sum(0)
    return (weight.double() + missing / (power + damping).clamp_min(1e-30)).to(weight.dtype)
