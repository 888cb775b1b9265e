"""What each form of correction would gain at each site, estimated one site at a time, from the inputs that the quantised model sees.

The error of a site is (W - Q) x. It is weighed by the model's sensitivity there and measured on held-out text, with corrections as they are
stored: the estimate is the fall of the KL in nats a token, if the errors of sites were independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt_distill.compensate import bias, low_rank, tables
from edge_rt_distill.compensate.correction import Correction
from edge_rt_distill.compensate.cost import Candidate
from edge_rt_distill.compensate.sensitivity import Sensitivity
from edge_rt_distill.compensate.storage import Storage, as_stored, stored_bytes
from edge_rt_distill.model.decoder import GROUPS, Decoder
from edge_rt_distill.progress import Told, quiet
from edge_rt_distill.quantise.walk import Stream


@dataclass(frozen=True)
class Forms:
    """Which forms are tried, at which matrices (``sites``: names, () for all).

    ``table_sites``: where tables are tried, alone and together with the ranks of ``table_ranks``. ``vectors``: inputs of a site that its
    tables are fitted to. ``ridge``: see `low_rank.factors`.
    """

    ranks: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    tables: tuple[int, ...] = (8, 16, 32, 64)
    table_sites: tuple[str, ...] = ("attn_output", "ffn_down")
    table_ranks: tuple[int, ...] = (8,)
    bias: bool = True
    spherical: bool = False
    sites: tuple[str, ...] = ()
    storage: Storage = "Q8_0"
    ridge: float = 1e-3
    vectors: int = 4096
    seed: int = 0


class Inputs(NamedTuple):
    """Vectors x [n, in] that go into a site. ``first`` [n]: which are those of a sequence's position 0."""

    x: Tensor
    first: Tensor

    def spread(self, most: int) -> Inputs:
        """At most so many of them, at equal distances; of position 0 all."""
        kept = self.first.clone()
        kept[:: -(-len(self.x) // most)] = True
        return Inputs(self.x[kept], self.first[kept])

    def weight(self, first: float) -> Tensor:
        """Weights of the tokens [n]: ``first`` at position 0, else 1."""
        return torch.where(self.first, first, 1.0)


def inputs(stream: Stream, names: Sequence[str]) -> dict[str, Inputs]:
    """What goes into some matrices of the layer that the stream is at."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[[int, Tensor], None]:
        return lambda number, x: pieces[name].append(x[stream.batches[number].real])

    stream.look({name: keep(name) for name in names})
    first = first_positions(stream)
    return {name: Inputs(torch.cat(found), first) for name, found in pieces.items()}


def first_positions(stream: Stream) -> Tensor:
    """Which of the real positions [n] begin a sequence."""
    return torch.cat([(torch.arange(batch.real.shape[1]) == 0).expand(batch.real.shape)[batch.real] for batch in stream.batches])


def survey(
    teacher: Decoder, student: Decoder, fitting: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]],
    sensitivity: Mapping[str, Sensitivity], forms: Forms, told: Told = quiet,
) -> list[Candidate]:  # fmt: skip
    """All candidates, with their gains on held-out text. ``told``: called with layers done and in all."""
    streams = Stream(student, fitting), Stream(student, held_out)
    found: list[Candidate] = []
    own = {site for site in student.sites() if not forms.sites or site.split(".")[2] in forms.sites}
    while not streams[0].ended:
        layer = streams[0].index
        groups = [[site for name in group if (site := f"blk.{layer}.{name}") in own] for group in GROUPS]
        heads = [sites[0].split(".")[2] for sites in groups if sites]
        seen = [inputs(stream, heads) for stream in streams] if heads else []
        for name, sites in zip(heads, filter(None, groups), strict=True):
            group = _Group(_Text(seen[0][name]), _Text(seen[1][name]), forms)
            for site in sites:
                difference = teacher.linear(site).weight.detach() - student.linear(site).weight.detach()
                if bool(difference.any()):
                    found += group.candidates(site, difference, sensitivity[site])
        for stream in streams:
            stream.advance()
        told(streams[0].index, len(streams[0].layers))
    return found


class _Text:
    """A text's inputs of a site, and their sums over position 0 and over the others, a token."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        parts = [inputs.x[inputs.first], inputs.x[~inputs.first]]
        self._grams = [(part.T @ part).double() / len(inputs.x) for part in parts]
        self._sums = [part.sum(0) / len(inputs.x) for part in parts]
        self._share = len(parts[0]) / len(inputs.x)

    def gram(self, first: float) -> Tensor:
        """Sum of w x x^T [in, in] a token, float64, with a weight for position 0."""
        return self._grams[0] * first + self._grams[1]

    def mean(self, first: float) -> tuple[Tensor, float]:
        """Weighted mean of the inputs [in], and the mean weight of a token."""
        mass = self._share * first + 1 - self._share
        return (self._sums[0] * first + self._sums[1]) / max(mass, 1e-9), mass


class _Group:
    """The inputs that some matrices share, and what is worked out of them once."""

    def __init__(self, here: _Text, other: _Text, forms: Forms) -> None:
        self.here, self.other, self.forms = here, other, forms
        self._clusters: dict[int, tables.Clusters] = {}

    def clusters(self, count: int) -> tables.Clusters:
        if count not in self._clusters:
            some = self.here.inputs.spread(self.forms.vectors)
            self._clusters[count] = tables.cluster(some.x, some.weight(1.0), count, seed=self.forms.seed, spherical=self.forms.spherical)
        return self._clusters[count]

    def candidates(self, site: str, difference: Tensor, minds: Sensitivity) -> Iterator[Candidate]:
        """Every form at a site whose weight lost ``difference`` [out, in]."""
        forms, here = self.forms, self.here.inputs
        first = minds.first_weight(here.x[here.first] @ difference.T)
        if forms.bias and (one := self._bias(difference, minds.features, first)):
            yield self._candidate(site, one, self._bias_gain(one, difference, minds.features, first))
        yield from self._tables(site, Correction(), 0.0, difference, minds.features, first)
        yield from self._low_ranks(site, difference, minds.features, first)

    def _low_ranks(self, site: str, difference: Tensor, g: Tensor, first: float) -> Iterator[Candidate]:
        """Low rank, and where these are to be tried a bias or a table with it."""
        forms = self.forms
        ranks = [rank for rank in forms.ranks if rank <= min(difference.shape)]
        here, there = (low_rank.of_difference(text.gram(first), difference) for text in (self.here, self.other))
        best = low_rank.factors(here, g, prior=difference, ridge=forms.ridge, most=max(ranks, default=1))
        for rank in ranks:
            a, b = best.of_rank(rank)
            stored = as_stored(Correction(low_a=a, low_b=b), forms.storage)
            assert stored.low_a is not None
            assert stored.low_b is not None
            before, after = low_rank.left_over(there, stored.low_a, stored.low_b, g)
            gain, rest = (before - after) / 2, difference - stored.low_b @ stored.low_a
            yield self._candidate(site, stored, gain)
            if forms.bias and (one := self._bias(rest, g, first)):
                yield self._candidate(site, stored._replace(bias=one.bias), gain + self._bias_gain(one, rest, g, first))
            if rank in forms.table_ranks:
                yield from self._tables(site, stored, gain, rest, g, first)

    def _bias(self, difference: Tensor, g: Tensor, first: float) -> Correction | None:
        mean, other = (difference @ text.mean(first)[0] for text in (self.here, self.other))
        one = torch.ones(1)
        return bias.fit(mean[None], one, other[None], one, g)

    def _bias_gain(self, one: Correction, difference: Tensor, g: Tensor, first: float) -> float:
        assert one.bias is not None
        mean, mass = self.other.mean(first)
        return mass * float(g @ (2 * one.bias * (difference @ mean) - one.bias.square())) / 2

    def _tables(self, site: str, low: Correction, gain: float, difference: Tensor, g: Tensor, first: float) -> Iterator[Candidate]:
        """Tables for what ``low``, which gains ``gain``, left of the difference."""
        if site.split(".")[2] not in self.forms.table_sites or not self.forms.tables:
            return
        some, other = (text.inputs.spread(self.forms.vectors) for text in (self.here, self.other))
        here, there = ((seen.x, seen.x @ difference.T, seen.weight(first)) for seen in (some, other))
        x, t, weight = there
        for count in self.forms.tables:
            one = as_stored(tables.fit(self.clusters(count), here, there, g), self.forms.storage)
            fall = t.square() - (t - one.change(x)).square()
            both = low._replace(centroids=one.centroids, offsets=one.offsets, rows=one.rows)
            yield self._candidate(site, both, gain + float(weight @ fall @ g) / len(x) / 2)

    def _candidate(self, site: str, one: Correction, gain: float) -> Candidate:
        return Candidate(site, one.kinds(), stored_bytes(one, self.forms.storage), gain)
