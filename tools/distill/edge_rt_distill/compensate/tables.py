"""Looked-up tables: the mean error of each cluster of inputs, added by the nearest centroid.

Clusters by k-means with k-means++ seeds (Arthur and Vassilvitskii, 2007) on the inputs of the quantised model. The nearest centroid is the
one with the largest c x - |c|^2 / 2, a product and an addition in the graph; *spherical* clusters (Dhillon and Modha, 2001) leave out the
addition: there all centroids have one length and only the direction of x counts. Rows are drawn to the mean of all (James and Stein, 1961):
a cluster of n tokens keeps n / (n + shrinkage) of its own, with the shrinkage that is best on held-out tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt_distill.compensate.correction import Correction, nearest

SHRINKAGES = (0.0, 2.0, 8.0, 32.0, 128.0)
"""Tokens' worth of the mean of all in each row."""


class Clusters(NamedTuple):
    """``centroids`` [K, in], ``offsets`` [K] or None (spherical)."""

    centroids: Tensor
    offsets: Tensor | None


def cluster(x: Tensor, weight: Tensor, count: int, *, seed: int, spherical: bool = False, rounds: int = 12) -> Clusters:
    """K <= ``count`` clusters of x [n, in] with weights [n]; fewer where there are fewer different inputs. Repeatable by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(x, dim=1) if spherical else x
    centroids = _seeds(points, weight, count, generator)
    for _ in range(rounds):
        offsets = None if spherical else -0.5 * centroids.square().sum(1)
        belongs = nearest(points, centroids, offsets)
        moved = _means(points, weight, belongs, centroids)
        moved = torch.nn.functional.normalize(moved, dim=1) if spherical else moved
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return Clusters(centroids, None if spherical else -0.5 * centroids.square().sum(1))


def _seeds(points: Tensor, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each seed is drawn with a probability that grows with the squared distance to those before."""
    chosen = [int(torch.multinomial(weight.clamp_min(0) + 1e-12, 1, generator=generator))]
    distance = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        mass = weight * distance
        if float(mass.sum()) <= 1e-12 * float(weight.sum()):
            break  # no other input is left
        chosen.append(int(torch.multinomial(mass, 1, generator=generator)))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen].clone()


def _means(values: Tensor, weight: Tensor, belongs: Tensor, empty: Tensor) -> Tensor:
    """Weighted mean of each cluster's values; a cluster without any keeps its row of ``empty``."""
    sums = torch.zeros_like(empty, dtype=values.dtype).index_add_(0, belongs, values * weight[:, None])
    mass = torch.zeros(len(empty), dtype=values.dtype).index_add_(0, belongs, weight.to(values.dtype))
    return torch.where(mass[:, None] > 0, sums / mass.clamp_min(1e-30)[:, None], empty)


def rows(belongs: Tensor, t: Tensor, weight: Tensor, count: int, shrinkage: float) -> Tensor:
    """Rows [K, out]: cluster means of the targets t [n, out], each drawn to the mean of all."""
    relative = weight / weight.mean().clamp_min(1e-30)
    mean = (relative @ t) / relative.sum()
    mass = torch.zeros(count, dtype=t.dtype).index_add_(0, belongs, relative)
    sums = torch.zeros(count, t.shape[1], dtype=t.dtype).index_add_(0, belongs, t * relative[:, None])
    return (sums + shrinkage * mean) / (mass + shrinkage).clamp_min(1e-30)[:, None] + (mass + shrinkage == 0)[:, None] * mean


Triple = tuple[Tensor, Tensor, Tensor]


def fit(clusters: Clusters, fitting: Triple, held_out: Triple, output_weight: Tensor) -> Correction:
    """The table of these clusters with the shrinkage that leaves least on held-out tokens. Triples: x [n, in], t [n, out], weights [n]."""
    x, t, weight = fitting
    belongs = nearest(x, *clusters)
    other_x, other_t, other_weight = held_out
    there = nearest(other_x, *clusters)

    def left(made: Tensor) -> float:
        return float(other_weight @ ((other_t - made[there]).square() @ output_weight))

    tried = [rows(belongs, t, weight, len(clusters.centroids), shrinkage) for shrinkage in SHRINKAGES]
    return Correction(centroids=clusters.centroids, offsets=clusters.offsets, rows=min(tried, key=left))
