"""GPTQ (Frantar et al. 2022, arXiv:2210.17323) onto ggml's blocks: the error of each column is made good by the columns still to come.

A group of GPTQ is a ggml block: 32 neighbouring columns with a float16 scale, chosen when the group is reached, from the weights as they
then are, by trying the likely scales with the feedback inside the group. Afterwards codes and scales are refined in turn on the same
objective tr(E H E^T): codes one column at a time to their best level given all others (QuantEase, Behdin et al.
2023, arXiv:2309.01885), scales of a row's blocks together by least squares. Neither ever makes it worse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt_distill.quantise.formats import BLOCK, FACTORS, Blocks, Format, candidates, check, half, level, nearest

_ROWS = 256
"""Rows whose scales are fitted at once."""


class GptqOptions(NamedTuple):
    """``damping``: share of H's mean diagonal added to it; ``tried``: scales that are tried with feedback; ``by_importance``: whether
    blocks are taken in the order of their importance, not from left to right; ``sweeps``: times that codes and scales are refined.
    """

    damping: float = 0.01
    tried: int = 3
    by_importance: bool = True
    sweeps: int = 1


DEFAULTS = GptqOptions()


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H [in, in] in float64, positive definite: ``damping`` times its mean diagonal added, columns that are never used set to one."""
    matrix = hessian.double().clone()
    matrix = (matrix + matrix.T) / 2
    diagonal = matrix.diagonal()
    diagonal[diagonal <= 0] = 1.0
    diagonal += damping * diagonal.mean()
    return matrix


def error(weights: Tensor, values: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T), E = values - weights [out, in]: the squared error of the outputs, summed over them, for a mean input."""
    e = (values - weights).double()
    return float(((e @ hessian.double()) * e).sum())


def gptq(weights: Tensor, hessian: Tensor, format: Format, options: GptqOptions = DEFAULTS) -> Blocks:
    """Weights [out, in] in a format, given the second moments [in, in] of their input. Raises OptionError: see ``formats.check``."""
    check(format, weights)
    h = damped(hessian, options.damping)
    order = _order(h, options.by_importance)
    found = _feedback(weights.float()[:, order], h[order][:, order], format, options)
    back = order.argsort()
    blocks = _in_place(found, order, back)
    h32 = h.float()
    for _ in range(options.sweeps):
        blocks = refit_scales(weights.float(), refine_codes(weights.float(), blocks, h32), h32)
    return blocks


def _order(h: Tensor, by_importance: bool) -> Tensor:
    """The columns in the order they are rounded: blocks stay together, or their scale would not be known."""
    width = len(h)
    if not by_importance:
        return torch.arange(width)
    diagonal = h.diagonal().view(-1, BLOCK)
    blocks = diagonal.sum(1).argsort(descending=True)
    inside = diagonal.argsort(dim=1, descending=True)
    return (inside + torch.arange(0, width, BLOCK).unsqueeze(1))[blocks].flatten()


def _in_place(found: Blocks, order: Tensor, back: Tensor) -> Blocks:
    """Blocks of permuted columns with columns and blocks where they belong."""
    places = (order.view(-1, BLOCK)[:, 0] // BLOCK).argsort()
    return Blocks(
        found.format, found.codes[:, back].contiguous(), found.scales[:, places].contiguous(), found.minima[:, places].contiguous()
    )


def _feedback(w: Tensor, h: Tensor, format: Format, options: GptqOptions) -> Blocks:
    """GPTQ proper, from the first column to the last. ``h`` is positive definite, float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    w = w.clone()
    out, width = w.shape
    codes = torch.empty(out, width, dtype=torch.uint8)
    scales, minima = torch.empty(out, width // BLOCK), torch.empty(out, width // BLOCK)
    importance = upper.diagonal().pow(-2)
    for block in range(width // BLOCK):
        here, rest = slice(block * BLOCK, (block + 1) * BLOCK), slice((block + 1) * BLOCK, width)
        inner = upper[here, here]
        chosen = _scales(format, w[:, here], importance[here], options.tried)
        index, errors, loss = _round(format, w[:, here].expand(len(chosen[0]), -1, -1), inner, *chosen)
        best = loss.argmin(0)
        rows = torch.arange(out)
        codes[:, here] = index[best, rows].to(torch.uint8)
        scales[:, block], minima[:, block] = chosen[0][best, rows], chosen[1][best, rows]
        w[:, rest] -= errors[best, rows] @ upper[here, rest]
    return Blocks(format, codes, scales, minima)


def _scales(format: Format, x: Tensor, importance: Tensor, tried: int) -> tuple[Tensor, Tensor]:
    """The ``tried`` best scales and minima [K, out] of blocks ``x`` [out, 32] by the error without feedback."""
    scales, minima, errors = candidates(format, x, importance.expand_as(x), FACTORS)
    best = errors.topk(min(tried, len(errors)), dim=0, largest=False).indices
    return scales.gather(0, best), minima.gather(0, best)


def _round(format: Format, x: Tensor, upper: Tensor, scales: Tensor, minima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round blocks [K, out, 32] column by column, K ways: codes and GPTQ's errors [K, out, 32], and its loss [K, out]."""
    x = x.clone()
    index, errors = torch.empty_like(x), torch.empty_like(x)
    for j in range(x.shape[-1]):
        code = nearest(format, x[..., j], scales, minima)
        error = (x[..., j] - (level(format, code) * scales + minima)) / upper[j, j]
        x[..., j + 1 :] -= error.unsqueeze(-1) * upper[j, j + 1 :]
        index[..., j], errors[..., j] = code, error
    return index, errors, errors.square().sum(-1)


def refine_codes(weights: Tensor, blocks: Blocks, h: Tensor) -> Blocks:
    """One sweep over the columns: each to its level of least error, all others as they are. ``h`` [in, in] has a positive diagonal."""
    format, width = blocks.format, weights.shape[1]
    values = blocks.values()
    codes, diagonal = blocks.codes.clone(), h.diagonal()
    gradient = (values - weights) @ h
    for block in range(width // BLOCK):
        here = slice(block * BLOCK, (block + 1) * BLOCK)
        inner, g = h[here, here], gradient[:, here].clone()
        scale, minimum = blocks.scales[:, block], blocks.minima[:, block]
        before = values[:, here].clone()
        for j in range(BLOCK):
            now = values[:, here.start + j]
            code = nearest(format, now - g[:, j] / diagonal[here.start + j], scale, minimum)
            change = level(format, code) * scale + minimum - now
            g += change.unsqueeze(1) * inner[j]
            values[:, here.start + j] += change
            codes[:, here.start + j] = code.to(torch.uint8)
        gradient += (values[:, here] - before) @ h[here]
    return blocks._replace(codes=codes)


def refit_scales(weights: Tensor, blocks: Blocks, h: Tensor) -> Blocks:
    """Scales (and minima) of each row's blocks by least squares on H, codes as they are; rows that float16 makes worse keep theirs."""
    out, width = weights.shape
    count = width // BLOCK
    levels = level(blocks.format, blocks.codes.float())
    scales, minima = blocks.scales.clone(), blocks.minima.clone()
    aim = weights @ h
    across = h.view(count, BLOCK, count, BLOCK)
    ones = across.sum((1, 3)) if blocks.format.shifted else None
    for first in range(0, out, _ROWS):
        rows = slice(first, first + _ROWS)
        lvl = levels[rows].view(-1, count, BLOCK)
        # [rows, count, BLOCK, count]: sums over the second block's columns, one level vector a block.
        half_way = torch.einsum("aibj,rbj->raib", across, lvl)
        system = torch.einsum("rai,raib->rab", lvl, half_way)
        right = (aim[rows].view(-1, count, BLOCK) * lvl).sum(-1)
        if ones is not None:
            mixed = half_way.sum(2).transpose(1, 2)
            system = torch.cat([torch.cat([system, mixed], 2), torch.cat([mixed.transpose(1, 2), ones.expand(len(lvl), -1, -1)], 2)], 1)
            right = torch.cat([right, aim[rows].view(-1, count, BLOCK).sum(-1)], 1)
        found = _solve(system, right, torch.cat([scales[rows], minima[rows]], 1) if ones is not None else scales[rows])
        scales[rows] = half(found[:, :count])
        if ones is not None:
            minima[rows] = half(found[:, count:])
    fitted = blocks._replace(scales=scales, minima=minima)
    return _better(weights, blocks, fitted, h)


def _solve(system: Tensor, right: Tensor, now: Tensor) -> Tensor:
    """``now`` [n, k] changed so that it solves the normal equations, damped: a block of one level does not tell scale from minimum."""
    system, right, now = system.double(), right.double(), now.double()
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30
    change: Tensor = torch.linalg.solve(system, right - (system @ now.unsqueeze(-1)).squeeze(-1))
    return (now + change).float()


def _better(weights: Tensor, old: Blocks, new: Blocks, h: Tensor) -> Blocks:
    """Of each row the one with less error."""
    errors = []
    for blocks in (old, new):
        e = blocks.values() - weights
        errors.append(((e @ h) * e).sum(1))
    take = (errors[1] < errors[0]).unsqueeze(1)
    return new._replace(scales=torch.where(take, new.scales, old.scales), minima=torch.where(take, new.minima, old.minima))
