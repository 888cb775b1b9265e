"""Chosen sizes into a whole cut: which channels, heads and dimensions stay, and why each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

import numpy as np

from edge_rt_distill.model.architecture import Architecture
from edge_rt_distill.surgery.cost import cost_of
from edge_rt_distill.surgery.cut import Choice, Cost, Cut, LayerCut, runs, student_architecture
from edge_rt_distill.surgery.evidence import Array, Evidence
from edge_rt_distill.surgery.options import PlanOptions
from edge_rt_distill.surgery.outline import Outline
from edge_rt_distill.surgery.predict import Heads, best, choose_heads

NAMES = {
    "depth": "layers", "ffn": "channels", "spread": "channels by layer", "heads": "heads", "groups": "key-value heads",
    "hidden": "dimensions", "share": "sharing",
}  # fmt: skip


class Sizes(NamedTuple):
    """A student's sizes: its layers, key-value heads, query heads of each, residual dimensions, each layer's channels; ``kept`` says which
    heads."""

    outline: Outline
    groups: int
    heads: int
    width: int
    ffn: tuple[int, ...]
    kept: Heads


def build(
    found: Evidence, architecture: Architecture, options: PlanOptions, sizes: Sizes, losses: Mapping[str, float],
    others: Sequence[tuple[Sizes, Mapping[str, float]]], teacher: Cost, limits: Mapping[str, float],
) -> Cut:  # fmt: skip
    """The cut of some sizes, with its reasons."""
    group = options.multiple if options.dimensions == "grouped" else 1
    hidden = best(found.hidden, sizes.width, group)
    layers = tuple(_layer(found, architecture, options, sizes, place) for place in range(len(sizes.outline.layers)))
    cut = Cut(
        layers, hidden, options.merge_by, options.share_by, dropped=_dropped(found, sizes.outline.gone, options), teacher_cost=teacher,
        chosen=_choice(sizes, losses), others=tuple(_choice(*one) for one in others),
    )  # fmt: skip
    cost = cost_of(student_architecture(architecture, cut), options.cost)
    return replace(cut, cost=cost, reasons=tuple(_reasons(found, cut, architecture, cost, limits)))


def _choice(sizes: Sizes, losses: Mapping[str, float]) -> Choice:
    name = " and ".join(NAMES[one] for one in losses) or "nothing"
    return Choice(name, len(sizes.outline.layers), sizes.groups, sizes.heads, round(fmean(sizes.ffn)), sizes.width, dict(losses))


def _layer(found: Evidence, architecture: Architecture, options: PlanOptions, sizes: Sizes, place: int) -> LayerCut:
    outline = sizes.outline
    own, like = list(outline.layers[place]), dict(outline.pairs).get(place)
    deciding = _deciding(found, options, outline, place)
    importance = found.ffn_channels[deciding].sum(0)
    channels = best(importance, sizes.ffn[place], options.multiple if options.channels == "grouped" else 1)
    groups, heads = sizes.kept.groups[deciding[0]], sizes.kept.heads[deciding[0]]
    if len(deciding) > 1:  # one choice for all that become this layer
        summed = replace(found, heads=np.tile(found.heads[deciding].sum(0), (len(found.heads), 1)))
        joint = choose_heads(summed, architecture, sizes.groups, sizes.heads)
        groups, heads = joint.groups[0], joint.heads[0]
    shape = architecture.layers[architecture.owner(own[0])]
    matters = float(found.layer_kl[own].max())
    said = [f"{matters:.3g} nats without it"]
    if len(own) > 1:
        said.insert(0, f"made of layers {runs(own)}")
    if like is not None:
        said.append(f"computes with the parameters of the student's layer {like}")
    said += _kept(importance, channels, shape.ffn, "channels") + _kept(found.heads[deciding].sum(0), heads, shape.heads, "heads")
    return LayerCut(tuple(own), groups, heads, channels, like, matters, "; ".join(said))


def _deciding(found: Evidence, options: PlanOptions, outline: Outline, place: int) -> list[int]:
    """The teacher's layers whose importance decides what a layer keeps: its own, or those whose parameters it shares."""
    like = dict(outline.pairs)
    owner = like.get(place, place)
    members = [owner, *(later for later, earlier in outline.pairs if earlier == owner)]
    if options.share_by == "important":
        members = [max(members, key=lambda one: float(found.layer_kl[list(outline.layers[one])].max()))]
    return [source for one in members for source in outline.layers[one]]


def _kept(importance: Array, kept: Sequence[int], full: int, what: str) -> list[str]:
    if len(kept) == full:
        return []
    total = float(importance.sum())
    share = float(importance[list(kept)].sum()) / total if total > 0 else len(kept) / full
    return [f"{len(kept)} of {full} {what} with {share:.1%} of the importance"]


def _dropped(found: Evidence, gone: Sequence[int], options: PlanOptions) -> dict[int, str]:
    if isinstance(options.drop, tuple):
        return {i: f"dropped by hand; {found.layer_kl[i]:.3g} nats when it alone is left out" for i in sorted(gone)}
    said = {}
    for at, layer in enumerate(gone):
        together = (
            f", {found.drop_kl[at]:.3g} together with those before it (measured)"
            if found.drop_order[: at + 1] == tuple(gone[: at + 1])
            else ""
        )
        rank = int((found.layer_kl < found.layer_kl[layer]).sum()) + 1
        said[layer] = f"chosen as number {at + 1}: {found.layer_kl[layer]:.3g} nats when it alone is left out, rank {rank}{together}"
    return dict(sorted(said.items()))


def _reasons(found: Evidence, cut: Cut, architecture: Architecture, cost: Cost, limits: Mapping[str, float]) -> list[str]:
    said = []
    units = {"parameters": "parameters", "bytes": "bytes of the file", "time": "units of time for a token"}
    for name, limit in limits.items():
        said.append(f"the budget allows {limit:,.0f} {units[name]}, the student takes {getattr(cost, name):,.0f} (projected)")
    assert cut.chosen is not None
    if cut.chosen.losses:
        parts = ", ".join(f"{NAMES[name]} {loss:.3g}" for name, loss in cut.chosen.losses.items())
        said.append(f"predicted divergence before repair: {cut.chosen.loss:.3g} nats a token ({parts})")
    for other in cut.others[:3]:
        said.append(f"cutting {other.name} instead was predicted at {other.loss:.3g}")
    if found.scales:
        said.append(
            "predictions were scaled by cuts of this teacher that were measured: "
            + ", ".join(f"{k} x{v:.2g}" for k, v in found.scales.items())
        )
    if len(cut.hidden) < architecture.width:
        said += _kept(found.hidden, cut.hidden, architecture.width, "dimensions of the residual stream")
    if any(one.like is not None for one in cut.layers):
        said.append("layers that share parameters stand in the exported file once each: a GGUF cannot name a tensor twice")
    return said
