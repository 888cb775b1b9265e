"""What each layer does for the result: how much it turns the residual stream, and how far the distribution moves without it.

Block influence is 1 - cos(entry, exit) (ShortGPT, Men et al. 2024, arXiv:2403.03853), cheap and only a hint; the divergence
KL(teacher || teacher without the layer), in nats a token over the whole vocabulary, is what counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_rt_distill.diagnose.passes import Step
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.divergence import Final, divergences, final
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.progress import Told, quiet

_WRITES = {"attention": "attn_output", "ffn": "ffn_down"}
"""The matrix through which a half of a layer writes to the stream: without what it writes, the half is not there."""


class Removal(NamedTuple):
    """What is taken away: a layer, or half of one."""

    kind: Literal["layer", "attention", "ffn"]
    layer: int


class Removed(NamedTuple):
    """``sums`` [R, N] float64: by removal and sequence the KL divergence (nats), summed over the predictions that count.

    ``counts`` [N]: of these the number; 0 for sequences that were not looked at.
    """

    removals: tuple[Removal, ...]
    sums: Tensor
    counts: Tensor

    def mean(self) -> Tensor:
        """[R]: nats a token."""
        return self.sums.sum(1) / self.counts.sum().clamp_min(1)

    def error(self) -> Tensor:
        """[R]: the standard error of the mean, sequences being what was drawn; NaN for less than two."""
        seen = self.counts > 0
        counts, number = self.counts[seen], int(seen.sum())
        if number < 2:
            return torch.full((len(self.removals),), float("nan"), dtype=torch.float64)
        left = self.sums[:, seen] - self.mean()[:, None] * counts
        return (left.square().sum(1) * number / (number - 1)).sqrt() / counts.sum()


def all_removals(model: Decoder, halves: bool) -> list[Removal]:
    """Each layer; with ``halves`` also its attention alone and its FFN alone."""
    kinds: tuple[Literal["layer", "attention", "ffn"], ...] = ("layer", "attention", "ffn") if halves else ("layer",)
    return [Removal(kind, number) for kind in kinds for number in range(len(model.layers))]


class BlockInfluence:
    """1 - cos of the stream before and behind each layer: ``mean()`` [L], over positions but the first, where the stream is huge."""

    def __init__(self, model: Decoder) -> None:
        self.sums = torch.zeros(len(model.layers), dtype=torch.float64)
        self.positions = 0

    def add(self, step: Step, rows: Rows) -> None:
        """A layer's step over a batch."""
        later = rows.real.clone()
        later[:, 0] = False
        cosine = F.cosine_similarity(step.entry[later], step.exit[later], dim=-1)
        self.sums[step.layer] += (1 - cosine).sum(dtype=torch.float64)
        self.positions += int(later.sum()) if step.layer == 0 else 0

    def mean(self) -> Tensor:
        """[L]."""
        return self.sums / max(1, self.positions)


def removal_kl(
    model: Decoder, batches: Sequence[Rows], removals: Sequence[Removal], sequences: int, *, without: Collection[int] = (),
    told: Told = quiet,
) -> Removed:  # fmt: skip
    """The divergence of the model without each of ``removals`` (and without the layers ``without``, in each case) from the whole model.

    ``sequences``: how many there are, of which the batches hold some. What stands before a removed layer is computed once for all.
    Held at once: a batch's states at every layer's entry, and its final states by removal (only where a prediction counts).
    """
    sums = torch.zeros(len(removals), sequences, dtype=torch.float64)
    counts = torch.zeros(sequences, dtype=torch.float64)
    steps = len(batches) * 2 * len(removals)  # as many of passes as of divergences, which take about as long
    for number, rows in enumerate(batches):
        before = number * 2 * len(removals)
        where, at = rows.mask.nonzero(as_tuple=True)
        with torch.no_grad():
            whole = final(model, rows)
            others: list[Final] = []
            for states in _without(model, rows, removals, without):
                others.append(Final(states[where, at], whole.head))
                told(before + len(others), steps)
            found = divergences(others, whole, _share(told, before + len(others), len(others), steps)).double()
        index = torch.tensor(rows.numbers)
        sums.index_add_(1, index[where], found)
        counts[index] = rows.mask.sum(1).double()
    return Removed(tuple(removals), sums, counts)


def _without(model: Decoder, rows: Rows, removals: Sequence[Removal], without: Collection[int]) -> Iterator[Tensor]:
    """Final states [B, T, D] of the model without each, started at the entry of the layer in question."""
    entries = model(rows.tokens, states=sorted({one.layer for one in removals}), skip=without).states
    for one in removals:
        skip = {*without, *range(one.layer)}
        if one.kind == "layer":
            yield model.run(entries[one.layer], skip=skip | {one.layer}).hidden
        else:
            with _silent(model, one.layer, _WRITES[one.kind]):
                yield model.run(entries[one.layer], skip=skip).hidden


@contextmanager
def _silent(model: Decoder, layer: int, matrix: str) -> Iterator[None]:
    """While open, a matrix of a layer gives zeros."""
    handle = model.linear(f"blk.{layer}.{matrix}").register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    try:
        yield
    finally:
        handle.remove()


def _share(told: Told, before: int, share: int, steps: int) -> Told:
    """Progress of a part that is ``share`` of all steps, ``before`` of which are done."""
    return lambda done, total: told(before + share * done // total, steps)


class Dropped(NamedTuple):
    """A step of a greedy removal: the layer, and the divergence (nats a token) without it and all that were dropped before it."""

    layer: int
    kl: float


def greedy(
    model: Decoder, batches: Sequence[Rows], first: Tensor, count: int, sequences: int, *, candidates: int = 8, told: Told = quiet,
) -> list[Dropped]:  # fmt: skip
    """``count`` layers, one after the other, each time that without which the divergence is least, given those already gone.

    ``first`` [L]: divergence on removal of each layer alone, from the whole model; the first step takes its least. Later steps try only
    the ``candidates`` that were best in the step before, for what costs much alone costs much with others gone.
    """
    if count <= 0:
        return []
    order = [Dropped(int(first.argmin()), float(first.min()))]
    best = first.argsort().tolist()
    while len(order) < min(count, len(model.layers) - 1):
        gone = [one.layer for one in order]
        tried = [Removal("layer", layer) for layer in best if layer not in gone][:candidates]
        found = removal_kl(
            model, batches, tried, sequences, without=gone,
            told=_within(told, len(order) - 1, min(count, len(model.layers) - 1) - 1),
        ).mean()  # fmt: skip
        order.append(Dropped(tried[int(found.argmin())].layer, float(found.min())))
        ranked = [tried[place].layer for place in found.argsort().tolist()]
        best = ranked + [layer for layer in best if layer not in ranked]
    return order


def _within(told: Told, step: int, steps: int) -> Told:
    """Progress of one step of several, in one count."""
    return lambda done, total: told(step * total + done, steps * total)
