"""How sensitive the model's distribution is to each matrix: the trace of the Fisher information, from squared gradients.

For a disturbance of independent, equal variance s^2 in all weights of a matrix the KL divergence grows by s^2 / 2 times this trace. Each
sequence's gradient is squared by itself: the square of a batch's summed gradient would be another thing (Kunstner et al. 2019,
arXiv:1905.12558). With tokens drawn from the model this is the true Fisher information (the gradients of several positions are then
uncorrelated, so that dividing by the number of predictions gives a mean per token); with the text's own tokens the empirical one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from edge_rt.hooks import DataError
from edge_rt_distill.diagnose.passes import Watch, backward
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.progress import Told, quiet


def squared_norms(inputs: Tensor, gradients: Tensor) -> Tensor:
    """[B]: |G^T X|^2 of inputs [B, T, in] and the gradients by the outputs [B, T, out], by the cheaper of two ways.

    ``sum (X X^T) * (G G^T)`` never holds the gradient itself (Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679).
    """
    length, wide, high = inputs.shape[1], inputs.shape[2], gradients.shape[2]
    if length * (wide + high) < wide * high:
        return ((inputs @ inputs.transpose(1, 2)) * (gradients @ gradients.transpose(1, 2))).sum((1, 2), dtype=torch.float64)
    return torch.stack([(g.T @ x).square().sum(dtype=torch.float64) for x, g in zip(inputs, gradients, strict=True)])


class Fisher:
    """Collects over batches: by site the summed squared norm of the gradient of each sequence's summed loss."""

    def __init__(self, model: Decoder) -> None:
        self.sums = dict.fromkeys(model.sites(), 0.0)
        self.predictions = 0.0

    def watch(self, model: Decoder) -> list[Watch]:
        """For ``passes.backward``."""

        def see(site: str, value: Tensor, gradient: Tensor) -> None:
            self.sums[site] += float(squared_norms(value, gradient).sum())

        return [Watch(model.linear(site), "matrix", partial(see, site)) for site in self.sums]

    def add(self, rows: Rows) -> None:
        """Once for each batch."""
        self.predictions += float(rows.mask.sum())

    def traces(self) -> dict[str, float]:
        """The trace by site, per predicted token (nats by squared unit of weight)."""
        for site, total in self.sums.items():
            if not total < float("inf"):
                raise DataError(f"the gradient of {site} is no number; the teacher's weights are damaged, get it again")
        return {site: total / max(1.0, self.predictions) for site, total in self.sums.items()}


def fisher(model: Decoder, batches: Sequence[Rows], *, sampled: bool, seed: int = 0, told: Told = quiet) -> dict[str, float]:
    """By site the trace of the Fisher information. ``sampled``: with tokens drawn from the model. Raises DataError.

    The same seed, batches and number of threads give the same result.
    """
    found = Fisher(model)
    generator = torch.Generator().manual_seed(seed) if sampled else None
    watched = found.watch(model)
    for number, rows in enumerate(batches):
        backward(model, rows, watched, generator)
        found.add(rows)
        told(number + 1, len(batches))
    return found.traces()
