"""What goes into each matrix: mean, mean squares, second moments (the Hessian of its squared error) and a sample of the vectors.

With y = W x and an error E of the weights the output's squared error over the calibration text is tr(E H E^T), H = X^T X / n [in, in]
(Optimal Brain Compression, Frantar and Alistarh 2022, arXiv:2208.11580); its diagonal is the importance ggml's quantisers take.
Models have massive activations (Sun et al. 2024, arXiv:2402.17762): at position 0 a vector can be hundreds of times longer than others,
and all moments would speak of it alone. ``First`` says what becomes of such vectors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from edge_rt.hooks import DataError
from edge_rt_distill.model.decoder import GROUPS, LINEARS
from edge_rt_distill.quantise.walk import BATCH_TOKENS, Sees, Stream

First = Literal["leave", "cap", "keep"]
"""Position 0 of each sequence is left out, or vectors longer than ``CAP`` times their sequence's median are shortened to it, or none."""
CAP = 4.0
SAMPLE = 4096
"""Vectors that are kept of each site."""


@dataclass(frozen=True)
class SiteStatistics:
    """Of the vectors that go into one matrix. ``positions`` are the sampled vectors' places: the same ones for all sites of a run.

    mean, square (mean squares): float32 [in]; hessian: float32 [in, in] or None; sample: float32 [n, in].
    """

    count: int
    mean: Tensor
    square: Tensor
    sample: Tensor
    hessian: Tensor | None = None


class Moments:
    """Running sums over vectors [.., in]. float64 where sums are held: 16k squares of float32 lose three digits."""

    def __init__(self, *, hessian: bool) -> None:
        self.count = 0
        self._sums: tuple[Tensor, Tensor] | None = None
        self._hessian: Tensor | None = None
        self._wants = hessian

    def add(self, rows: Tensor) -> None:
        """Count vectors [n, in] in."""
        if self._sums is None:
            width = rows.shape[1]
            self._sums = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
            self._hessian = torch.zeros(width, width, dtype=torch.float64) if self._wants else None
        self.count += len(rows)
        self._sums[0].add_(rows.sum(0, dtype=torch.float64))
        self._sums[1].add_(rows.square().sum(0, dtype=torch.float64))
        if self._hessian is not None:
            self._hessian.add_(rows.T @ rows)

    def hessian(self) -> Tensor:
        """X^T X / n, float64 [in, in]. Raises DataError if nothing was counted."""
        if self._hessian is None or not self.count:
            raise DataError("no vector of the calibration text reached the matrix; give longer samples")
        return self._hessian / self.count

    def result(self, sample: Tensor) -> SiteStatistics:
        """Raises DataError if nothing was counted, or if it is not finite."""
        if self._sums is None or not self.count:
            raise DataError("no vector of the calibration text reached the matrix; give longer samples")
        mean, square = (total / self.count for total in self._sums)
        if not bool(torch.isfinite(square).all()):
            raise DataError("the model's activations on the calibration text are not finite; check the model")
        return SiteStatistics(self.count, mean.float(), square.float(), sample, self.hessian().float() if self._wants else None)


def counted(x: Tensor, real: Tensor, first: First, *others: Tensor) -> list[Tensor]:
    """Of a batch's vectors [B, T, in] those that count, as [n, in]; and the same of ``others``, shortened alike. ``real`` [B, T]."""
    all_ = (x, *others)
    if first == "leave":
        real = real.clone()
        real[:, 0] = False
    elif first == "cap":
        lengths = x.norm(dim=-1).masked_fill(~real, float("nan"))
        most = CAP * lengths.nanmedian(dim=1, keepdim=True).values
        factors = (most / lengths.clamp(min=1e-30)).clamp(max=1.0).nan_to_num(1.0).unsqueeze(-1)
        all_ = tuple(one * factors for one in all_)
    return [one[real] for one in all_]


class _Chosen:
    """A seeded choice among the positions that count: the same places for every site, so that samples of sites belong together."""

    def __init__(self, stream: Stream, first: First, most: int, seed: int) -> None:
        sizes = [len(counted(batch.real.unsqueeze(-1).float(), batch.real, first)[0]) for batch in stream.batches]
        total = sum(sizes)
        if not total:
            raise DataError("the calibration text has no position that counts; give sequences of two tokens and more")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:most].sort().values
        bounds = torch.tensor([0, *sizes]).cumsum(0)
        self._rows = [order[(order >= lo) & (order < hi)] - lo for lo, hi in pairwise(bounds)]

    def of(self, number: int, rows: Tensor) -> Tensor:
        """The chosen ones of a batch's counted vectors."""
        return rows[self._rows[number]].clone()


def observe(
    stream: Stream, names: Collection[str], *, hessian: bool, first: First = "leave", sample: int = 0, seed: int = 0
) -> dict[str, SiteStatistics]:
    """Statistics of the named matrices' inputs at the layer the stream is at; matrices that share an input share the result."""
    chosen = _Chosen(stream, first, sample, seed)
    groups = [[name for name in group if name in names] for group in GROUPS]
    moments = {group[0]: Moments(hessian=hessian) for group in groups if group}
    samples: dict[str, list[Tensor]] = {name: [] for name in moments}

    def sees(name: str) -> Sees:
        def see(number: int, x: Tensor) -> None:
            (rows,) = counted(x, stream.batches[number].real, first)
            moments[name].add(rows)
            samples[name].append(chosen.of(number, rows))

        return see

    stream.look({name: sees(name) for name in moments})
    found = {name: one.result(torch.cat(samples[name])) for name, one in moments.items()}
    return {name: found[group[0]] for group in groups for name in group}


def layers(
    model: nn.Module, sequences: Sequence[Sequence[int]], sites: Collection[str] | None = None, *, hessian: bool, first: First = "leave",
    sample: int = SAMPLE, seed: int = 0, batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[int, dict[str, SiteStatistics]]]:  # fmt: skip
    """Layer by layer, what goes into its matrices by name ("attn_q"), over token sequences: only one layer's statistics need to live.

    ``sites``: "blk.0.attn_q"; None: all. ``sample``: how many vectors are kept of each site, chosen by ``seed``. With ``hessian`` a layer
    of width 576 and FFN 1536 takes 13 MB. Raises DataError if there is nothing to count or a value is not finite.
    """
    stream = Stream(model, sequences, batch_tokens=batch_tokens)
    while not stream.ended:
        names = [name for name in LINEARS if sites is None or f"blk.{stream.index}.{name}" in sites]
        if names:
            yield stream.index, observe(stream, names, hessian=hessian, first=first, sample=sample, seed=seed)
        stream.advance()
