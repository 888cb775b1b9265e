"""A comparison as one page of HTML that needs nothing else: what was kept, as tables and pictures, and every item with both answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from edge_rt_distill.files import write_file
from edge_rt_distill.pages import page, table, text
from edge_rt_distill.plots import Axes, heat_map, radar
from edge_rt_distill.sandbox.items import Item
from edge_rt_distill.sandbox.metrics import METRICS
from edge_rt_distill.sandbox.running import Outcome, Results
from edge_rt_distill.sandbox.scores import Comparison, Kept, cells, compare, notes
from edge_rt_distill.sandbox.suites import Suite


def write_report(
    teacher: Results, student: Results, suites: Sequence[Suite], out: Path, weights: Mapping[str, float] | None = None
) -> None:  # fmt: skip
    """``weights`` as in ``compare``. Raises DataError for results that do not fit, UserError where it cannot be written."""
    write_file(out, render(teacher, student, suites, weights))


def render(teacher: Results, student: Results, suites: Sequence[Suite], weights: Mapping[str, float] | None = None) -> str:
    """The page."""
    found = compare(teacher, student, suites, weights)
    title = f"What {student.facts.model} kept of {teacher.facts.model}"
    return page(title, [f"<h1>{text(title)}</h1>", *_summary(teacher, student, found), *_pictures(teacher, student, suites, found),
                        "<h2>Items</h2>", *_items(teacher, student, suites)])  # fmt: skip


def _summary(teacher: Results, student: Results, found: Comparison) -> Iterator[str]:
    whole = found.whole.retention
    kept = "nothing can be said: the teacher is at chance" if whole is None else f"{whole} of its score"
    yield f"<p>Kept: <b>{text(kept)}</b>, over {found.whole.counted} of {found.whole.cells} cells in which the teacher is above chance.</p>"
    rows = [[name, one.facts.model, one.facts.engine, one.facts.template, round(one.seconds)] for name, one in
            (("teacher", teacher), ("student", student))]  # fmt: skip
    yield table(["", "model", "engine", "prompts", "seconds"], rows)
    yield from (f"<p>{text(note)}</p>" for note in notes(teacher, student))
    for what, some in (("metric", found.metrics), ("domain", found.domains)):
        yield table([what, "teacher", "student", "kept", "cells that count"], [_row(name, one) for name, one in some.items()])


def _row(name: str, one: Kept) -> list[object]:
    kept = "" if one.retention is None else str(one.retention)
    return [name, str(one.teacher), str(one.student), kept, f"{one.counted} of {one.cells}"]


def _pictures(teacher: Results, student: Results, suites: Sequence[Suite], found: Comparison) -> Iterator[str]:
    names = list(found.metrics)
    scores = {who: [getattr(found.metrics[name], who).value for name in names] for who in ("teacher", "student")}
    yield radar(scores, Axes("Scores by metric; the middle is chance", x_names=names))
    domains = list(found.domains)
    for who, results in (("teacher", teacher), ("student", student)):
        means = {cell: sum(one.values()) / len(one) for cell, one in cells(results, suites).items()}
        values = np.array([[means.get((domain, name), np.nan) for name in names] for domain in domains])
        yield heat_map(values, Axes(f"Scores of the {who}", x_names=names, y_names=domains), unit="0: chance", limits=(0.0, 1.0))


def _items(teacher: Results, student: Results, suites: Sequence[Suite]) -> Iterator[str]:
    """By cell, those first that the student lost most of."""
    before, after = ({(one.domain, one.item): one for one in results.outcomes} for results in (teacher, student))
    for suite in suites:
        for metric in METRICS:
            asked = [item for item in suite.items if item.metric == metric and (suite.name, item.id) in before.keys() & after.keys()]
            if not asked:
                continue
            both = [(item, before[suite.name, item.id], after[suite.name, item.id]) for item in asked]
            both.sort(key=lambda one: one[2].value - one[1].value)
            rows = [[item.id, _question(item), _answered(item, left), _answered(item, right)] for item, left, right in both]
            means = [sum(one.value for one in some) / len(both) for some in ([one[1] for one in both], [one[2] for one in both])]
            yield f"<details><summary>{text(suite.name)}, {text(metric)}: {means[0]:.2f} and {means[1]:.2f}</summary>"
            yield table(["item", "asked", "teacher", "student"], rows) + "</details>"


def _question(item: Item) -> str:
    asked = [one["content"] for one in item.messages] + [item.text, *item.asks, *(turn.content for turn in item.turns)]
    options = f" [{' | '.join(item.options)}]" if item.options else ""
    return " / ".join(filter(None, asked)) + options


def _answered(item: Item, outcome: Outcome) -> str:
    said = [item.options[one] if item.options and isinstance(one, int) else str(one) for one in outcome.said]
    return f"{outcome.value:.2f}: {json.dumps(said if len(said) > 1 else said[0], ensure_ascii=False)}"
