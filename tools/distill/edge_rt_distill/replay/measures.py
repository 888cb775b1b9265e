"""What the service of a run was: metrics, each with an interval of 95 %.

A metric is a function of a run and of how often each request counts: once each for its value; as drawn anew for its interval; once in a
group and never outside it to see what the group does (causes.py).

Intervals are from a bootstrap over blocks of requests that follow each other in the trace (Künsch 1989, Annals of Statistics 17(3); blocks
go on from the last request to the first: Politis & Romano 1992), 1,000 times: neighbours in a queue wait for the same thing, and drawn one
by one they would look like more evidence than they are. A block is as long as the square root of the number of requests, and at least as
many as were on their way at a time on average, and at most a quarter of all. The cube root, at which the error of such a variance is least
where dependence fades soon (Hall, Horowitz & Jing 1995), is shorter than the busy times of a queue (docs/replay.md has what simulations
say). Memory and energy are drawn by blocks of spans of readings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edge_rt_distill.replay.columns import Floats, Run, quantile
from edge_rt_distill.sandbox.scores import Estimate

DRAWS = 1000
FEW = 8
"""Requests, or spans of readings, below which no interval is known: it has no ends then."""
ADVERSARIAL = "adversarial"
"""The kind of requests that try to make a model break its rules."""

Of = Callable[[Run, Floats], Floats]
"""A metric's values [k] of a run whose requests (or spans of readings) count so often [k, n]; NaN: not known."""
_ROOM = 1 << 18
"""Numbers of a table of draws that is made at once: it stays in the cache."""


class Metric(NamedTuple):
    """``what`` it is; ``unit``: s, share, tokens/s, ...; ``better``: less or more. ``unknown``: why, if it is not known.

    ``compared``: how (``COMPARED``). ``limits``: what it cannot see. ``least``: values below it are taken for it when they are compared:
    nobody notices. ``own``: the column of a run with each request's part in it. ``by``: what is drawn for its interval.
    """

    what: str
    unit: str
    better: str
    compared: str
    limits: str
    of: Of
    unknown: str
    own: str = ""
    by: str = "requests"
    least: float = 0.0


class Measured(NamedTuple):
    """``estimate``: None where it is not known, for the ``reason``."""

    estimate: Estimate | None
    reason: str = ""


COMPARED: Mapping[str, str] = {
    "ratio": "The candidate's by the baseline's where more is better, the baseline's by the candidate's where less is.",
    "successes": "The share that did not end so, the candidate's by the baseline's.",
    "growth": "The baseline's peak of memory and what 1,000 more requests add to it, by that peak and what they add to the candidate.",
    "shown": "None: it is shown, not judged.",
}
"""Ways of comparing -> what retention is."""


def _mean(column: str) -> Of:
    def of(run: Run, weights: Floats) -> Floats:
        return _average(getattr(run, column), weights)

    return of


def _average(values: Floats, weights: Floats) -> Floats:
    known = ~np.isnan(values)
    return _ratio(weights[:, known] @ values[known], weights[:, known].sum(1))


def _ratio(over: Floats, under: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(under != 0, over / under, np.nan)


def _high(column: str, share: float) -> Of:
    def of(run: Run, weights: Floats) -> Floats:
        values = getattr(run, column)
        order = np.argsort(values, kind="stable")[: int((~np.isnan(values)).sum())]
        return quantile(values[order], weights[:, order], share)

    return of


def _between(share: float) -> Of:
    def of(run: Run, weights: Floats) -> Floats:
        return quantile(run.gaps.seconds, run.gaps.tokens * weights[:, run.gaps.owner], share)

    return of


def _rate(column: str) -> Of:
    def of(run: Run, weights: Floats) -> Floats:
        return _ratio(weights @ np.nan_to_num(getattr(run, column)), weights @ run.share)

    return of


def _slower(run: Run, weights: Floats) -> Floats:
    told = np.bincount(run.gaps.owner, run.gaps.tokens, len(run.outcomes))
    took = told * np.nan_to_num(run.pace)
    long, short = (_ratio(weights @ (took * some), weights @ (told * some)) for some in (run.long, run.short))
    return _ratio(long, short)


def _kept_in_long(run: Run, weights: Floats) -> Floats:
    """Prompts of unknown length are of neither side."""
    rest = ~run.long & ~np.isnan(run.prompt)
    return _ratio(_average(run.passed, weights * run.long), _average(run.passed, weights * rest))


def _robust(run: Run, weights: Floats) -> Floats:
    return _average(run.passed, weights * np.array([kind == ADVERSARIAL for kind in run.kinds or [""] * len(run.outcomes)]))


def _peak(run: Run, weights: Floats) -> Floats:
    return np.where(weights > 0, run.memory.peak, -np.inf).max(1) if len(run.memory.peak) else np.full(len(weights), np.nan)


def _growth(run: Run, weights: Floats) -> Floats:
    return 100 * quantile(run.memory.slopes, weights[:, run.memory.left] * weights[:, run.memory.right], 0.5)


def _energy(run: Run, weights: Floats) -> Floats:
    return _ratio(weights @ run.energy.joules, weights @ run.energy.tokens)


def _cold_start(run: Run, weights: Floats) -> Floats:
    return np.full(len(weights), math.nan if run.results.cold_start is None else run.results.cold_start)


_NO_TOKEN, _NO_GAP = "no request got a token", "no answer came in two pieces"
_NO_LENGTH, _NO_MEMORY = "the run has no length", "no reading of memory"
_NO_PAIR = "it is of requests with temperature 0, which --trace tells, that two runs answered"

METRICS: Mapping[str, Metric] = {
    "first_token_p50": Metric(
        "Time from sending a request to the first token of its answer, half of them.", "s", "less", "ratio",
        "Of requests that got a token; those that failed are in errors and goodput.", _high("first", 0.5), _NO_TOKEN, "first", least=0.001,
    ),
    "first_token_p95": Metric(
        "The same, 95 % of them.", "s", "less", "ratio", "Of few requests it is nearly the worst of them.",
        _high("first", 0.95), _NO_TOKEN, "first", least=0.001,
    ),
    "between_tokens_p50": Metric(
        "Time between tokens, half of them; a piece of n tokens counts as n of its n-th part.", "s", "less", "ratio",
        "As they came: a network that gathers them shows.", _between(0.5), _NO_GAP, "pace", least=0.001,
    ),
    "between_tokens_p99": Metric(
        "The same, 99 % of them: stutter.", "s", "less", "ratio", "A stall inside a piece of many tokens is spread over them.",
        _between(0.99), _NO_GAP, "slowest", least=0.001,
    ),
    "throughput": Metric(
        "Tokens a second from the first request to the last end.", "tokens/s", "more", "ratio",
        "Of an open load it is what was asked for, as long as the server keeps up; answers of other lengths move it.",
        _rate("tokens"), _NO_LENGTH, "seconds",
    ),
    "completed": Metric(
        "Requests answered a second.", "requests/s", "more", "ratio", "As throughput.", _rate("answered"), _NO_LENGTH, "seconds",
    ),
    "goodput": Metric(
        "Share of requests whose first token came within --slo-first and 99 % of whose tokens within --slo-between; a failed one did not "
        "(DistServe, Zhong et al. 2024).", "share", "more", "ratio",
        "A client that went away before its first token was late is left out.", _mean("good"), "all clients went away", "good",
    ),
    "goodput_rate": Metric(
        "Such requests a second.", "requests/s", "more", "ratio", "As throughput.", _rate("good"), _NO_LENGTH, "good",
    ),
    "queueing_p95": Metric(
        "Time to the first token without the time for which the server says it read the prompt, 95 % of requests.", "s", "less", "ratio",
        "The server's word; network and the first token's own step are in it.", _high("waited", 0.95),
        "the server does not say how long it read prompts", "waited", least=0.01,
    ),
    "lateness_p95": Metric(
        "Time from when a request was due to when it was sent, 95 % of them: of what measures, not of the server.", "s", "less", "shown",
        "Above some milliseconds the load was not the one that was asked for.", _high("late", 0.95), "", "late",
    ),
    "long_context_speed": Metric(
        "Mean time between tokens behind the longest quarter of prompts by that behind the shortest.", "ratio", "less", "ratio",
        "Needs prompts of different lengths.", _slower, "prompts are about as long as each other, or of unknown length", "pace",
    ),
    "long_context_quality": Metric(
        "Checks passed behind the longest quarter of prompts by those behind the others.", "ratio", "more", "ratio",
        "The long prompts may ask harder things: compare, do not read alone.", _kept_in_long,
        "no checks behind prompts of both lengths, or none passed behind the shorter", "passed",
    ),
    "robustness": Metric(
        "Mean of the checks of requests of the kind adversarial.", "share", "more", "ratio", "The attacks that are in the trace.",
        _robust, "without --trace kinds are not known, or no adversarial request has checks and an answer", "passed",
    ),
    "checks": Metric(
        "Mean of the checks of all requests that have some and were answered.", "share", "more", "ratio", "What the checks see.",
        _mean("passed"), "no request that was answered has checks", "passed",
    ),
    "errors": Metric(
        "Share of requests that failed.", "share", "less", "successes", "Not why; the causes name codes.", _mean("failed"), "", "failed",
    ),
    "cancels": Metric(
        "Share of requests that were cancelled, by client or server.", "share", "less", "successes",
        "A client of the trace goes away after so long: a quicker server has answered by then.", _mean("cancelled"), "", "cancelled",
    ),
    "memory_peak": Metric(
        "Most memory of the server's processes.", "bytes", "less", "ratio",
        "Between readings it is not seen; no drawing anew finds a higher peak, so the interval ends at it.", _peak, _NO_MEMORY, by="memory",
    ),
    "memory_growth": Metric(
        "Growth of memory by 100 requests that ended: the median slope between readings behind the first tenth (Theil-Sen, Sen 1968).",
        "bytes", "less", "growth", "Caches that are still filling look like a leak: replay for longer.", _growth,
        "no two readings of memory behind the first tenth with requests that ended between them", by="memory",
    ),
    "energy": Metric(
        "Energy by token.", "J/token", "less", "ratio", "Of the whole processor, whatever else ran on it.", _energy,
        "no reading of energy", by="energy",
    ),
    "cold_start": Metric(
        "Time from starting the server to the first token of its first answer.", "s", "less", "ratio",
        "Once a run, so no interval: a difference is never sure.", _cold_start, "the server ran already", by="once", least=0.1,
    ),
    "agreement": Metric(
        "Share of the text, from its beginning, that is the baseline's too, of requests with temperature 0.", "share", "more", "shown",
        "Sound engines round differently and part ways; checks judge, this shows.", _mean("agrees"), _NO_PAIR, "agrees",
    ),
    "same_text": Metric(
        "Share of texts that are the baseline's, of requests with temperature 0.", "share", "more", "shown", "As agreement.",
        _mean("same"), _NO_PAIR, "same",
    ),
}  # fmt: skip


def measure(run: Run, seed: int = 0) -> dict[str, Measured]:
    """Every metric of a run."""
    return {name: measured(run, name, values[0]) for name, values in drawn([run], seed).items()}


def measured(run: Run, name: str, values: Floats) -> Measured:
    """A metric from its values ([0] as measured, then as drawn anew)."""
    found = interval(values, size(run, name))
    return Measured(found, "" if found else METRICS[name].unknown)


def drawn(runs: Sequence[Run], seed: int = 0) -> dict[str, Floats]:
    """Metric -> [runs, 1 + DRAWS]: as measured, then with requests drawn anew, the same for all runs, which are of the same requests.

    NaN: not known; in a draw, that it has nothing of what the metric is of.
    """
    found = {name: np.full((len(runs), 1 + DRAWS), np.nan) for name in METRICS}
    for place, run in enumerate(runs):
        for by, places in _sizes(run).items():
            mine = [name for name, metric in METRICS.items() if metric.by == by]
            for name in mine:
                found[name][place, 0] = value(run, name)
            known = [name for name in mine if not math.isnan(found[name][place, 0])]
            dice = np.random.default_rng([seed, *by.encode()])
            length = block_length(runs) if by == "requests" else _root(places)
            step = max(1, _ROOM // max(1, places, len(run.gaps.seconds), len(run.memory.slopes)))
            for start in range(1, 1 + DRAWS, step):
                drawn = slice(start, min(start + step, 1 + DRAWS))
                weights = _blocks(drawn.stop - start, places, length, dice)
                for name in known:
                    found[name][place, drawn] = METRICS[name].of(run, weights)
    return found


def value(run: Run, name: str, weights: Floats | None = None) -> float:
    """A metric of a run whose requests count so often [n], None: once each. NaN: not known."""
    return float(METRICS[name].of(run, np.atleast_2d(np.ones(size(run, name)) if weights is None else weights))[0])


def retention(name: str, baseline: Floats, candidate: Floats, peak: float = math.nan) -> Floats:
    """What the candidate kept of the baseline: 1 of equal values, less of worse; NaN of what is not known. ``peak``: of the baseline's
    memory.
    """
    metric = METRICS[name]
    if metric.compared == "successes":
        over, under = 1 - candidate, 1 - baseline
    elif metric.compared == "growth":
        over, under = (peak + 10 * np.maximum(one, 0) for one in (baseline, candidate))
    else:
        over, under = (np.maximum(one, metric.least) for one in (baseline, candidate))
        over, under = (over, under) if metric.better == "less" else (under, over)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(over == under, 1.0, over / under)


def block_length(runs: Sequence[Run]) -> int:
    """How many requests that follow each other are drawn together."""
    count = len(runs[0].outcomes)
    on_their_way = [sum(one.ended - one.sent for one in run.outcomes) / run.length if run.length > 0 else 1.0 for run in runs]
    return min(max(_root(count), *map(math.ceil, on_their_way)), max(1, count // 4))


def interval(values: Floats, size: int) -> Estimate | None:
    """What ``values`` ([0] as measured, then as drawn anew, of ``size`` requests or spans) come to; None: not known.

    Without ends where there are few, or where one draw of twenty has none of what is measured.
    """
    value = float(values[0])
    if math.isnan(value):
        return None
    drawn = values[1:][~np.isnan(values[1:])]
    if size < FEW or len(drawn) < 0.95 * DRAWS:
        return Estimate(value, -math.inf, math.inf)
    low, high = np.quantile(drawn, (0.025, 0.975), method="inverted_cdf")
    return Estimate(value, float(low), float(high))


def size(run: Run, name: str) -> int:
    """Of how many requests (or spans of readings) a metric's interval is drawn."""
    return _sizes(run)[METRICS[name].by]


def _sizes(run: Run) -> dict[str, int]:
    return {"requests": len(run.outcomes), "memory": len(run.memory.peak), "energy": len(run.energy.joules), "once": 1}


def _root(count: int) -> int:
    return math.ceil(math.sqrt(count))


def _blocks(draws: int, size: int, length: int, dice: np.random.Generator) -> Floats:
    """[draws, size]: how often each place was drawn, ``size`` times in all, in blocks of ``length``."""
    if not size:
        return np.empty((draws, 0))
    starts = dice.integers(0, size, (draws, -(-size // length), 1))
    places = (starts + np.arange(length)).reshape(draws, -1)[:, :size] % size
    return np.bincount((places + size * np.arange(draws)[:, None]).ravel(), minlength=draws * size).reshape(draws, size).astype(np.float64)
