"""Each metric over time: of traffic by windows, of evaluations and replays by file, and whether the last differs from those before.

A line of a metric belongs to one variant, a form of prompt (template and system message): a changed prompt begins a new line, and is never
mixed with the old one. Feedback belongs to the variant of its own messages. Evaluations have their template's variant; replays are of one
kind if they sent the same requests under the same load.

A change is told if 0 is outside of the interval of the difference between the last window and all before it: 2,000 times, the values of
both are drawn anew (Efron 1979), and ``SURE`` of the differences lie inside. Windows with fewer than ``FEW`` values are shown and not
compared. The values are taken for independent: requests of one busy client are not, so a window that one client fills may look changed.
Of ``metrics`` x variants lines, one in a hundred looks changed by chance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_rt.hooks import DataError, OptionError
from edge_rt_distill.feedback.mining import moment
from edge_rt_distill.feedback.signals import asked_again
from edge_rt_distill.files import write_file
from edge_rt_distill.pages import page, table, text
from edge_rt_distill.plots import Axes, curves
from edge_rt_distill.replay import results as replays
from edge_rt_distill.replay.trace import Request, Trace, read_trace
from edge_rt_distill.sandbox import running as evaluations
from edge_rt_distill.sandbox.scores import cells
from edge_rt_distill.sandbox.suites import Suite

WINDOWS: Mapping[str, float] = {"hour": 3600.0, "day": 86400.0, "week": 7 * 86400.0}
"""Seconds. Hours and days are those of UTC; weeks begin on Thursdays, as 1970 did."""
DRAWS, SURE, FEW = 2000, 0.99, 20
UNKNOWN = "unknown"
"""The variant of texts, and of what was recorded before variants were."""

Statistic = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
STATISTICS: Mapping[str, Statistic] = {
    "mean": lambda values: values.mean(-1), "p50": lambda values: np.quantile(values, 0.5, axis=-1),
    "p95": lambda values: np.quantile(values, 0.95, axis=-1), "count": lambda values: np.full(values.shape[:-1], float(values.shape[-1])),
}  # fmt: skip


class Value(NamedTuple):
    """One reading of a metric. ``place``: of its window on the line, ``window``: what that is called."""

    metric: str
    variant: str
    place: float
    window: str
    value: float


class Point(NamedTuple):
    """A window of a line."""

    window: str
    place: float
    value: float
    readings: int


class Line(NamedTuple):
    """``change``: the interval of the last point's difference from those before, None where too little is known to compare."""

    metric: str
    variant: str
    points: tuple[Point, ...]
    change: tuple[float, float] | None

    @property
    def changed(self) -> bool:
        """Whether the last window differs from those before."""
        return self.change is not None and not self.change[0] <= 0 <= self.change[1]


OF_REQUESTS: Mapping[str, tuple[str, Callable[[Request, bool], float | None]]] = {
    "requests": ("count", lambda one, again: 1.0),
    "errors": ("mean", lambda one, again: None if one.seen is None else float(one.seen.status == "error")),
    "cancelled": ("mean", lambda one, again: None if one.seen is None else float(one.seen.status == "cancelled")),
    "asked again": ("mean", lambda one, again: float(again)),
    "rule hits": ("mean", lambda one, again: None if one.seen is None else float(bool(one.seen.rules))),
    "first token p50": ("p50", lambda one, again: None if one.seen is None else one.seen.first_token),
    "first token p95": ("p95", lambda one, again: None if one.seen is None else one.seen.first_token),
    "tokens per answer": ("mean", lambda one, again: one.seen.completion_tokens if one.seen and one.seen.status == "ok" else None),
}
"""Metrics of traffic: what of their readings in a window is shown, and the reading of a request (asked again or not), None: it has none.
Shares are of requests; times in seconds.
"""
OF_REPLAYS: Mapping[str, tuple[str, Callable[[replays.Outcome], float | None]]] = {
    "replay errors": ("mean", lambda one: float(one.status == "error")),
    "replay first token p50": ("p50", lambda one: one.first),
    "replay first token p95": ("p95", lambda one: one.first),
    "replay tokens per answer": ("mean", lambda one: float(sum(one.tokens)) if one.status == "ok" else None),
    "replay checks": ("mean", lambda one: one.passed),
}
RATING, SCORE = "rating", "score "


def fitting(traces: Sequence[Trace]) -> str:
    """The window in which to show them: hours up to three days in all, days up to four weeks, then weeks."""
    times = [_begun(trace) + at for trace in traces for at in (*(one.at for one in trace.requests), *(one.at for one in trace.feedback))]
    seconds = max(times) - min(times)
    return next((name for name, most in (("hour", 3 * 86400.0), ("day", 28 * 86400.0)) if seconds <= most), "week")


def _begun(trace: Trace) -> float:
    return moment(str(trace.about["begun"])) if "begun" in trace.about else 0.0


def of_trace(trace: Trace, window: str) -> Iterator[Value]:
    """Readings of traffic, by a window of ``WINDOWS``. Raises OptionError for no such window."""
    begun = _begun(trace)
    if window not in WINDOWS:
        raise OptionError(f"no window is named {window!r}; choose {', '.join(WINDOWS)}")

    def placed(metric: str, variant: str, at: float, value: float | None) -> Iterator[Value]:
        if value is not None:
            place = (begun + at) // WINDOWS[window] * WINDOWS[window]
            shown = datetime.fromtimestamp(place, timezone.utc).strftime("%m-%d %H:00" if window == "hour" else "%Y-%m-%d")
            yield Value(metric, variant or UNKNOWN, place, shown, float(value))

    again = asked_again(trace.requests)
    for number, one in enumerate(trace.requests):
        for metric, (_, reading) in OF_REQUESTS.items():
            yield from placed(metric, one.variant, one.at, reading(one, number in again))
    for said in trace.feedback:
        yield from placed(RATING, said.variant, said.at, said.rating)


def of_evaluation(results: evaluations.Results, suites: Sequence[Suite], place: int, name: str) -> Iterator[Value]:
    """The score of every item of an evaluation, the ``place``-th of a series, by metric and over all. Raises DataError as ``cells``."""
    for (_, metric), items in cells(results, suites).items():
        for value in items.values():
            for kind in (metric, "all"):
                yield Value(f"{SCORE}{kind}", results.facts.template or UNKNOWN, place, name, value)


def of_replay(results: replays.Results, place: int, name: str) -> Iterator[Value]:
    """Readings of a replay, the ``place``-th of a series."""
    for one in results.outcomes:
        for metric, (_, reading) in OF_REPLAYS.items():
            if (value := reading(one)) is not None:
                yield Value(metric, f"{results.trace[:12]} {results.load}", place, name, value)


def read(paths: Sequence[Path], suites: Sequence[Suite], window: str = "") -> list[Value]:
    """Readings of traces, results of evaluations and of replays, as each file is; results of one kind are a series in the order given.

    ``window`` of traces: see ``WINDOWS``; "": as fits them all. Raises DataError for what is none of these, OptionError as ``of_trace``.
    """
    found: list[Value] = []
    traces: list[Trace] = []
    for place, path in enumerate(paths):
        kind = _kind(path)
        if kind == "replay":
            found += of_replay(replays.read_results(path), place, path.stem)
        elif kind == "evaluation":
            results = evaluations.read_results(path)
            found += of_evaluation(results, [one for one in suites if one.name in results.suites], place, path.stem)
        else:
            traces.append(read_trace(path, of_requests=False))
    window = window or (fitting(traces) if traces else "")
    return [*found, *(value for trace in traces for value in of_trace(trace, window))]


def _kind(path: Path) -> str:
    """By what a file begins with: results are one object of JSON, a trace has one in each line."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); name a trace or results") from error
    except ValueError:
        return "trace"
    fields = record.keys() if isinstance(record, dict) else ()
    return "replay" if "edge_rt_replay" in fields else "evaluation" if {"suites", "outcomes"} <= set(fields) else "trace"


def lines(values: Iterable[Value], seed: int = 0) -> list[Line]:
    """The lines of all metrics and variants, in the order in which they first occur."""
    readings: dict[tuple[str, str], dict[tuple[float, str], list[float]]] = {}
    for one in values:
        readings.setdefault((one.metric, one.variant), {}).setdefault((one.place, one.window), []).append(one.value)
    return [_line(metric, variant, windows, seed) for (metric, variant), windows in readings.items()]


def _line(metric: str, variant: str, windows: Mapping[tuple[float, str], list[float]], seed: int) -> Line:
    statistic = _statistic(metric)
    points = []
    for (place, window), some in sorted(windows.items()):
        points.append(Point(window, place, float(STATISTICS[statistic](np.array(some))), len(some)))
    *before, last = (some for _, some in sorted(windows.items()))
    earlier = [value for some in before for value in some]
    known = statistic != "count" and min(len(earlier), len(last)) >= FEW
    return Line(metric, variant, tuple(points), _interval(earlier, last, STATISTICS[statistic], seed) if known else None)


def _statistic(metric: str) -> str:
    return next((table[metric][0] for table in (OF_REQUESTS, OF_REPLAYS) if metric in table), "mean")


def _interval(before: Sequence[float], last: Sequence[float], statistic: Statistic, seed: int) -> tuple[float, float]:
    dice = np.random.default_rng(seed)
    drawn = []
    for some in (before, last):
        values = np.array(some)
        drawn.append(np.array([statistic(values[dice.integers(0, len(values), len(values))]) for _ in range(DRAWS)]))
    low, high = np.quantile(drawn[1] - drawn[0], ((1 - SURE) / 2, (1 + SURE) / 2))
    return float(low), float(high)


def rows(found: Sequence[Line]) -> list[list[str]]:
    """A table for people: each line's last window, what it was before, and whether that is a change."""
    return [
        [
            one.metric, one.variant, str(len(one.points)), _shown(one.points[-2].value) if len(one.points) > 1 else "",
            _shown(one.points[-1].value), _verdict(one),
        ]
        for one in found
    ]  # fmt: skip


HEAD = ("metric", "variant", "windows", "before", "last", "change")


def _verdict(one: Line) -> str:
    if one.change is None:
        return "" if one.metric == "requests" else "too little to say"
    return f"{'CHANGED' if one.changed else 'none'} [{_shown(one.change[0], '+')}, {_shown(one.change[1], '+')}]"


def _shown(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3g}"


def write_page(path: Path, found: Sequence[Line]) -> None:
    """A page of HTML with a table and a picture of each metric. Raises UserError."""
    changed = [one for one in found if one.changed]
    said = ", ".join(f"{one.metric} ({one.variant})" for one in changed) or "nothing"
    parts = ["<h1>Metrics over time</h1>", f"<p>Changed in the last window: <b>{text(said)}</b>.</p>", table(HEAD, rows(found))]
    for metric in dict.fromkeys(one.metric for one in found):
        parts += [f"<h2>{text(metric)}</h2>", _picture(metric, [one for one in found if one.metric == metric])]
    write_file(path, page("Metrics over time", parts))


def _picture(metric: str, found: Sequence[Line]) -> str:
    windows = [window for _, window in sorted({(point.place, point.window) for one in found for point in one.points})]
    at = {window: number for number, window in enumerate(windows)}
    series = {one.variant: ([at[point.window] for point in one.points], [point.value for point in one.points]) for one in found}
    return curves(series, Axes(metric, x_names=windows))
