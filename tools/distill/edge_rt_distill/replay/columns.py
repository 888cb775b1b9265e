"""A run as columns: what metrics, causes and pictures are computed from. A place in them is a request, in the order of the trace."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_rt.hooks import DataError
from edge_rt_distill.replay.results import Outcome, Reading, Results
from edge_rt_distill.replay.trace import Request, Trace, digest

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

SPANS = 60
"""Readings of the machine are summed up in so many spans of time at most: pairs of them are counted."""


class Slo(NamedTuple):
    """The service that is wanted: at most ``first`` seconds to the first token, ``between`` tokens 99 times of a hundred."""

    first: float = 2.0
    between: float = 0.2


class Gaps(NamedTuple):
    """Times between tokens of all answers, shortest first: ``tokens`` of the request at ``owner`` took ``seconds`` each."""

    seconds: Floats
    tokens: Floats
    owner: Ints


class Memory(NamedTuple):
    """Spans of readings: the ``peak`` of each, bytes. ``slopes``, least first, are of the spans ``left`` to ``right``: bytes a request."""

    peak: Floats
    slopes: Floats
    left: Ints
    right: Ints


class Energy(NamedTuple):
    """Joules used in each span of readings, and tokens that came in it."""

    joules: Floats
    tokens: Floats


class Run(NamedTuple):
    """``length``: seconds from the first request sent to the last end. NaN: not known, or not there.

    ``share``: seconds of the length that are a request's own: time with k on their way is a k-th of each, idle time of who ended it.
    ``first``: seconds to the first token. ``slowest``: the time between its tokens that 99 % do not exceed. ``pace``: the mean of it.
    ``waited``: ``first`` without the seconds for which the server says it read the prompt. ``late``: seconds it was sent after it was due.
    ``seconds``: until it was answered, infinite if it failed, NaN if the client went away. ``good``: 1 if it was served as wanted, 0 if
    not, NaN if the client went before that was decided. ``agrees``: the share of its text that is the same as another run's (``beside``).
    ``long`` and ``short``: whether its prompt is of the longest and shortest quarter.
    """

    results: Results
    outcomes: tuple[Outcome, ...]
    requests: tuple[Request, ...] | None
    length: float
    share: Floats
    first: Floats
    slowest: Floats
    pace: Floats
    waited: Floats
    late: Floats
    seconds: Floats
    tokens: Floats
    prompt: Floats
    passed: Floats
    good: Floats
    answered: Floats
    failed: Floats
    cancelled: Floats
    agrees: Floats
    same: Floats
    long: Flags
    short: Flags
    gaps: Gaps
    memory: Memory
    energy: Energy

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """Of each request; None: without the trace that is not known."""
        return None if self.requests is None else tuple(one.kind for one in self.requests)


def columns(results: Results, slo: Slo = Slo(), trace: Trace | None = None, only: Iterable[int] | None = None) -> Run:  # noqa: B008
    """``trace``: what was replayed, for what only it knows: kinds and temperatures. ``only``: numbers of requests, None: all.

    Raises DataError for results that have no requests or contradict themselves or the trace.
    """
    chosen = None if only is None else set(only)
    outcomes = tuple(sorted((one for one in results.outcomes if chosen is None or one.number in chosen), key=lambda one: one.number))
    _check(results, outcomes, trace)
    gaps = [_gaps(one) for one in outcomes]
    slowest = np.array([_high(*one) for one in gaps])
    first = _known(one.first for one in outcomes)
    prompt = _known(one.prompt_tokens for one in outcomes)
    long, short = quarter(prompt), quarter(-prompt)
    nothing = np.full(len(outcomes), np.nan)
    return Run(
        results, outcomes, None if trace is None else tuple(trace.requests[one.number] for one in outcomes),
        length=max(one.ended for one in outcomes) - min(one.sent for one in outcomes),
        share=_shares(outcomes),
        first=first,
        slowest=slowest,
        pace=np.array([np.dot(*one) / one[1].sum() if len(one[0]) else np.nan for one in gaps]),
        waited=np.maximum(first - _known(one.prompt_seconds for one in outcomes), 0.0),
        late=np.array([one.sent - one.due for one in outcomes]),
        seconds=np.array([_until_answered(one) for one in outcomes]),
        tokens=np.array([float(sum(one.tokens)) for one in outcomes]),
        prompt=prompt,
        passed=_known(one.passed for one in outcomes),
        good=np.array([_good(one, high, slo) for one, high in zip(outcomes, slowest, strict=True)]),
        answered=_is(outcomes, "ok"), failed=_is(outcomes, "error"), cancelled=_is(outcomes, "cancelled"),
        agrees=nothing, same=nothing, long=long, short=short,
        gaps=_all_gaps(gaps),
        memory=_memory(results.readings, outcomes), energy=_energy(results.readings, outcomes),
    )  # fmt: skip


def beside(baseline: Run, candidate: Run) -> tuple[Run, Run]:
    """Both runs of the same requests, with what needs both: one division by prompt length, and how far their texts agree.

    Texts are compared of requests that both answered and that asked for temperature 0.
    """
    prompt = np.where(np.isnan(baseline.prompt), candidate.prompt, baseline.prompt)
    agrees, same = np.full((2, len(prompt)), np.nan)
    for place, (left, right) in enumerate(zip(baseline.outcomes, candidate.outcomes, strict=True)):
        greedy = candidate.requests is not None and candidate.requests[place].body.get("temperature") == 0
        if greedy and left.status == right.status == "ok":
            longest = max(len(left.text), len(right.text))
            agrees[place] = _common(left.text, right.text) / longest if longest else 1.0
            same[place] = left.text == right.text
    long, short = quarter(prompt), quarter(-prompt)
    return (
        baseline._replace(prompt=prompt, long=long, short=short, agrees=np.maximum(agrees, 1.0), same=np.maximum(same, 1.0)),
        candidate._replace(prompt=prompt, long=long, short=short, agrees=agrees, same=same),
    )


def by_client(outcome: Outcome) -> bool:
    """Whether it was the client that went away: a server that gave up says why."""
    return outcome.status == "cancelled" and not outcome.code


def quantile(values: Floats, weights: Floats, share: float) -> Floats:
    """The least of ``values`` [n], which are sorted, up to which a ``share`` of the weight [..., n] lies; NaN of no weight."""
    if not len(values):
        return np.full(weights.shape[:-1], np.nan)
    total = np.cumsum(weights, -1)
    place = (total < share * (1 - 1e-12) * total[..., -1:]).sum(-1)  # a share of a whole number may be rounded above it
    return np.where(total[..., -1] > 0, values[place], np.nan)


def quarter(values: Floats) -> Flags:
    """Which are of the quarter with the highest values; none if more than half are as high."""
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return np.zeros(len(values), dtype=np.bool_)
    high: Flags = values >= known[-math.ceil(len(known) / 4)]
    return high if 2 * high.sum() <= len(known) else np.zeros_like(high)


def _common(left: str, right: str) -> int:
    """How many characters both begin with."""
    return next((place for place, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), min(len(left), len(right)))


def _check(results: Results, outcomes: Sequence[Outcome], trace: Trace | None) -> None:
    if not outcomes:
        raise DataError(f"the results of {results.target} have no requests; replay the trace again")
    twice = [left.number for left, right in pairwise(outcomes) if left.number == right.number]
    if twice:
        raise DataError(f"the results of {results.target} have request {twice[0]} twice; replay the trace again")
    for one in outcomes:
        if len(one.pieces) != len(one.tokens):
            pieces, counts = len(one.pieces), len(one.tokens)
            raise DataError(f"request {one.number} of {results.target} has {pieces} pieces and {counts} counts of tokens; replay again")
    if trace is None:
        return
    sent = results.about.get("requests")  # with --limit only the first
    if outcomes[-1].number >= len(trace.requests) or (isinstance(sent, int) and digest(trace.requests[:sent]) != results.trace):
        raise DataError(f"{results.target} was sent other requests than those of the trace; name the trace that was replayed")


def _known(values: Iterable[float | None]) -> Floats:
    return np.array([np.nan if one is None else one for one in values], dtype=np.float64)


def _is(outcomes: Iterable[Outcome], status: str) -> Floats:
    return np.array([float(one.status == status) for one in outcomes])


def _gaps(outcome: Outcome) -> tuple[Floats, Floats]:
    """Seconds a token, and tokens, of every piece but the first. A piece without a token adds its time to the next."""
    told = np.array([place for place, count in enumerate(outcome.tokens) if count > 0 or place == 0], dtype=np.int64)
    if len(told) < 2:
        return np.empty(0), np.empty(0)
    tokens = np.array(outcome.tokens, dtype=np.float64)[told[1:]]
    return np.diff(np.array(outcome.pieces)[told]) / tokens, tokens


def _high(seconds: Floats, tokens: Floats) -> float:
    order = np.argsort(seconds)
    return float(quantile(seconds[order], tokens[order], 0.99))


def _all_gaps(gaps: Sequence[tuple[Floats, Floats]]) -> Gaps:
    seconds, tokens = (np.concatenate([one[part] for one in gaps]) for part in (0, 1))
    owner = np.repeat(np.arange(len(gaps)), [len(one[0]) for one in gaps])
    order = np.argsort(seconds, kind="stable")
    return Gaps(seconds[order], tokens[order], owner[order])


def _shares(outcomes: Sequence[Outcome]) -> Floats:
    sent, ended = np.array([(one.sent, one.ended) for one in outcomes]).T
    moments = np.unique(np.concatenate((sent, ended)))
    seconds = np.diff(moments)
    busy = np.searchsorted(np.sort(sent), moments[:-1], side="right") - np.searchsorted(np.sort(ended), moments[:-1], side="right")
    each = np.concatenate(([0.0], np.cumsum(np.where(busy > 0, seconds / np.maximum(busy, 1), 0.0))))
    idle = np.concatenate(([0.0], np.where(busy > 0, 0.0, seconds)))
    begun, over = np.searchsorted(moments, sent), np.searchsorted(moments, ended)
    together = np.bincount(begun, minlength=len(moments))
    shares: Floats = each[over] - each[begun] + idle[begun] / together[begun]
    return shares


def _until_answered(outcome: Outcome) -> float:
    if by_client(outcome):
        return float("nan")
    return outcome.ended - outcome.sent if outcome.status == "ok" else float("inf")


def _good(outcome: Outcome, slowest: float, slo: Slo) -> float:
    if outcome.status != "ok" and not by_client(outcome):
        return 0.0
    waited = outcome.ended - outcome.sent if outcome.first is None else outcome.first
    if outcome.first is None and by_client(outcome) and waited <= slo.first:
        return float("nan")
    return float(waited <= slo.first and not slowest > slo.between)


def _spans(count: int) -> list[Ints]:
    return [one for one in np.array_split(np.arange(count), min(count, SPANS)) if len(one)] if count else []


def _memory(readings: Iterable[Reading], outcomes: Sequence[Outcome]) -> Memory:
    """Growth is of the spans behind the first tenth, in which caches fill: by pairs of them between which a request ended."""
    known = sorted((one.at, one.memory) for one in readings if one.memory is not None)
    at, memory = (np.array([one[part] for one in known], dtype=np.float64) for part in (0, 1))
    spans = _spans(len(known))
    peak, middle = (np.array([of(memory[span]) for span in spans]) for of in (np.max, np.median))
    done = np.searchsorted(np.sort([one.ended for one in outcomes]), [np.median(at[span]) for span in spans], side="right").astype(float)
    left, right = np.triu_indices(len(spans), 1)
    counted = (left >= len(spans) / 10) & (done[right] > done[left])
    left, right = left[counted], right[counted]
    slopes = (middle[right] - middle[left]) / (done[right] - done[left])
    order = np.argsort(slopes, kind="stable")
    return Memory(peak, slopes[order], left[order], right[order])


def _energy(readings: Iterable[Reading], outcomes: Iterable[Outcome]) -> Energy:
    known = sorted((one.at, one.energy) for one in readings if one.energy is not None)
    if len(known) < 2:
        return Energy(np.empty(0), np.empty(0))
    ends = [0, *(int(span[-1]) + 1 for span in _spans(len(known) - 1))]
    at, energy = (np.array([known[end][part] for end in ends], dtype=np.float64) for part in (0, 1))
    came = [piece for one in outcomes for piece in one.pieces]
    tokens = np.array([count for one in outcomes for count in one.tokens], dtype=np.float64)
    return Energy(np.diff(energy), np.histogram(came, at, weights=tokens)[0])
