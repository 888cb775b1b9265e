"""Which matrices get more bits: by the divergence that their error is predicted to cost, per byte.

An error d of a matrix' output changes the model's distribution by KL = d^T F d / 2 to second order, F the output's Fisher information:
the expected outer product of the gradients of log-probabilities of tokens drawn from the model itself. With the diagonal of F [out] and the
second moments H of the input, an error E of the weights costs sum_r F_r (E H E^T)_rr / 2 nats a token (K-FAC's factors, Martens and Grosse
2015, arXiv:1503.05671; as a measure for bits: Dong et al. 2020, arXiv:1911.03852).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from edge_rt.hooks import GGML_TYPES, OptionError
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.quantise.matrices import decode, encode
from edge_rt_distill.quantise.statistics import layers
from edge_rt_distill.quantise.walk import side_by_side

_BLOCKS = {name: (block, size) for name, block, size in GGML_TYPES.values()}


class Choice(NamedTuple):
    """A type for a matrix: its bytes, and the divergence it is predicted to cost (nats a token)."""

    type: str
    nbytes: int
    cost: float


def sensitivity(model: Decoder, sequences: Sequence[Sequence[int]], *, seed: int = 0, batch_tokens: int = 1024) -> dict[str, Tensor]:
    """By site the mean squares [out] of the output's gradients: the diagonal of its Fisher information, over all but first positions.

    Takes about four forward passes. Raises DataError if there are no tokens.
    """
    found = {site: torch.zeros(model.linear(site).out_features, dtype=torch.float64) for site in model.sites()}
    draw, count = torch.Generator().manual_seed(seed), 0
    for rows in side_by_side(sequences, batch_tokens):
        tokens, real = rows.tokens, rows.real
        with ExitStack() as stack:
            for site in found:
                handle = model.linear(site).register_forward_hook(_adds_to(found[site], real))
                stack.callback(handle.remove)
            with torch.enable_grad():
                entry = model.token_embd(tokens).detach().requires_grad_()
                log_p = model.logits(model.run(entry).hidden).log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=draw).view(*tokens.shape, 1)
        torch.autograd.grad((log_p.gather(-1, drawn).squeeze(-1) * real).sum(), entry)
        count += int(real[:, 1:].sum())
    return {site: (total / max(1, count)).float() for site, total in found.items()}


def _adds_to(total: Tensor, real: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def add(gradient: Tensor) -> None:
        total.add_(gradient[:, 1:][real[:, 1:]].square().sum(0))

    def hook(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
        cast("Any", out).register_hook(add)

    return hook


def choices(
    model: Decoder, sequences: Sequence[Sequence[int]], types: Sequence[str], fisher: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[Choice]]]:
    """By site what each of ``types`` (ggml's names) costs, weights rounded by importance; types that do not fit its width are left out.

    GPTQ makes all types better by much the same factor. Raises OptionError if none fits.
    """
    for index, found in layers(model, sequences, hessian=True, sample=0):
        for name, known in found.items():
            site = f"blk.{index}.{name}"
            if site not in fisher or known.hessian is None:
                continue
            weights = model.linear(site).weight.detach()
            fitting = [one for one in types if one in _BLOCKS and weights.shape[1] % _BLOCKS[one][0] == 0]
            if not fitting:
                raise OptionError(f"none of {', '.join(types)} fits rows of {weights.shape[1]} ({site}); add Q4_0")
            yield site, [_choice(weights, one, known.hessian, known.square, fisher[site]) for one in fitting]


def _choice(weights: Tensor, type_name: str, hessian: Tensor, square: Tensor, fisher: Tensor) -> Choice:
    encoded = encode(weights, type_name, square)
    e = decode(encoded) - weights
    cost = 0.5 * float((fisher * ((e @ hessian) * e).sum(1)).sum())
    return Choice(type_name, encoded.data.nbytes, cost)


def allocate(offers: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, str]:
    """By site a type, such that all together have at most ``budget`` bytes: from the smallest up, by gain per byte.

    Raises OptionError if the smallest types are too large already.
    """
    chosen = {site: min(some, key=lambda one: (one.nbytes, one.cost)) for site, some in offers.items()}
    left = budget - sum(one.nbytes for one in chosen.values())
    if left < 0:
        raise OptionError(f"the smallest types have {budget - left} bytes, more than {budget}; allow smaller types or more bytes")
    while True:
        steps = [
            ((chosen[site].cost - one.cost) / (one.nbytes - chosen[site].nbytes), site, one)
            for site, some in offers.items()
            for one in some
            if 0 < one.nbytes - chosen[site].nbytes <= left and one.cost < chosen[site].cost
        ]
        if not steps:
            return {site: one.type for site, one in chosen.items()}
        _, site, best = max(steps, key=lambda step: (step[0], step[1]))
        left -= best.nbytes - chosen[site].nbytes
        chosen[site] = best
