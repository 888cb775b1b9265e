"""Why a metric fell short: the requests that lost most, and the group of requests without which least is lost.

Groups: around each fault, each kind, the longest prompts and answers, what was sent when most was on its way, at the beginning and at the
end, later turns of sessions. What a group explains is how much nearer to 1 retention is without it, of what it lacks of 1: requests that
are all slower alike have no group that explains much. Groups overlap; of those that explain as much the smallest is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from edge_rt_distill.replay.columns import Flags, Floats, Run, quarter
from edge_rt_distill.replay.measures import METRICS, retention, value
from edge_rt_distill.replay.outages import outages, touched

WORST = 5
"""Requests that are named."""
MOST = 0.5
"""A group explains a shortfall if it explains more than this share of it."""
_MORE_IS_BETTER = ("passed", "good", "agrees", "same")
"""Columns of a run; of the others less is."""
_FEWEST = 2
"""Requests of a group; one alone is named as a request."""


class Worst(NamedTuple):
    """A request's place in both runs, and its part in a metric (the metric's ``own`` column) in each."""

    place: int
    baseline: float
    candidate: float


class Group(NamedTuple):
    """Requests of a ``name``. Retention ``inside``, None: not known of them alone, and ``outside`` of it; ``explained``: see above."""

    name: str
    requests: int
    inside: float | None
    outside: float
    explained: float


class Cause(NamedTuple):
    """``where``: in a sentence. ``groups``: those that explain most first."""

    where: str
    worst: tuple[Worst, ...]
    groups: tuple[Group, ...]


def cause(pair: tuple[Run, Run], name: str) -> Cause:
    """Of a metric whose retention of ``pair`` (the baseline and the candidate) is known and below 1."""
    metric = METRICS[name]
    if metric.by == "memory":
        return Cause(_peak(pair[1]), (), ())
    if metric.by != "requests":
        return Cause("of the run as a whole: it cannot be told by requests", (), ())
    count = len(pair[0].outcomes)
    whole = _retention(pair, name, np.ones(count))
    found = []
    for group, flags in groups(pair).items():
        inside, outside = (_retention(pair, name, some.astype(np.float64)) for some in (flags, ~flags))
        if not np.isnan(outside):
            explained = min(1.0, (outside - whole) / (1 - whole))
            found.append(Group(group, int(flags.sum()), None if np.isnan(inside) else inside, outside, explained))
    found.sort(key=lambda one: (-round(one.explained, 2), one.requests))
    return Cause(_where(found, count), worst(pair, metric.own), tuple(found))


def groups(pair: tuple[Run, Run]) -> Mapping[str, Flags]:
    """Name -> which requests are of it; none that has nearly none, or all."""
    run = pair[1]
    faults = {f"around {one.name}": touched(run, one) for one in outages(run)}
    found = {**faults, **({"around the faults": np.logical_or.reduce([*faults.values()])} if len(faults) > 1 else {})}
    found |= {f"kind {kind}": np.array([one == kind for one in run.kinds]) for kind in dict.fromkeys(run.kinds or ()) if kind and run.kinds}
    found["the longest quarter of prompts"] = run.long
    found["the longest quarter of answers"] = quarter(np.maximum(pair[0].tokens, run.tokens))
    found["the quarter sent when most was on its way"] = quarter(_on_their_way(run))
    order = np.argsort([one.sent for one in run.outcomes], kind="stable")
    rank = np.argsort(order, kind="stable") / len(order)
    found["the first tenth"], found["the last quarter"] = rank < 0.1, rank >= 0.75
    if run.requests is not None:
        before: set[str] = set()
        found["later turns of sessions"] = np.array([_seen(one.session, before) for one in run.requests])
    return {name: flags for name, flags in found.items() if _FEWEST <= flags.sum() < len(flags)}


def worst(pair: tuple[Run, Run], column: str) -> tuple[Worst, ...]:
    """The requests that lost most of a column, the worst first; none that lost nothing."""
    left, right = (np.asarray(getattr(run, column)) for run in pair)
    with np.errstate(invalid="ignore"):  # of what failed in both
        lost = left - right if column in _MORE_IS_BETTER else right - left
    order = np.argsort(np.where(np.isnan(lost), -np.inf, lost) * -1, kind="stable")[:WORST]
    return tuple(Worst(int(place), float(left[place]), float(right[place])) for place in order if lost[place] > 0)


def _retention(pair: tuple[Run, Run], name: str, weights: Floats) -> float:
    left, right = (np.array(value(run, name, weights)) for run in pair)
    return float(retention(name, left, right))


def _where(found: list[Group], count: int) -> str:
    if not found:
        return "no group of requests can be told apart"
    first = found[0]
    if first.explained <= MOST:
        most = f"more than {first.explained:.0%}" if first.explained >= 0.01 else "any"
        return f"everywhere: no group of requests explains {most} of it"
    inside = "not known" if first.inside is None else f"{first.inside:.3f}"
    return (
        f"{first.name} ({first.requests} of {count} requests): retention is {inside} there and {first.outside:.3f} elsewhere, "
        f"which explains {first.explained:.0%} of the shortfall"
    )


def _peak(run: Run) -> str:
    """When memory was highest, and with how many requests on their way."""
    top = max((one for one in run.results.readings if one.memory is not None), key=lambda one: one.memory or 0)
    busy = sum(one.sent <= top.at <= one.ended for one in run.outcomes)
    return f"its memory was highest {top.at:.1f} s after the begin, with {busy} requests on their way"


def _on_their_way(run: Run) -> Floats:
    """How many requests were on their way when each was sent."""
    sent, ended = np.array([(one.sent, one.ended) for one in run.outcomes]).T
    begun, over = (np.searchsorted(np.sort(some), sent, side="right") for some in (sent, ended))
    busy: Floats = begun - over.astype(np.float64)
    return busy


def _seen(session: str | None, before: set[str]) -> bool:
    """Whether a session was there before; it is from now on."""
    known = session in before
    if session is not None:
        before.add(session)
    return known
