"""A candidate's service against a baseline's: of the same trace, sent in the same way, metric by metric, and why where it falls short.

Requests are paired by number. Intervals of retentions are of both runs with the same requests drawn anew (measures.py), so that what both
had to bear falls out. A metric falls short surely if the whole interval is below the bar, and within noise if it reaches it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edge_rt.hooks import DataError
from edge_rt_distill.replay.causes import Cause, cause
from edge_rt_distill.replay.columns import Floats, Run, Slo, beside, columns
from edge_rt_distill.replay.measures import METRICS, Measured, block_length, drawn, interval, measured, retention, size, value
from edge_rt_distill.replay.outages import Outage, outages
from edge_rt_distill.replay.results import Results
from edge_rt_distill.replay.trace import Trace
from edge_rt_distill.sandbox.scores import Estimate

LEAST = 0.95
"""Retention that is wanted unless it is said."""
KEPT, SHORT, NOISE, UNKNOWN, SHOWN = "kept", "falls short", "within noise", "unknown", "not judged"
FEW_REPEATED = 0.1
"""Share of the requests with checks that may repeat others before that is said."""
LATE = 0.1
"""Seconds of lateness above which a load was not what was asked for."""


class Row(NamedTuple):
    """A metric of both. ``reason``: why its retention is not known. ``cause``: where a retention below the bar comes from."""

    baseline: Measured
    candidate: Measured
    retention: Estimate | None
    verdict: str
    reason: str = ""
    cause: Cause | None = None


class Comparison(NamedTuple):
    """``pair``: baseline and candidate, of the requests that both were sent. ``outages``: of each of them. ``block``: requests drawn at a
    time. ``notes``: what else is to be known of the two.
    """

    pair: tuple[Run, Run]
    rows: Mapping[str, Row]
    outages: tuple[tuple[Outage, ...], tuple[Outage, ...]]
    block: int
    notes: tuple[str, ...]

    @property
    def short(self) -> list[str]:
        """Metrics that surely fall short."""
        return [name for name, row in self.rows.items() if row.verdict == SHORT]


def compare(
    baseline: Results, candidate: Results, slo: Slo = Slo(), trace: Trace | None = None, least: float = LEAST, seed: int = 0  # noqa: B008
) -> Comparison:  # fmt: skip
    """``least``: retention that is wanted. Raises DataError for runs of another trace or load, or without a common request."""
    for what, left, right in (("trace", baseline.trace, candidate.trace), ("load", baseline.load, candidate.load)):
        if left != right:
            raise DataError(f"the baseline's {what} is {left!r} and the candidate's {right!r}; replay both with the same trace and load")
    numbers = [{one.number for one in results.outcomes} for results in (baseline, candidate)]
    if not (common := numbers[0] & numbers[1]):
        raise DataError(f"no request was sent to both {baseline.target} and {candidate.target}; replay both for longer")
    pair = beside(*(columns(results, slo, trace, common) for results in (baseline, candidate)))
    values = drawn(pair, seed)
    rows = {name: _row(pair, name, values[name], least) for name in METRICS}
    return Comparison(pair, rows, (outages(pair[0]), outages(pair[1])), block_length(pair), tuple(_notes(pair, numbers)))


def pairs(baselines: Sequence[Results], candidates: Sequence[Results]) -> list[tuple[Results, Results]]:
    """Paired by load. Raises DataError for a load that one side has twice, or only one side has."""
    sides = []
    for name, some in (("baseline", baselines), ("candidate", candidates)):
        loads = [one.load for one in some]
        if twice := [load for load in loads if loads.count(load) > 1]:
            raise DataError(f"the {name} has two results of the load {twice[0]!r}; name one of them")
        sides.append({one.load: one for one in some})
    if alone := sorted(sides[0].keys() ^ sides[1].keys()):
        without = "candidate" if alone[0] in sides[0] else "baseline"
        raise DataError(f"the {without} has no results of the load {alone[0]!r}; replay it with that load, or leave it out of the other")
    return [(one, sides[1][load]) for load, one in sides[0].items()]


def _row(pair: tuple[Run, Run], name: str, values: Floats, least: float) -> Row:
    metric = METRICS[name]
    left, right = (measured(run, name, one) for run, one in zip(pair, values, strict=True))
    unknown = [who for who, one in (("baseline", left), ("candidate", right)) if one.estimate is None]
    if metric.compared == "shown" and not unknown:
        return Row(left, right, None, SHOWN)
    peak = float(np.max(pair[0].memory.peak, initial=0.0))
    kept = interval(retention(name, values[0], values[1], peak), min(size(run, name) for run in pair))
    if kept is None:
        return Row(left, right, None, UNKNOWN, f"{metric.unknown} (of {' and '.join(unknown)})")
    if metric.better == "more" and left.estimate is not None and left.estimate.value == 0:
        return Row(left, right, None, UNKNOWN, "the baseline has none to keep")
    if kept.value >= least:
        return Row(left, right, kept, KEPT)
    return Row(left, right, kept, SHORT if kept.high < least else NOISE, cause=cause(pair, name))


def _notes(pair: tuple[Run, Run], numbers: Sequence[set[int]]) -> Iterator[str]:
    for who, mine in zip(("baseline", "candidate"), numbers, strict=True):
        if alone := len(mine) - len(pair[0].outcomes):
            yield f"{alone} requests were sent to the {who} only and are left out"
    for who, run in zip(("baseline", "candidate"), pair, strict=True):
        yield from (f"{who}: {note}" for note in lateness(run))
    if repeated := _repeated(pair[0]):
        yield f"{repeated} requests ask what another asks: the intervals of checks and robustness take them for evidence of their own"


def _repeated(run: Run) -> int:
    """Requests whose checks judge an answer to what was asked before, 0 if they are few."""
    if run.requests is None:
        return 0
    asked = [json.dumps(one.body, sort_keys=True) for one in run.requests if one.checks]
    repeated = len(asked) - len(set(asked))
    return repeated if repeated > FEW_REPEATED * len(asked) else 0


def lateness(run: Run) -> list[str]:
    """What is to be said if requests were sent so late that the load was not the one that was asked for."""
    late = value(run, "lateness_p95")
    return [f"5 % of its requests were sent more than {late:.1f} s late: the load was lighter than asked"] if late > LATE else []
