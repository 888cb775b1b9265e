"""Replays as one page of HTML that needs nothing else: what happened when, every metric, what was kept, and the worst requests."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from edge_rt_distill.pages import page, table, text
from edge_rt_distill.replay import words
from edge_rt_distill.replay.causes import Worst, worst
from edge_rt_distill.replay.columns import Run, Slo, columns
from edge_rt_distill.replay.comparing import LEAST, Comparison, compare, lateness
from edge_rt_distill.replay.measures import METRICS, measure
from edge_rt_distill.replay.outages import outages
from edge_rt_distill.replay.pictures import by_prompt, spread, timeline
from edge_rt_distill.replay.results import Outcome, Results
from edge_rt_distill.replay.trace import Request, Trace

SHOWN = 10
"""Requests of a single run that are shown: those that failed, and the longest."""
LETTERS = 1200
"""Characters that are shown of a prompt or an answer."""
_PARTS: Mapping[str, str] = {
    "first": "seconds to the first token", "pace": "mean seconds between tokens", "slowest": "seconds between tokens, 99 %",
    "waited": "seconds in the queue", "seconds": "seconds until answered (inf: not)", "passed": "checks passed",
    "good": "served as wanted", "failed": "failed", "cancelled": "cancelled", "agrees": "share of the same text",
}  # fmt: skip
"""Columns of a run by which requests are shown that lost most."""


def render(some: Sequence[Results], slo: Slo = Slo(), trace: Trace | None = None, least: float = LEAST) -> str:  # noqa: B008
    """The page. Every run after the first is compared with it if it is of the same trace and load. Raises DataError."""
    runs = {_name(some, place): columns(one, slo, trace) for place, one in enumerate(some)}
    first, *others = runs
    parts = ["<h1>Replay</h1>", *_overview(runs)]
    for name in others:
        parts.append(f"<h2>What {text(name)} kept of {text(first)}</h2>")
        left, right = runs[first].results, runs[name].results
        if (left.trace, left.load) == (right.trace, right.load):
            parts += _kept(compare(left, right, slo, trace, least))
        else:
            parts.append("<p>They are of another trace or load, so they are only shown beside each other.</p>")
    for name, run in runs.items():
        parts += [f"<h2>{text(name)}</h2>", *_run(name, run)]
    return page("Replay", parts)


def _name(some: Sequence[Results], place: int) -> str:
    """What a run is called: as little as tells it from the others."""
    forms = [[one.target, f"{one.target}, {one.load}", f"{one.target}, {one.load} ({number})"] for number, one in enumerate(some, 1)]
    return next(name for form, name in enumerate(forms[place]) if [names[form] for names in forms].count(name) == 1)


def _overview(runs: Mapping[str, Run]) -> Iterator[str]:
    rows = []
    for name, run in runs.items():
        counts = [int(part.sum()) for part in (run.answered, run.failed, run.cancelled)]
        rows.append([name, run.results.load, run.results.trace, len(run.outcomes), *counts, f"{run.length:.1f}"])
    yield table(["run", "load", "trace", "requests", "answered", "failed", "cancelled", "seconds"], rows)
    yield spread(runs)
    yield by_prompt(runs)


def _run(name: str, run: Run) -> Iterator[str]:
    yield from (f"<p>{text(note)}.</p>" for note in lateness(run))
    yield from _list(f"{key}: {value}" for key, value in run.results.about.items() if value)
    yield timeline(name, run)
    found = measure(run)
    known = [key for key, one in found.items() if one.estimate is not None]
    yield table(["metric", "value", "what it is"], ([key, words.shown(key, found[key]), METRICS[key].what] for key in known))
    yield from _list(f"{key} is {words.shown(key, one)}" for key, one in found.items() if key not in known)
    yield from _list(map(words.outage_sentence, outages(run)))
    order = sorted(range(len(run.outcomes)), key=lambda place: (-run.failed[place], run.outcomes[place].sent - run.outcomes[place].ended))
    yield f"<details><summary>The requests that failed or took longest ({min(SHOWN, len(order))} of {len(order)})</summary>"
    yield table(["request", "seconds", "asked", "answer"], (
        [one.number, round(one.ended - one.sent, 2), _asked(run, place), _answered(one)]
        for place, one in ((place, run.outcomes[place]) for place in order[:SHOWN])
    )) + "</details>"  # fmt: skip


def _kept(found: Comparison) -> Iterator[str]:
    yield from (f"<p>{text(note)}.</p>" for note in found.notes)
    yield f"<p>Surely short: <b>{text(', '.join(found.short) or 'nothing')}</b>. Requests were drawn {found.block} at a time.</p>"
    yield table(["metric", "baseline", "candidate", "retention", "verdict"], (
        [name, words.shown(name, row.baseline), words.shown(name, row.candidate), words.shown_retention(row.retention), row.verdict]
        for name, row in words.known(found).items()
    ))  # fmt: skip
    yield from _list(words.why(name, row) for name, row in found.rows.items() if row.cause is not None)
    yield from _list(words.unknown(found))
    for name, row in found.rows.items():
        if row.cause is not None and row.cause.groups:
            yield f"<details><summary>Groups of requests, {text(name)}</summary>"
            yield table(["group", "requests", "retention inside", "outside", "explains"], (
                [one.name, one.requests, "" if one.inside is None else f"{one.inside:.3f}", f"{one.outside:.3f}", f"{one.explained:.0%}"]
                for one in row.cause.groups
            )) + "</details>"  # fmt: skip
    yield "<h3>The requests that lost most</h3>"
    for column, what in _PARTS.items():
        rows = [_side_by_side(found.pair, one) for one in worst(found.pair, column)]
        if rows:
            yield f"<details><summary>By {text(what)}</summary>"
            yield table(["request", "prompt tokens", what, "asked", "baseline", "candidate"], rows) + "</details>"


def _side_by_side(pair: tuple[Run, Run], one: Worst) -> list[object]:
    answers = [_answered(run.outcomes[one.place]) for run in pair]
    prompt = pair[0].prompt[one.place]
    tokens = "" if math.isnan(prompt) else int(prompt)
    return [pair[0].outcomes[one.place].number, tokens, f"{one.baseline:.3g} and {one.candidate:.3g}", _asked(pair[0], one.place), *answers]


def _list(sentences: Iterable[str]) -> Iterator[str]:
    if items := [f"<li>{text(one)}</li>" for one in sentences]:
        yield f"<ul>{''.join(items)}</ul>"


def _asked(run: Run, place: int) -> str:
    """What was asked, if the trace is there."""
    if run.requests is None:
        return "(known with --trace)"
    request: Request = run.requests[place]
    prompt = request.body.get("messages", request.body.get("prompt"))
    said = [one.get("content") for one in prompt] if isinstance(prompt, list) and all(isinstance(one, dict) for one in prompt) else [prompt]
    kind = f"[{request.kind}] " if request.kind else ""
    return kind + _cut(" / ".join(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in said))


def _answered(one: Outcome) -> str:
    ended = f"{one.ended - one.sent:.2f} s, {one.finish_reason or one.status}{f' {one.code}' if one.code else ''}"
    checks = "" if one.passed is None else f", checks {one.passed:.2f}"
    return f"({ended}{checks}) {_cut(one.text)}"


def _cut(long: str) -> str:
    """Its beginning and end, and how much there is between."""
    left_out = len(long) - LETTERS
    return long if left_out <= 0 else f"{long[: LETTERS // 2]} [... {left_out} characters ...] {long[-(LETTERS // 2) :]}"
