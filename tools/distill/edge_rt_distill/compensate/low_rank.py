"""Low rank B A that stands in for what a linear's INT4 weight lost, fitted to the inputs it sees.

Minimises over rank r, with G the weights of output features and the expectation over tokens (weighted):

    E || G^1/2 (t - B A x) ||^2  +  ridge || G^1/2 (B A - E) ||^2

With t = E x, E = W - Q, this is the closed form of QERA (Zhang and others, 2024, arXiv:2410.06040), of which LQER (Zhang and others, 2024,
arXiv:2402.02446) and ASVD keep the diagonal. With t the error of the residual stream it is reduced-rank regression (Izenman, 1975) that
also repairs what earlier layers left; the ridge draws it to E, which needs no data, where tokens are few.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Weighted second moments of a site, float64: ``inputs`` E[w x x^T] [in, in], ``cross`` E[w t x^T] [out, in], ``target`` E[w t^2]."""

    inputs: Tensor
    cross: Tensor
    target: Tensor


class Factors(NamedTuple):
    """All ranks at once: the best of rank r is ``b[:, :r] @ a[:r]``. ``values``: singular values, falling, of the weighted problem."""

    a: Tensor
    b: Tensor
    values: Tensor

    def of_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] in float32, of like size per component, so that neither leaves the range of its type."""
        a, b = self.a[:rank], self.b[:, :rank]
        balance = (b.norm(dim=0) / a.norm(dim=1).clamp_min(1e-300)).clamp_min(1e-300).sqrt()
        return (a * balance[:, None]).float(), (b / balance).float()


def moments(x: Tensor, t: Tensor, weight: Tensor) -> Moments:
    """Moments of inputs x [n, in] and targets t [n, out] with weights [n] of tokens."""
    share = (weight / len(x)).to(x.dtype)
    weighted = x * share[:, None]
    return Moments((x.T @ weighted).double(), (t.T @ weighted).double(), (share @ t.square()).double())


def of_difference(inputs: Tensor, difference: Tensor) -> Moments:
    """Moments where the target is ``difference`` [out, in] times the input, whose second moments are ``inputs`` [in, in]."""
    cross = difference.double() @ inputs
    return Moments(inputs, cross, (cross * difference.double()).sum(1))


def factors(found: Moments, output_weight: Tensor, *, prior: Tensor | None = None, ridge: float = 1e-3, most: int = 64) -> Factors:
    """Factors up to rank ``most``. ``output_weight`` [out] positive; ``prior`` [out, in] (None: zeros) is where the ridge draws to;
    ``ridge`` is in units of the inputs' mean square."""
    width = found.inputs.shape[0]
    strength = max(ridge, 1e-9) * float(found.inputs.diagonal().mean().clamp_min(1e-30))
    gram = found.inputs + strength * torch.eye(width, dtype=torch.float64)
    cross = found.cross if prior is None else found.cross + strength * prior.double()
    lower = torch.linalg.cholesky(gram)
    root = output_weight.double().clamp_min(1e-30).sqrt()
    whitened = torch.linalg.solve_triangular(lower, (cross * root[:, None]).T, upper=False).T  # G^1/2 M L, with M = cross gram^-1
    rank = min(most, *whitened.shape)
    if whitened.shape[0] <= whitened.shape[1]:
        values, vectors = torch.linalg.eigh(whitened @ whitened.T)
        left = vectors.flip(1)[:, :rank]
        right = left.T @ whitened  # [r, in], rows as long as the singular values
        singular = values.flip(0)[:rank].clamp_min(0).sqrt()
        b, a = left, right
    else:
        values, vectors = torch.linalg.eigh(whitened.T @ whitened)
        a = vectors.flip(1)[:, :rank].T
        b = whitened @ a.T
        singular = values.flip(0)[:rank].clamp_min(0).sqrt()
    return Factors(torch.linalg.solve_triangular(lower.T, a.T, upper=True).T, b / root[:, None], singular)


def left_over(found: Moments, a: Tensor, b: Tensor, output_weight: Tensor) -> tuple[float, float]:
    """Weighted squared error on these moments before and after B A: (E |t|^2_G, E |t - B A x|^2_G). Of other text: held-out."""
    a, b, g = a.double(), b.double(), output_weight.double()
    before = float(g @ found.target)
    explained = 2 * ((found.cross @ a.T) * b).sum(1) - ((b @ (a @ found.inputs @ a.T)) * b).sum(1)
    return before, before - float(g @ explained)
