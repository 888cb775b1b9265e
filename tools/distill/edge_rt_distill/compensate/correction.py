"""What is added to a linear's product in the running model, as data: low rank, a looked-up table, a bias, any of them together.

At a site (a linear, named as its weight in GGUF: ``blk.N.NAME``) the model computes

    y = Q x + B (A x) + rows[argmax(centroids x + offsets)] + bias

with Q the quantised weight. The same data is applied in torch (`apply.py`), and from the side file (`files.py`) in the runtime's graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

PARTS = ("low_a", "low_b", "centroids", "offsets", "rows", "bias")
"""Names of a site's tensors, in files too."""


class Correction(NamedTuple):
    """One site's tensors, float32: ``low_a`` [r, in] and ``low_b`` [out, r], ``centroids`` [K, in] and ``rows`` [K, out], ``bias`` [out].

    Of the first two pairs both or none are there. ``offsets`` [K] may be there beside centroids; none: zeros.
    """

    low_a: Tensor | None = None
    low_b: Tensor | None = None
    centroids: Tensor | None = None
    offsets: Tensor | None = None
    rows: Tensor | None = None
    bias: Tensor | None = None

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what there is."""
        for name in PARTS:
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    def change(self, x: Tensor) -> Tensor | float:
        """What is added to the product of x [.., in]: [.., out], or 0.0 where there is nothing. Gradients reach all but centroids."""
        total: Tensor | float = 0.0
        if self.low_a is not None and self.low_b is not None:
            total = total + x @ self.low_a.T @ self.low_b.T
        if self.centroids is not None and self.rows is not None:
            total = total + self.rows[nearest(x, self.centroids, self.offsets)]
        if self.bias is not None:
            total = total + self.bias
        return total

    def scaled(self, factor: float) -> Correction:
        """All that is added, ``factor`` times."""
        return self._replace(**{name: tensor * factor for name, tensor in self.parts() if name in ("low_b", "rows", "bias")})

    def kinds(self) -> tuple[str, ...]:
        """What it consists of, for people: ``rank 8``, ``table 16``, ``bias``."""
        found = []
        if self.low_a is not None:
            found.append(f"rank {self.low_a.shape[0]}")
        if self.rows is not None:
            found.append(f"table {self.rows.shape[0]}")
        return (*found, *(["bias"] if self.bias is not None else []))


Compensation = dict[str, Correction]
"""Corrections by site."""


def nearest(x: Tensor, centroids: Tensor, offsets: Tensor | None) -> Tensor:
    """Which centroid [K, in] each x [.., in] is looked up at: [..], int64. The first of equals, as in ggml."""
    scores = x.detach() @ centroids.T
    return (scores if offsets is None else scores + offsets).argmax(-1)


def check(site: str, correction: Correction, inner: int, outer: int) -> None:
    """Raise ValueError if the tensors do not fit a linear [outer, inner] or each other, or hold what is no number."""
    c = correction
    if (c.low_a is None) != (c.low_b is None) or (c.centroids is None) != (c.rows is None) or (c.offsets is not None and c.rows is None):
        raise ValueError(f"{site}: parts of a correction are missing")
    rank = 0 if c.low_a is None else c.low_a.shape[0]
    size = 0 if c.rows is None else c.rows.shape[0]
    wanted = {"low_a": (rank, inner), "low_b": (outer, rank), "centroids": (size, inner), "offsets": (size,), "rows": (size, outer)}
    wanted["bias"] = (outer,)
    for name, tensor in c.parts():
        if tuple(tensor.shape) != wanted[name] or 0 in tensor.shape:
            raise ValueError(f"{site}.{name} has the shape {tuple(tensor.shape)} and not {wanted[name]}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{site}.{name} holds values that are no numbers")
