"""The mean error of a site, drawn to zero as far as held-out tokens do not confirm it.

Biases alone can hurt: a mean is an average over inputs with different errors, and later layers amplify what is wrong for a single one.
"""

from __future__ import annotations

from torch import Tensor

from edge_rt_distill.compensate.correction import Correction


def fit(t: Tensor, weight: Tensor, held_out_t: Tensor, held_out_weight: Tensor, output_weight: Tensor) -> Correction | None:
    """The bias that t [n, out] ask for, times the factor in [0, 1] that is best on the held-out; None where that is no better than none."""
    mean = (weight @ t) / weight.sum()
    other = (held_out_weight @ held_out_t) / held_out_weight.sum()
    size = float(output_weight @ mean.square())
    factor = min(1.0, float(output_weight @ (mean * other)) / size) if size > 0 else 0.0
    return Correction(bias=mean * factor) if factor > 0 else None
