"""Corrections of the chosen forms, fitted layer by layer: each is fitted with all before it at work, so that later ones mend what is left.

Both streams are walked, the float model's and the quantised and so far corrected one's, on the text to fit and on held-out text. Targets
are what the float model has more: at the linears that write to the residual stream the stream's error behind them, which has all that went
wrong before in it; at others the error of their product. On held-out text each correction's strength is set, and what does not help is
dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt_distill.compensate import bias, low_rank, tables
from edge_rt_distill.compensate.apply import RESIDUAL, compensated
from edge_rt_distill.compensate.correction import Compensation, Correction
from edge_rt_distill.compensate.sensitivity import Sensitivity
from edge_rt_distill.compensate.storage import as_stored
from edge_rt_distill.compensate.survey import Forms, Inputs, first_positions
from edge_rt_distill.model.decoder import GROUPS, LINEARS, Decoder
from edge_rt_distill.progress import Told, quiet
from edge_rt_distill.quantise.walk import Stream

RIDGES = (1e-2, 1e-1, 1.0)
"""How strongly a low rank is drawn to W - Q, in units of the inputs' mean square; the best on held-out text is kept."""


class Fitted(NamedTuple):
    """A site's correction, None if nothing helped. ``strength``: what the fit was multiplied by.

    ``before``, ``after``: the site's weighted squared error on held-out text, halved: nats a token; of the stream where it writes to it.
    """

    correction: Correction | None
    before: float
    after: float
    strength: float


class _Seen(NamedTuple):
    """Inputs of a site, its targets t [n, out] and the tokens' weights [n], on one text."""

    inputs: Inputs
    t: Tensor
    weight: Tensor


def fit(
    teacher: Decoder, student: Decoder, fitting: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]],
    chosen: Mapping[str, tuple[str, ...]], sensitivity: Mapping[str, Sensitivity], forms: Forms,
    told: Told = quiet,
) -> dict[str, Fitted]:  # fmt: skip
    """Fit ``chosen`` (site -> kinds, as `correction.Correction.kinds` names them). ``told``: called with layers done and in all."""
    texts = [(Stream(teacher, text), Stream(student, text)) for text in (fitting, held_out)]
    found: dict[str, Fitted] = {}
    depth = len(texts[0][0].layers)
    with ExitStack() as applied:
        for layer in range(depth):
            products = [_products(there) for there, _ in texts]
            for group in GROUPS:
                sites = [site for name in group if (site := f"blk.{layer}.{name}") in chosen]
                for site, (here, other) in _targets(layer, sites, texts, products, sensitivity):
                    difference = teacher.linear(site).weight.detach() - student.linear(site).weight.detach()
                    found[site] = _best(chosen[site], difference, here, other, sensitivity[site].features, forms)
                made: Compensation = {site: one for site in sites if (one := found[site].correction) is not None}
                applied.enter_context(compensated(student, made))
            for streams in texts:
                for stream in streams:
                    stream.advance()
            told(layer + 1, depth)
    return found


def _products(stream: Stream) -> dict[str, Tensor]:
    """Outputs [n, out] of the layer's linears at the real positions, by name; of those that write to the stream, the stream behind them."""
    return _looked(stream, LINEARS, ())[1]


def _looked(stream: Stream, outputs: Sequence[str], wanted: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of the linears ``wanted``, and outputs as `_products` has them."""
    seen: tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]] = {name: [] for name in wanted}, {name: [] for name in outputs}

    def keep(into: list[Tensor]) -> Callable[[int, Tensor], None]:
        return lambda number, value: into.append(value[stream.batches[number].real])

    stream.look({name: keep(into) for name, into in seen[0].items()}, {name: keep(into) for name, into in seen[1].items()})
    ins, outs = ({name: torch.cat(pieces) for name, pieces in one.items()} for one in seen)
    state = torch.cat([batch.hidden[batch.real] for batch in stream.batches])
    for name in RESIDUAL:
        if name in outs:
            outs[name] = state = state + outs[name]
    return ins, outs


def _targets(
    layer: int, sites: Sequence[str], texts: Sequence[tuple[Stream, Stream]], products: Sequence[Mapping[str, Tensor]],
    sensitivity: Mapping[str, Sensitivity],
) -> Iterator[tuple[str, list[_Seen]]]:  # fmt: skip
    """Each site with its inputs and targets on both texts. The sites share their input."""
    if not sites:
        return
    names = [site.split(".")[2] for site in sites]
    upto = [*(name for name in RESIDUAL[:1] if "ffn_down" in names), *names]
    looked = [_looked(student, upto, names[:1]) for _, student in texts]
    for site, name in zip(sites, names, strict=True):
        seen = [
            (Inputs(ins[names[0]], first_positions(student)), there[name] - outs[name])
            for (ins, outs), there, (_, student) in zip(looked, products, texts, strict=True)
        ]
        first = sensitivity[site].first_weight(seen[0][1][seen[0][0].first])
        yield site, [_Seen(into, t, into.weight(first)) for into, t in seen]


def _best(kinds: Sequence[str], difference: Tensor, here: _Seen, other: _Seen, g: Tensor, forms: Forms) -> Fitted:
    """The correction of these kinds that leaves least on held-out text, as stored."""
    before = _left(other, None, g)
    fits = [_strengthened(one, other, g) for one in _fits(kinds, difference, here, other, g, forms)]
    tried = [(as_stored(one, forms.storage), strength) for one, strength in fits if strength > 0]
    if not tried:
        return Fitted(None, before, before, 0.0)
    after, number = min((_left(other, one, g), number) for number, (one, _) in enumerate(tried))
    if after >= before:
        return Fitted(None, before, before, 0.0)
    return Fitted(tried[number][0], before, after, tried[number][1])


def _fits(kinds: Sequence[str], difference: Tensor, here: _Seen, other: _Seen, g: Tensor, forms: Forms) -> Iterator[Correction]:
    """Corrections of these kinds; parts are fitted one after the other, to what the part before left."""
    sizes = {kind.split()[0]: int(kind.split()[-1]) if " " in kind else 0 for kind in kinds}
    low: list[Correction] = [Correction()]
    if "rank" in sizes:
        found = low_rank.moments(here.inputs.x, here.t, here.weight)
        ridges = [(found, ridge) for ridge in RIDGES] + [(low_rank.of_difference(found.inputs, difference), forms.ridge)]
        rank = sizes["rank"]
        pairs = [low_rank.factors(one, g, prior=difference, ridge=ridge, most=rank).of_rank(rank) for one, ridge in ridges]
        low = [Correction(low_a=a, low_b=b) for a, b in pairs]
    for one in low:
        if "table" in sizes:
            one = _with_table(one, sizes["table"], here, other, g, forms)
        if "bias" in sizes:
            rest, held_out = (seen.t - one.change(seen.inputs.x) for seen in (here, other))
            added = bias.fit(rest, here.weight, held_out, other.weight, g)
            one = one._replace(bias=added.bias) if added else one
        if any(True for _ in one.parts()):
            yield one


def _with_table(one: Correction, count: int, here: _Seen, other: _Seen, g: Tensor, forms: Forms) -> Correction:
    some = here.inputs.spread(forms.vectors)
    clusters = tables.cluster(some.x, some.weight(1.0), count, seed=forms.seed, spherical=forms.spherical)
    triples = [(seen.inputs.x, seen.t - one.change(seen.inputs.x), seen.weight) for seen in (here, other)]
    table = tables.fit(clusters, triples[0], triples[1], g)
    return one._replace(centroids=table.centroids, offsets=table.offsets, rows=table.rows)


def _strengthened(one: Correction, other: _Seen, g: Tensor) -> tuple[Correction, float]:
    """The correction times the factor in [0, 1] that is best on held-out text, and that factor."""
    change = torch.zeros_like(other.t) + one.change(other.inputs.x)
    size = float(other.weight @ (change.square() @ g))
    factor = float(other.weight @ ((change * other.t) @ g)) / size if size > 0 else 0.0
    factor = min(max(factor, 0.0), 1.0)
    return one.scaled(factor), factor


def _left(seen: _Seen, one: Correction | None, g: Tensor) -> float:
    """Half the weighted squared error, nats a token."""
    rest = seen.t if one is None else seen.t - one.change(seen.inputs.x)
    return float(seen.weight @ (rest.square() @ g)) / len(rest) / 2
