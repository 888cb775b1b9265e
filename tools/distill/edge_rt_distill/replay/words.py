"""Measures, verdicts and causes in words, for the terminal and the page, and as a record of JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from edge_rt_distill.files import shown_size
from edge_rt_distill.replay.causes import Worst
from edge_rt_distill.replay.columns import Run
from edge_rt_distill.replay.comparing import SHORT, UNKNOWN, Comparison, Row
from edge_rt_distill.replay.measures import METRICS, Measured
from edge_rt_distill.replay.outages import Outage
from edge_rt_distill.sandbox.scores import Estimate

_NO_ENDS = "no interval"
_UNITS: Mapping[str, Callable[[float], str]] = {
    "bytes": lambda value: f"{'-' if value < 0 else ''}{shown_size(abs(value))}", "share": lambda value: f"{value:.1%}",
}  # fmt: skip
"""Units that go with every number; the others stand once, behind."""


def shown(name: str, measured: Measured) -> str:
    """A metric's value and interval in its unit, or that it is unknown and why."""
    if measured.estimate is None:
        return f"unknown: {measured.reason}"
    unit = METRICS[name].unit
    if math.isfinite(measured.estimate.high):
        value, low, high = (_value(unit, one) for one in measured.estimate)
        found = f"{value} [{low}, {high}]"
    else:
        found = f"{_value(unit, measured.estimate.value)} ({_NO_ENDS})"
    return found if unit in _UNITS or unit == "ratio" else f"{found} {unit}"


def shown_retention(found: Estimate | None) -> str:
    """A retention with its interval; empty if there is none."""
    if found is None:
        return ""
    return str(found) if math.isfinite(found.low) else f"{found.value:.3f} ({_NO_ENDS})"


def why(name: str, row: Row) -> str:
    """Of a metric below the bar: what it kept, how sure that is, and where it comes from. Empty for others."""
    if row.retention is None or row.cause is None:
        return ""
    return f"{name} kept {row.retention.value:.1%}{'' if row.verdict == SHORT else ', ' + row.verdict}: {row.cause.where}"


def known(found: Comparison) -> dict[str, Row]:
    """The metrics of which both values are known."""
    return {name: row for name, row in found.rows.items() if row.verdict != UNKNOWN}


def unknown(found: Comparison) -> list[str]:
    """Sentences: what is not known, and why."""
    return [f"{name} is unknown: {row.reason}" for name, row in found.rows.items() if row.verdict == UNKNOWN]


def _value(unit: str, value: float) -> str:
    return _UNITS[unit](value) if unit in _UNITS else f"{value:.3g}"


def report(found: Comparison) -> Iterator[str]:
    """Lines: what is compared, every metric, what falls short and why, and what faults did."""
    left, right = (run.results for run in found.pair)
    yield f"{left.target} (baseline) and {right.target} (candidate): {len(found.pair[0].outcomes)} requests, {left.load}"
    yield from (f"NOTE: {note}" for note in found.notes)
    yield f"{'':20} {'baseline':34} {'candidate':34} {'retention':22}"
    for name, row in known(found).items():
        cells = (shown(name, row.baseline), shown(name, row.candidate), shown_retention(row.retention))
        yield f"{name:20} {cells[0]:34} {cells[1]:34} {cells[2]:22} {row.verdict}"
    yield from unknown(found)
    named: dict[tuple[str, ...], str] = {}
    for name, row in found.rows.items():
        if row.cause is not None:
            yield f"{'FAIL' if row.verdict == SHORT else 'NOTE'}: {why(name, row)}"
            worst = [worst_sentence(found.pair, one) for one in row.cause.worst]
            before = named.setdefault(tuple(worst), name)
            yield from (f"  {one}" for one in (worst if before == name else ["the same requests as " + before] if worst else []))
    for who, some in zip(("baseline", "candidate"), found.outages, strict=True):
        yield from (f"{who}: {outage_sentence(one)}" for one in some)


def worst_sentence(pair: tuple[Run, Run], one: Worst) -> str:
    """A request, and what became of it in both runs."""
    left, right = (run.outcomes[one.place] for run in pair)
    kind = pair[0].requests[one.place].kind if pair[0].requests is not None else ""
    prompt = pair[0].prompt[one.place]
    tokens = "a prompt of unknown length" if math.isnan(prompt) else f"{prompt:.0f} prompt tokens"
    seconds = " and ".join(f"{outcome.ended - outcome.sent:.2f} s ({outcome.code or outcome.status})" for outcome in (left, right))
    return f"request {left.number}{f' ({kind})' if kind else ''}, {tokens}: {seconds}"


def outage_sentence(one: Outage) -> str:
    """What a fault did."""
    back = "no request sent after it was answered" if one.back is None else f"a request was served again {one.back:.2f} s after it"
    said = f" ({one.fault.said})" if one.fault.said else ""
    return (
        f"{one.name}{said}: {back}, no token for {one.silent:.2f} s, {one.failed} requests failed until then; of {one.survived + one.cut} "
        f"on their way {one.survived} were answered all the same"
    )


def record(found: Comparison) -> dict[str, Any]:
    """For a program: numbers that are not known, or without end, are null; requests by their numbers in the trace."""
    left, right = (run.results for run in found.pair)
    return {
        "baseline": left.target, "candidate": right.target, "load": left.load, "trace": left.trace,
        "requests": len(found.pair[0].outcomes), "block": found.block, "notes": list(found.notes), "short": found.short,
        "metrics": {name: _row(found.pair, row) for name, row in found.rows.items()},
        "outages": {who: [_outage(one) for one in some] for who, some in zip(("baseline", "candidate"), found.outages, strict=True)},
    }  # fmt: skip


def _row(pair: tuple[Run, Run], row: Row) -> dict[str, Any]:
    said: dict[str, Any] = {"verdict": row.verdict, "reason": row.reason}
    estimates = {"baseline": row.baseline.estimate, "candidate": row.candidate.estimate, "retention": row.retention}
    said |= {
        name: None if one is None else {key: _finite(value) for key, value in one._asdict().items()} for name, one in estimates.items()
    }
    if row.cause is not None:
        worst = [{"request": pair[0].outcomes[one.place].number, "baseline": _finite(one.baseline), "candidate": _finite(one.candidate)}
                 for one in row.cause.worst]  # fmt: skip
        groups = [{**one._asdict(), "outside": _finite(one.outside), "inside": _finite(one.inside)} for one in row.cause.groups]
        said["cause"] = {"where": row.cause.where, "worst": worst, "groups": groups}
    return said


def _outage(one: Outage) -> dict[str, Any]:
    return {**one._asdict(), "fault": one.fault._asdict()}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
