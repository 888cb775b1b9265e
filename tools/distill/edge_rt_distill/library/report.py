"""The library as one HTML file: what is stored of which model and domain, and pictures of it. Nothing in it is fetched or run."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edge_rt.hooks import DataError
from edge_rt_distill import files
from edge_rt_distill.library import pictures, recorded
from edge_rt_distill.library.catalogue import KINDS, Query, Record
from edge_rt_distill.library.store import Library
from edge_rt_distill.pages import page, table, text
from edge_rt_distill.progress import Told, quiet

SAMPLES = 2
"""Attention maps shown of a record."""
CASES = 6
"""Error cases shown of a record."""
_RECORDS = 12
"""Records of one kind and model that are drawn; tables have all."""


def write_report(library: Library, out: Path, query: Query = Query(), told: Told = quiet) -> Path:  # noqa: B008 (it is immutable)
    """Write the report of the records a query asks for. ``told``: (done, total) records.

    Raises DataError for damaged objects, OptionError for a bad query, UserError where it cannot be written.
    """
    page = render(library, query, told).encode("utf-8", "replace")
    files.write_file(out, page)
    return out


def render(library: Library, query: Query = Query(), told: Told = quiet) -> str:  # noqa: B008
    """The report as text. Raises DataError, OptionError."""
    records = list(library.find(query))
    parts = ["<h1>Teacher library</h1>", _overview(library, records)]
    by_model: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_model[record.model].append(record)
    done = 0
    for model, mine in by_model.items():
        origin = next((str(record.arguments["origin"]) for record in mine if "origin" in record.arguments), "")
        parts.append(f"<h2>{text(origin or 'model')} <code>{text(model[:16])}</code></h2>")
        for kind in KINDS:
            these = [record for record in mine if record.kind == kind]
            if these:
                parts.append(f"<h3>{text(kind)}</h3>")
                parts.append(_table(library, these))
                parts += _DRAWN.get(kind, _nothing)(library, these)
            done += len(these)
            told(done, len(records))
    return page("Teacher library", parts)


def _overview(library: Library, records: Sequence[Record]) -> str:
    if not records:
        return "<p>No records.</p>"
    counted: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for record in records:
        counted[record.model, record.domain][record.kind] += 1
        sizes[record.model, record.domain] += library.size(record)
    kinds = [kind for kind in KINDS if any(one[kind] for one in counted.values())]
    rows = [
        [model[:16], domain or "all", *(one[kind] or "" for kind in kinds), files.shown_size(sizes[model, domain])]
        for (model, domain), one in sorted(counted.items())
    ]
    return table(["model", "domain", *kinds, "size"], rows)


def _table(library: Library, records: Sequence[Record]) -> str:
    rows = [
        [
            record.id[:12], record.date, record.domain or "all", "" if record.score is None else round(record.score, 4),
            files.shown_size(library.size(record)), shown(record.facts),
        ]
        for record in records
    ]  # fmt: skip
    return table(["id", "date", "domain", "score", "size", "facts"], rows)


def shown(facts: Mapping[str, Any], longest: int = 300) -> str:
    """Facts in one line, those that are long cut short."""
    parts = []
    for name, value in facts.items():
        said = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"{name} {said}")
    line = ", ".join(parts)
    return line if len(line) <= longest else line[: longest - 1] + "…"


# ---- kind by kind ----------------------------------------------------------------------------------------------------


def _nothing(library: Library, records: Sequence[Record]) -> list[str]:
    return []


def _some(records: Sequence[Record]) -> tuple[Sequence[Record], list[str]]:
    """The newest records, and a note if that is not all."""
    left = len(records) - _RECORDS
    return records[:_RECORDS], [f'<p class="note">The newest {_RECORDS} of {len(records)} are drawn.</p>'] if left > 0 else []


def _trajectories(library: Library, records: Sequence[Record]) -> list[str]:
    chosen, note = _some(records)
    entropy: dict[str, list[Any]] = defaultdict(list)
    tail: dict[str, list[Any]] = defaultdict(list)
    scored: dict[str, list[float]] = defaultdict(list)
    examples = []
    for record in chosen:
        for place, answer in enumerate(recorded.trajectories(library, record)):
            entropy[record.domain].append(answer.entropy)
            tail[record.domain].append(answer.tail)
            if answer.score is not None:
                scored[record.domain].append(answer.score)
            if place < SAMPLES:
                examples.append([answer.sample, record.domain or "all", len(answer.answer), answer.text])
    drawn = []
    if any(len(one) for parts in entropy.values() for one in parts):
        drawn.append(pictures.histograms("entropy of the teacher", "nats a token", _joined(entropy)))
        drawn.append(pictures.histograms("mass behind the kept candidates", "probability", _joined(tail), log=True))
    if scored:
        drawn.append(pictures.scores(dict(sorted(scored.items()))))
    return [*note, *drawn, "<details><summary>answers</summary>", table(["sample", "domain", "tokens", "answer"], examples), "</details>"]


def _joined(series: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {key: np.concatenate(parts) for key, parts in sorted(series.items())}


def _activations(library: Library, records: Sequence[Record]) -> list[str]:
    chosen, parts = _some(records)
    for record in chosen:
        found = recorded.activations(library, record)
        parts.append(f"<p>{text(record.domain or 'all')}</p>")
        parts.append(pictures.activation_maps(found.rms, found.max))
    return parts


def _attention(library: Library, records: Sequence[Record]) -> list[str]:
    chosen, parts = _some(records)
    for record in chosen:
        for maps in islice(recorded.attention(library, record), SAMPLES):
            first, distance = float(maps.first.mean()), float(maps.distance.mean())
            facts = f"{len(maps.tokens)} tokens, {first:.0%} of all attention on the first, mean distance {distance:.1f} tokens"
            parts.append(f"<p>{text(record.domain or 'all')}, sample {text(maps.sample)}: {text(facts)}</p>")
            parts.append(pictures.attention_series(maps.maps))
        left = len(record.facts["samples"]) - SAMPLES
        if left > 0:
            parts.append(f'<p class="note">{left} more samples are stored.</p>')
    return parts


def _errors(library: Library, records: Sequence[Record]) -> list[str]:
    chosen, parts = _some(records)
    parts.append(
        '<p class="note">Marked <span class="for" style="--a:.5">red</span>: the token spoke for the wrong answer (gradient x input); '
        '<span class="against" style="--a:.5">blue</span>: against it. The answer is underlined.</p>'
    )
    for record in chosen:
        for case in islice(recorded.errors(library, record), CASES):
            parts.append(f"<p>{text(record.domain or 'all')}, sample {text(case['sample'])}: {text('; '.join(case['reasons']))}</p>")
            parts.append(tokens_marked(case["pieces"], case["token_scores"], case["first"]))
            heads = np.array([[np.nan if value is None else value for value in row] for row in case["heads"]], float)
            parts.append(pictures.carried(case["layers"], heads))
            parts.append(f"<p>{text(_strongest(case['layers'], heads))}</p>")
        left = int(record.facts["cases"]) - CASES
        if left > 0:
            parts.append(f'<p class="note">{left} more cases are stored.</p>')
    return parts


def _strongest(layers: Sequence[float], heads: Any) -> str:
    """In words: which layers and heads carried the answer."""
    best = sorted(range(len(layers)), key=lambda i: -layers[i])[:3]
    said = "Most carried by layer " + ", ".join(f"{i} ({layers[i]:+.3g})" for i in best)
    tried = [(float(heads[i]), i) for i in np.ndindex(heads.shape) if np.isfinite(heads[i])]
    if tried:
        said += "; by head " + ", ".join(f"{i[0]}.{i[1]} ({value:+.3g})" for value, i in sorted(tried, reverse=True)[:3])
    return said + " nats."


def tokens_marked(pieces: Sequence[str], scores: Sequence[float], first: int) -> str:
    """Tokens with their scores as background; from ``first`` on they are the answer. Raises DataError where the two do not match."""
    if len(pieces) != len(scores):
        raise DataError(f"{len(pieces)} tokens have {len(scores)} scores; record the errors again")
    largest = max(map(abs, scores), default=0.0) or 1.0
    spans = []
    for i, (piece, score) in enumerate(zip(pieces, scores, strict=True)):
        kind = ("for" if score > 0 else "against") + (" answer" if i >= first else "")
        visible = text(piece).replace("\n", "↵\n") or "∅"
        spans.append(f'<span class="{kind}" style="--a:{0.75 * abs(score) / largest:.2f}" title="{score:+.3g}">{visible}</span>')
    return f'<div class="tokens">{"".join(spans)}</div>'


_DRAWN: Mapping[str, Callable[[Library, Sequence[Record]], list[str]]] = {
    "trajectories": _trajectories, "activations": _activations, "attention": _attention, "errors": _errors,
}  # fmt: skip
