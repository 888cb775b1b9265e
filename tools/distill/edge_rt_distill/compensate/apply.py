"""Corrections in a torch model, by forward hooks: exactly what the runtime computes from the side file, apart from rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from edge_rt_distill.compensate.correction import Compensation, Correction, check
from edge_rt_distill.model.decoder import Decoder

RESIDUAL = ("attn_output", "ffn_down")
"""Linears whose product is added to the residual stream."""


@contextmanager
def compensated(model: Decoder, compensation: Compensation) -> Iterator[None]:
    """While the context is open, the model's linears have these corrections added. Contexts may be nested: changes add up.

    Raises ValueError for sites the model does not have, and tensors that do not fit.
    """
    found = {site: model.linear(site) for site in model.sites()}
    for site, correction in compensation.items():
        if site not in found:
            raise ValueError(f"the model has no linear {site}")
        check(site, correction, found[site].in_features, found[site].out_features)
    handles = [found[site].register_forward_hook(_adding(correction)) for site, correction in compensation.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(correction: Correction) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + correction.change(inputs[0])

    return hook
