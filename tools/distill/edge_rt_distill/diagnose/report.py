"""A diagnosis as one page of HTML that needs nothing else: the ranked table, pictures, key tokens."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from edge_rt_distill import plots
from edge_rt_distill.diagnose.diagnosis import Diagnosis
from edge_rt_distill.diagnose.groups import lift
from edge_rt_distill.files import write_file
from edge_rt_distill.model.decoder import LINEARS
from edge_rt_distill.plots import Axes

_STYLE = f"""
body {{ font: 15px/1.5 {plots.FONTS}; color: {plots.INK}; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; font-size: 13px; }}
th, td {{ text-align: left; padding: 3px 8px; border-bottom: 1px solid {plots.FAINT}; vertical-align: top; }}
td.number {{ text-align: right; white-space: nowrap; }} svg {{ max-width: 100%; height: auto; display: block; margin: 1em 0; }}
h1, h2 {{ font-weight: 600; }} p.tokens {{ line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; }}
p.tokens span {{ padding: 2px 0; }} p.tokens span.answer {{ border-bottom: 2px solid {plots.COLOURS[1]}; }}
.note {{ color: #666; font-size: 13px; }}
"""
_MOST_TOKENS = 400
"""Tokens of a trace that are shown."""


def write(found: Diagnosis, path: Path, title: str = "Diagnosis") -> None:
    """Write the page. Raises UserError if the disk says no."""
    write_file(path, page(found, title))


def page(found: Diagnosis, title: str = "Diagnosis") -> str:
    """The page."""
    body = "\n".join([_summary(found), _findings(found), *_pictures(found), *_traces(found)])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _summary(found: Diagnosis) -> str:
    facts, a = found.facts["samples"], found.facts["architecture"]
    shape = a["layers"][0]
    removal = facts["removal"]
    skipped = f" {facts['skipped']} had nothing to predict and were left out." if facts["skipped"] else ""
    return (
        f"<p>Teacher {escape(found.facts['teacher'][:16])}: {len(a['layers'])} layers, {a['width']} wide, {shape['heads']} heads in "
        f"{shape['kv_heads']} KV groups, {shape['ffn']} FFN channels. Looked at: {facts['sequences']} sequences, {facts['tokens']:,} "
        f"tokens, {facts['predictions']:,} predictions that count; loss {facts['loss']:.3f} nats a token.{skipped} Layers were left out on "
        f"{removal['sequences']} of the sequences ({removal['tokens']:,} tokens, {removal['predictions']:,} predictions).</p>"
    )


def _findings(found: Diagnosis) -> str:
    rows = "\n".join(
        f'<tr><td class="number">{one.rank}</td><td>{escape(one.kind)}</td><td>{escape(one.place)}</td>'
        f'<td class="number">{one.value:.3g}</td><td class="number">{one.share:.2%}</td><td>{escape(one.explanation)}</td></tr>'
        for one in found.findings
    )
    head = "".join(f"<th>{name}</th>" for name in ("", "kind", "place", "value", "share", "why"))
    return (
        '<h2>What carries the value</h2>\n<p class="note">By share: of all that parts of the same kind do, what this one does. '
        f"Both ends of each kind; the last rows are what can go.</p>\n<table><tr>{head}</tr>\n{rows}\n</table>"
    )


def _pictures(found: Diagnosis) -> Iterator[str]:
    yield "<h2>Layers</h2>"
    yield from _layer_pictures(found)
    yield "<h2>Heads</h2>"
    yield from _head_pictures(found)
    yield "<h2>Channels, dimensions, matrices</h2>"
    yield from _size_pictures(found)
    yield "<h2>Activations</h2>"
    yield from _activation_pictures(found)
    if found.facts["groups"]:
        yield "<h2>Domains and languages</h2>"
        yield from _group_pictures(found)


def _layer_pictures(found: Diagnosis) -> Iterator[str]:
    arrays = found.arrays
    worst = [int(np.argmax(arrays["layer_kl"]))]
    axes = Axes("KL divergence without each layer (whiskers: one standard error)", "layer", "nats a token")
    yield plots.bars({"layer": arrays["layer_kl"]}, axes, errors=arrays["layer_kl_error"], log=True, mark=worst)
    if "attention_kl" in arrays:
        halves = {"attention": arrays["attention_kl"], "FFN": arrays["ffn_kl"]}
        yield plots.bars(halves, Axes("KL divergence without half of a layer", "layer", "nats a token"), log=True)
    yield plots.bars({"influence": arrays["block_influence"]}, Axes("Block influence: 1 - cos of entry and exit", "layer"))
    if len(arrays["drop_order"]):
        names = [str(layer) for layer in arrays["drop_order"]]
        axes = Axes("KL divergence as layers go one after the other", "layer dropped, after those to its left", "nats a token", names)
        yield plots.curves({"": (np.arange(len(names)), arrays["drop_kl"])}, axes)


def _head_pictures(found: Diagnosis) -> Iterator[str]:
    pictures = (
        ("heads", "Importance: |dLoss / d mask|", "nats", True, None),
        ("path_heads", "What heads bring from tokens that decide the answer", "times the mean", True, None),
        ("attention_sink", "Attention on the first token", "share", False, (0.0, 1.0)),
        ("attention_distance", "Distance of the rest", "tokens", False, None),
        ("attention_far", f"Attention further back than {found.facts['options']['far']} tokens", "share", False, None),
        ("attention_entropy", "Entropy of attention", "nats", False, None),
    )
    for name, title, unit, log, limits in pictures:
        axes = Axes(title, "layer", "head", height=1.6)
        yield plots.heat_map(found.arrays[name].T, axes, log=log, unit=unit, limits=limits)


def _size_pictures(found: Diagnosis) -> Iterator[str]:
    channels = found.arrays["ffn_channels"]
    picked = sorted({0, len(channels) // 4, len(channels) // 2, 3 * len(channels) // 4, len(channels) - 1})
    lines = {f"FFN, layer {layer}": _carried(channels[layer]) for layer in picked}
    lines["hidden dimensions"] = _carried(found.arrays["hidden"])
    yield plots.curves(lines, Axes("Importance carried by the most important channels", "share of channels kept", "share of importance"))
    table = np.full((len(LINEARS), len(channels)), np.nan)
    for site, value in found.fisher.items():
        _, layer, name = site.split(".")
        table[LINEARS.index(name), int(layer)] = value
    axes = Axes("Fisher information by matrix", "layer", y_names=LINEARS)
    yield plots.heat_map(table, axes, log=True, unit="trace")


def _carried(importance: Any) -> tuple[Any, Any]:
    """Places and values of a curve, at most 100 points."""
    known = np.sort(importance[np.isfinite(importance)].astype(np.float64))[::-1]
    at = np.unique(np.linspace(0, len(known), 101).astype(int))
    sums = np.concatenate([[0.0], known.cumsum()]) / max(float(known.sum()), 1e-30)
    return at / len(known), sums[at]


def _activation_pictures(found: Diagnosis) -> Iterator[str]:
    arrays = found.arrays
    positions = arrays["stream_positions"]
    entries = np.arange(len(positions))
    lines = {
        "largest at position 0": (entries, positions[:, 0]), "largest elsewhere": (entries, arrays["stream_largest"]),
        "root mean square elsewhere": (entries, np.sqrt(arrays["stream_mean_square"])),
    }  # fmt: skip
    yield plots.curves(lines, Axes("The residual stream at the entry of each layer", "layer", "magnitude"), log=True)
    axes = Axes("Largest magnitude of the stream by position", "position", "layer", height=2.6)
    yield plots.heat_map(positions, axes, log=True, unit="magnitude")
    kurtosis = np.full((4, len(positions) - 1), np.nan)
    names = []
    for one in found.facts["sites"]:
        name = ", ".join(one["matrices"])
        names += [name] if name not in names else []
        kurtosis[names.index(name), one["layer"]] = one["kurtosis"]
    yield plots.heat_map(kurtosis, Axes("Kurtosis of each matrix' input (3: normal)", "layer", y_names=names), log=True, unit="kurtosis")


def _group_pictures(found: Diagnosis) -> Iterator[str]:
    for array, title in (("layer_kl", "by KL divergence without it"), ("heads", "by importance of its heads")):
        names, rows = [], []
        whole = found.arrays[array]
        for group in found.facts["groups"]:
            own = found.arrays.get(f"{group['kind']}.{group['name']}.{array}")
            if own is not None:
                names.append(group["name"])
                rows.append(lift(np.nansum(own, 1), np.nansum(whole, 1)) if array == "heads" else lift(own, whole))
        if rows:
            axes = Axes(f"A layer's share against its share for all samples, {title}", "layer", y_names=names)
            yield plots.heat_map(np.stack(rows), axes, unit="times", log=True)


def _traces(found: Diagnosis) -> Iterator[str]:
    yield '<h2>Key tokens</h2>\n<p class="note">The darker, the more a token decided the answer (underlined): the mean of its shares of '
    yield "|gradient x input| and of attention followed back from the answer. The first token does not count.</p>"
    for one in found.facts["traces"]:
        shown = range(max(0, min(one["answer"] - _MOST_TOKENS // 2, len(one["tokens"]) - _MOST_TOKENS)), len(one["tokens"]))[:_MOST_TOKENS]
        largest = max(one["weights"])
        spans = "".join(_token(one, place, largest) for place in shown)
        yield f'<p class="note">sample {escape(one["sample"])}, tokens {shown[0]} to {shown[-1]}</p>\n<p class="tokens">{spans}</p>'


def _token(one: dict[str, Any], place: int, largest: float) -> str:
    depth = (one["weights"][place] / max(largest, 1e-30)) ** 0.5
    kind = ' class="answer"' if place >= one["answer"] else ""
    hint = f"weight {one['weights'][place]:.4f}"
    return f'<span{kind} style="background:rgba(32,128,141,{0.75 * depth:.2f})" title="{hint}">{escape(one["pieces"][place])}</span>'
