"""The ranked table: what of the teacher carries the value, and what carries next to none, with a sentence why.

All rows are compared by their share: of everything that parts of the same kind do together, what this one does. For each kind the rows at
both ends are named; the arrays have the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from edge_rt_distill.diagnose.groups import Group, lift
from edge_rt_distill.diagnose.parts import Array

TOP = 3
"""Rows at each end of a kind."""
ENOUGH, DIFFERENT = 4, 1.1
"""A domain or language gets a row with so many sequences, and for a layer whose share is so many times the usual."""
SINK = 0.5
"""A head is said to rest on the first token if so much of its attention is there."""


class Finding(NamedTuple):
    """A row. ``kind``: of part. ``place``: which. ``value``: what was measured, in the kind's unit. ``share``: of all of its kind."""

    rank: int
    kind: str
    place: str
    value: float
    share: float
    explanation: str


class Measured(NamedTuple):
    """What findings are made of. ``weights``: numbers in each matrix, by site."""

    arrays: Mapping[str, Array]
    facts: Mapping[str, Any]
    groups: Sequence[Group]
    weights: Mapping[str, int]


class _Row(NamedTuple):
    kind: str
    place: str
    value: float
    share: float
    explanation: str


def rank(found: Measured) -> list[Finding]:
    """All rows, by share."""
    rows = [row for kind in _KINDS for row in kind(found)]
    rows.sort(key=lambda row: -row.share)
    return [Finding(number + 1, *row) for number, row in enumerate(rows)]


def _ends(values: Array, top: int = TOP) -> Iterator[tuple[int, float, float, int]]:
    """Of the numbers in an array (flat index): index, value, share, and place from the top (1 ..) or, below zero, from the end (-1 ..)."""
    flat = np.asarray(values, np.float64).ravel()
    order = [int(place) for place in np.argsort(-np.nan_to_num(flat, nan=-1.0), kind="stable") if np.isfinite(flat[place])]
    total = max(float(np.nansum(flat)), 1e-30)
    for number, place in enumerate(order):
        from_end = number - len(order)
        if number < top or (from_end >= -top and len(order) >= 2 * top):
            yield place, float(flat[place]), float(flat[place]) / total, number + 1 if number < top else from_end


def _times(value: float, values: Array) -> str:
    usual = float(np.nanmedian(values))
    return f"{value / usual:.2g} times the median" if usual > 0 else "where the median is 0"


def _nth(place: int) -> str:
    return ("", "second ", "third ")[abs(place) - 1] + ("most" if place > 0 else "least")


def _layers(found: Measured) -> Iterator[_Row]:
    values = found.arrays["layer_kl"]
    influence = found.arrays["block_influence"]
    by_influence = {int(layer): number + 1 for number, layer in enumerate(np.argsort(-influence, kind="stable"))}
    for layer, value, share, place in _ends(values):
        text = f"without it the distribution moves by {value:.3g} nats a token, {_times(value, values)} layer and the {_nth(place)}"
        text += "; keep it" if place > 0 else "; it can go first" if place == -1 else "; it can go early"
        rows = len(values)
        if abs(by_influence[layer] - (place if place > 0 else rows + 1 + place)) > rows / 3:
            text += f" (how much it turns the stream, place {by_influence[layer]} of {rows}, does not show this)"
        yield _Row("layer", f"layer {layer}", value, share, text)


def _halves(found: Measured) -> Iterator[_Row]:
    if "attention_kl" not in found.arrays:
        return
    values = np.stack([found.arrays["attention_kl"], found.arrays["ffn_kl"]], 1)
    for place, value, share, end in _ends(values, 2):
        name = ("attention", "FFN")[place % 2]
        text = f"{name} alone left out costs {value:.3g} nats a token, {_times(value, values)} half of a layer and the {_nth(end)}"
        yield _Row("half", f"layer {place // 2}, {name}", value, share, text)


def _heads(found: Measured) -> Iterator[_Row]:
    values = found.arrays["heads"]
    for place, value, share, end in _ends(values):
        layer, head = divmod(place, values.shape[1])
        text = f"the loss owes it {value:.3g} nats a token for each unit of its mask, {_times(value, values)} head and the {_nth(end)}; "
        yield _Row("head", f"layer {layer}, head {head}", value, share, text + _looks(found.arrays, layer, head))


def _looks(arrays: Mapping[str, Array], layer: int, head: int) -> str:
    sink, far, distance = (float(arrays[f"attention_{name}"][layer, head]) for name in ("sink", "far", "distance"))
    if sink > SINK:
        return f"{sink:.0%} of its attention rests on the first token"
    return f"it looks {distance:.0f} tokens back on average, {far:.0%} of its attention goes far"


def _kv_groups(found: Measured) -> Iterator[_Row]:
    values = found.arrays["kv_groups"]
    for place, value, share, end in _ends(values, 2):
        layer, group = divmod(place, values.shape[1])
        text = f"its heads can only go together; together the loss owes them {value:.3g}, {_times(value, values)} group and the {_nth(end)}"
        yield _Row("KV group", f"layer {layer}, group {group}", value, share, text)


def _channels(found: Measured) -> Iterator[_Row]:
    """How unequal a layer's channels are: what its least quarter carries."""
    for layer, value, _, end in _ends(np.array([_least_quarter(row) for row in found.arrays["ffn_channels"]]), 2):
        text = f"the least important quarter of its channels carries {value:.1%} of what they all do, the {_nth(end)} of all layers; "
        yield _Row("FFN channels", f"layer {layer}", value, value, text + ("narrow it last" if end > 0 else "narrow it first"))


def _least_quarter(row: Array) -> float:
    known = np.sort(row[np.isfinite(row)].astype(np.float64))
    return float(known[: len(known) // 4].sum() / max(float(known.sum()), 1e-30))


def _hidden(found: Measured) -> Iterator[_Row]:
    values = found.arrays["hidden"]
    for place, value, share, end in _ends(values, 2):
        text = f"over all matrices that read or write it, {_times(value, values)} dimension and the {_nth(end)}"
        yield _Row("hidden dimension", f"dimension {place}", value, share, text)
    least = _least_quarter(values)
    yield _Row("hidden dimension", "least quarter", least, least, f"a quarter of all dimensions carries {least:.1%} of what they all do")


def _matrices(found: Measured) -> Iterator[_Row]:
    fisher: Mapping[str, float] = found.facts["fisher"]
    sites = list(fisher)
    values = np.array([fisher[site] for site in sites])
    each = np.array([fisher[site] / found.weights[site] for site in sites])
    for place, value, share, end in _ends(values):
        text = f"its Fisher information is the {_nth(end)} of all matrices; a weight of it is {_times(float(each[place]), each)} one as "
        text += "sensitive, so it needs the most bits" if end > 0 else "sensitive, so it bears the fewest bits"
        yield _Row("matrix", sites[place], value, share, text)


def _massive(found: Measured) -> Iterator[_Row]:
    places: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for one in found.facts["massive"]:
        places.setdefault((one["position"], one["channel"]), []).append(one)
    ranked = sorted(places.items(), key=lambda item: -max(one["value"] for one in item[1]))
    for (position, channel), met in ranked[:TOP]:
        largest = max(met, key=lambda one: float(one["value"]))
        first = min(one["layer"] for one in met)
        text = f"from {'the embeddings' if first < 0 else f'layer {first}'} on the stream is up to {largest['value']:.0f} there, "
        text += f"{largest['times_median']:.0f} times the median, {largest['share']:.1%} of all squares behind layer {largest['layer']}; "
        text += "what is averaged over it is an average of it alone" if largest["share"] > SINK else "it must not be cut away"
        yield _Row("massive activation", f"position {position}, dimension {channel}", largest["value"], largest["share"], text)


def _sinks(found: Measured) -> Iterator[_Row]:
    sink = found.arrays["attention_sink"]
    known = sink[np.isfinite(sink)]
    count = int((known > SINK).sum())
    text = f"{count} of {len(known)} heads rest more than half of their attention there, which is attention that is not needed elsewhere"
    yield _Row("attention sink", "first token", float(known.mean()), float(known.mean()), text)


def _paths(found: Measured) -> Iterator[_Row]:
    values = found.arrays["path_heads"]
    for place, value, share, end in _ends(values):
        if end > 0:
            layer, head = divmod(place, values.shape[1])
            text = f"of all heads it brings the {_nth(end)} from the tokens that decide the answer, {value:.2g} times the mean head"
            yield _Row("path", f"layer {layer}, head {head}", value, share, text)


def _groups(found: Measured) -> Iterator[_Row]:
    """For each domain and language the layer that stands out most against all samples, by its heads where it was left out on too few."""
    for group in found.groups:
        own, whole, what = group.layer_kl, found.arrays["layer_kl"], "layers"
        if own is None or group.removal < ENOUGH:
            own, whole, what = np.nansum(group.heads, 1), np.nansum(found.arrays["heads"], 1), "layers' heads"
        risen = lift(own, whole)
        layer = int(((risen - 1) * whole).argmax())
        if group.sequences < ENOUGH or risen[layer] < DIFFERENT:
            continue
        share = float(own[layer]) / max(float(own.sum()), 1e-30)
        text = f"for {group.name} ({group.sequences} sequences, loss {group.loss:.2f}) it carries {share:.1%} of what {what} do, "
        text += f"{risen[layer]:.2f} times its share for all samples, the largest difference of all"
        yield _Row(group.kind, f"{group.name}, layer {layer}", float(own[layer]), share, text)


_KINDS: tuple[Callable[[Measured], Iterator[_Row]], ...] = (
    _layers, _halves, _heads, _kv_groups, _channels, _hidden, _matrices, _massive, _sinks, _paths, _groups,
)  # fmt: skip
