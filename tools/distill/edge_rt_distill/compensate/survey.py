"""What each form of correction would gain at each site, estimated one site at a time, from the inputs that the quantised model sees.

The error of a site is (W - Q) x. It is weighed by the model's sensitivity there and measured on held-out text, with corrections as they are
stored: the estimate is the fall of the KL in nats a token, if the errors of sites were independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt_distill.compensate import bias, low_rank, tables
from edge_rt_distill.compensate.correction import Correction
from edge_rt_distill.compensate.cost import Candidate, Costs
from edge_rt_distill.compensate.sensitivity import Sensitivity
from edge_rt_distill.compensate.storage import Storage, as_stored, stored_bytes
from edge_rt_distill.model.decoder import GROUPS, Decoder
from edge_rt_distill.quantise.walk import Stream


@dataclass(frozen=True)
class Forms:
    """Which forms are tried, at which matrices (``sites``: names, () for all).

    ``table_sites``: where tables are tried. ``vectors``: inputs of a site that its tables are fitted to. ``ridge``: see `low_rank.factors`.
    """

    ranks: tuple[int, ...] = (2, 4, 8, 16, 32)
    tables: tuple[int, ...] = (8, 16, 32, 64)
    table_sites: tuple[str, ...] = ("attn_output", "ffn_down")
    bias: bool = True
    spherical: bool = False
    sites: tuple[str, ...] = ()
    storage: Storage = "Q8_0"
    ridge: float = 1e-3
    vectors: int = 4096
    seed: int = 0
    costs: Costs = field(default_factory=Costs)


class Inputs(NamedTuple):
    """Vectors x [n, in] that go into a site, and the tokens' weights [n]."""

    x: Tensor
    weight: Tensor

    def spread(self, most: int) -> Inputs:
        """At most so many of them, at equal distances."""
        step = -(-len(self.x) // most)
        return Inputs(self.x[::step], self.weight[::step])


def inputs(stream: Stream, first: Mapping[str, float]) -> dict[str, Inputs]:
    """What goes into some matrices of the layer that the stream is at. ``first``: weight of position 0, by matrix."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in first}

    def keep(name: str) -> Callable[[int, Tensor], None]:
        return lambda number, x: pieces[name].append(x[stream.batches[number].real])

    stream.look({name: keep(name) for name in first})
    return {name: Inputs(torch.cat(found), token_weights(stream, first[name])) for name, found in pieces.items()}


def token_weights(stream: Stream, first: float) -> Tensor:
    """A weight for each real position [n]: ``first`` for each sequence's position 0, else 1."""
    found = []
    for batch in stream.batches:
        weight = torch.ones(batch.real.shape)
        weight[:, 0] = first
        found.append(weight[batch.real])
    return torch.cat(found)


def survey(
    teacher: Decoder, student: Decoder, fitting: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]],
    sensitivity: Mapping[str, Sensitivity], forms: Forms, told: Callable[[int, int], None] = lambda *_: None,
) -> list[Candidate]:  # fmt: skip
    """All candidates with a gain on held-out text. ``told``: called with layers done and in all."""
    streams = Stream(student, fitting), Stream(student, held_out)
    found: list[Candidate] = []
    own = {site for site in student.sites() if not forms.sites or site.split(".")[2] in forms.sites}
    while not streams[0].ended:
        layer = streams[0].index
        groups = [[site for name in group if (site := f"blk.{layer}.{name}") in own] for group in GROUPS]
        groups = [sites for sites in groups if sites]
        heads = {sites[0].split(".")[2]: sensitivity[sites[0]].first for sites in groups}
        seen = [inputs(stream, heads) for stream in streams] if heads else []
        for sites in groups:
            name = sites[0].split(".")[2]
            one = _Group(seen[0][name], seen[1][name], forms)
            for site in sites:
                difference = teacher.linear(site).weight.detach() - student.linear(site).weight.detach()
                if bool(difference.any()):
                    found += one.candidates(site, difference, sensitivity[site].features)
        for stream in streams:
            stream.advance()
        told(streams[0].index, len(streams[0].layers))
    return found


class _Group:
    """The inputs that some matrices share, and what is worked out of them once."""

    def __init__(self, fitting: Inputs, held_out: Inputs, forms: Forms) -> None:
        self.fitting, self.held_out, self.forms = fitting, held_out, forms
        self.gram, self.mean = _moments(fitting)
        self.other_gram, self.other_mean = _moments(held_out)
        self._clusters: dict[int, tables.Clusters] = {}

    def clusters(self, count: int) -> tables.Clusters:
        if count not in self._clusters:
            some = self.fitting.spread(self.forms.vectors)
            self._clusters[count] = tables.cluster(some.x, some.weight, count, seed=self.forms.seed, spherical=self.forms.spherical)
        return self._clusters[count]

    def candidates(self, site: str, difference: Tensor, g: Tensor) -> Iterator[Candidate]:
        """Every form at a site whose weight lost ``difference`` [out, in]; ``g`` [out] weighs the outputs' errors."""
        forms = self.forms
        if forms.bias and (one := self._bias(difference, g)):
            yield self._candidate(site, one, self._bias_gain(one, difference, g))
        if site.split(".")[2] in forms.table_sites:
            for count in forms.tables:
                one = self._table(count, difference, g)
                yield self._candidate(site, one, self._gain(one, difference, g))
        yield from self._low_ranks(site, difference, g)

    def _low_ranks(self, site: str, difference: Tensor, g: Tensor) -> Iterator[Candidate]:
        """Low rank, and where that is to be tried a bias with it."""
        forms = self.forms
        ranks = [rank for rank in forms.ranks if rank <= min(difference.shape)]
        here, there = (low_rank.of_difference(gram, difference) for gram in (self.gram, self.other_gram))
        best = low_rank.factors(here, g, prior=difference, ridge=forms.ridge, most=max(ranks, default=0)) if ranks else None
        for rank in ranks:
            assert best is not None
            a, b = best.of_rank(rank)
            stored = as_stored(Correction(low_a=a, low_b=b), forms.storage)
            assert stored.low_a is not None
            assert stored.low_b is not None
            before, after = low_rank.left_over(there, stored.low_a, stored.low_b, g)
            yield self._candidate(site, stored, (before - after) / 2)
            rest = difference - stored.low_b @ stored.low_a
            if forms.bias and (one := self._bias(rest, g)):
                yield self._candidate(site, stored._replace(bias=one.bias), (before - after) / 2 + self._bias_gain(one, rest, g))

    def _bias(self, difference: Tensor, g: Tensor) -> Correction | None:
        mean, other = (difference @ one for one in (self.mean, self.other_mean))
        one = torch.ones(1)
        return bias.fit(mean[None], one, other[None], one, g)

    def _table(self, count: int, difference: Tensor, g: Tensor) -> Correction:
        some, other = self.fitting.spread(self.forms.vectors), self.held_out.spread(self.forms.vectors)
        triples = [(one.x, one.x @ difference.T, one.weight) for one in (some, other)]
        return as_stored(tables.fit(self.clusters(count), triples[0], triples[1], g), self.forms.storage)

    def _bias_gain(self, one: Correction, difference: Tensor, g: Tensor) -> float:
        assert one.bias is not None
        return float(g @ (2 * one.bias * (difference @ self.other_mean) - one.bias.square())) / 2

    def _gain(self, one: Correction, difference: Tensor, g: Tensor) -> float:
        """Half the fall of the weighted squared error on held-out tokens."""
        other = self.held_out.spread(self.forms.vectors)
        t = other.x @ difference.T
        fall = t.square() - (t - one.change(other.x)).square()
        return float((other.weight @ fall @ g) / other.weight.sum()) / 2

    def _candidate(self, site: str, one: Correction, gain: float) -> Candidate:
        size = stored_bytes(one, self.forms.storage)
        return Candidate(site, one.kinds(), size, self.forms.costs.microseconds(one.kinds(), size), gain)


def _moments(found: Inputs) -> tuple[Tensor, Tensor]:
    """E[x x^T] in float64, E[x]."""
    share = found.weight / found.weight.sum()
    return (found.x.T @ (found.x * share[:, None])).double(), share @ found.x
