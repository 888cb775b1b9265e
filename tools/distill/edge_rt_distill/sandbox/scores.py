"""Scores of a model, and what a student kept of its teacher, with intervals.

An item's value is put on a scale on which chance is 0 and a perfect answer 1. Of an item of the form choice chance is one of its options,
of variants what random choices would agree, of answers what saying nothing would be worth. A cell is the items of one metric in one
domain. A cell in which the teacher is not surely above chance (the lower end of its interval is not above 0) says nothing of what was kept
and does not count. Retention is the student's weighted sum over the cells that count by the teacher's.

Intervals are from a paired bootstrap (Efron 1979): items are drawn anew within their cells, the same ones for both models, 2,000 times;
95 % of the results lie between its ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_rt.hooks import DataError
from edge_rt_distill.sandbox.items import Item
from edge_rt_distill.sandbox.judging import chance
from edge_rt_distill.sandbox.metrics import METRICS
from edge_rt_distill.sandbox.running import Results, digest
from edge_rt_distill.sandbox.suites import Suite
from edge_rt_distill.sandbox.weights import FLOORS

DRAWS = 2000
FEW = 4
"""Items of a cell below which it does not count."""
Floats = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Kept(NamedTuple):
    """What a student kept in some cells. ``counted``: how many of them count. ``retention``: None if none does."""

    teacher: Estimate
    student: Estimate
    retention: Estimate | None
    counted: int
    cells: int


class Comparison(NamedTuple):
    """Over all, by metric and by domain."""

    whole: Kept
    metrics: Mapping[str, Kept]
    domains: Mapping[str, Kept]


Cell = tuple[str, str]
"""(domain, metric)."""


def scaled(item: Item, value: float, judged: bool = False) -> float:
    """On the scale from chance, 0, to 1. ``judged``: a judge graded it, whose scale begins at 0."""
    nothing = 0.0 if judged and not item.options else chance(item)
    return (value - nothing) / (1 - nothing)


def cells(results: Results, suites: Sequence[Suite]) -> dict[Cell, dict[str, float]]:
    """Cell -> item -> its value on the scale. Raises DataError for results of other suites, or of these as they were before a change."""
    changed = [suite.name for suite in suites if suite.name in results.suites and results.suites[suite.name] != digest(suite)]
    if changed:
        raise DataError(f"the suite {changed[0]} has changed since {results.facts.model} was asked; evaluate the model again")
    items = {(suite.name, item.id): item for suite in suites for item in suite.items}
    found: dict[Cell, dict[str, float]] = {}
    for one in results.outcomes:
        item = items.get((one.domain, one.item))
        if item is None:
            raise DataError(f"the results have an item {one.item} that is in no suite of {one.domain}; evaluate the model again")
        found.setdefault((one.domain, item.metric), {})[one.item] = scaled(item, one.value, bool(results.judge))
    return found


def scores(results: Results, suites: Sequence[Suite], seed: int = 0) -> dict[str, Estimate]:
    """A model's score by metric, and ``all``: means of its cells."""
    table = cells(results, suites)
    drawn = {cell: _drawn([list(values.values())], seed, cell)[0] for cell, values in table.items()}
    found = {metric: [one for cell, one in drawn.items() if cell[1] == metric] for metric in METRICS}
    groups = {"all": list(drawn.values()), **{metric: some for metric, some in found.items() if some}}
    return {name: _interval(np.mean(some, 0)) for name, some in groups.items()}


def difference(first: Results, second: Results, suites: Sequence[Suite], seed: int = 0) -> Estimate:
    """How much more the second scores, over all cells, with the same items drawn for both. Raises DataError for results that do not fit."""
    pairs = [_drawn(both, seed, cell) for cell, both in _beside(first, second, suites).items()]
    return _interval(np.mean([pair[1] - pair[0] for pair in pairs], 0))


def compare(
    teacher: Results, student: Results, suites: Sequence[Suite], weights: Mapping[str, float] | None = None, seed: int = 0
) -> Comparison:
    """What the student kept. ``weights``: of metrics and domains by name, 1 if left out. 0: left out. What one of them could not be asked
    counts for neither (``left_out`` of its results). Raises DataError for results that do not fit, or without any weight.
    """
    table = _beside(teacher, student, suites)
    given = weights or {}
    weight = {cell: one for cell in table if (one := given.get(cell[0], 1.0) * given.get(cell[1], 1.0))}
    if not weight:
        raise DataError("no item that was asked has a weight; give one to some of the metrics and domains that were asked")
    pairs = {cell: _drawn(table[cell], seed, cell) for cell in weight}

    def kept(some: list[Cell]) -> Kept:
        return _kept([pairs[cell] for cell in some], [len(table[cell][0]) for cell in some], [weight[cell] for cell in some])

    asked = {cell[1] for cell in pairs}
    metrics = {metric: kept([cell for cell in pairs if cell[1] == metric]) for metric in METRICS if metric in asked}
    domains = {domain: kept([cell for cell in pairs if cell[0] == domain]) for domain in dict.fromkeys(cell[0] for cell in pairs)}
    return Comparison(kept(list(pairs)), metrics, domains)


def _beside(teacher: Results, student: Results, suites: Sequence[Suite]) -> dict[Cell, tuple[list[float], list[float]]]:
    """Cell -> the values of both, of the same items. Raises DataError for results that do not fit."""
    left, right = cells(teacher, suites), cells(student, suites)
    if bool(teacher.left_out) != bool(student.left_out):
        left, right = _without_options(left, suites), _without_options(right, suites)
    if {cell: one.keys() for cell, one in left.items()} != {cell: one.keys() for cell, one in right.items()}:
        raise DataError("teacher and student were asked different items; evaluate both with the same suites and split")
    if teacher.judge != student.judge:
        raise DataError("one of them was graded by a judge that the other was not graded by; let the same judge grade both, or none")
    return {cell: (list(one.values()), [right[cell][item] for item in one]) for cell, one in left.items()}


def _without_options(table: Mapping[Cell, Mapping[str, float]], suites: Sequence[Suite]) -> dict[Cell, dict[str, float]]:
    """Only what every engine can be asked."""
    compared = {(suite.name, item.id) for suite in suites for item in suite.items if item.options}
    found = {cell: {item: value for item, value in one.items() if (cell[0], item) not in compared} for cell, one in table.items()}
    return {cell: one for cell, one in found.items() if one}


def fails(found: Comparison, least: float, floors: Mapping[str, float] = FLOORS) -> list[str]:
    """Why a student does not pass: it kept less than ``least`` over all, or of a metric less than its floor. Empty: it passes."""
    reasons = []
    if found.whole.retention is None:
        reasons.append("the teacher is above chance in no cell, so nothing can be said of what was kept")
    elif found.whole.retention.value < least:
        reasons.append(f"kept {found.whole.retention.value:.1%} of the teacher's score, and {least:.1%} are wanted")
    for metric, floor in floors.items():
        kept = found.metrics.get(metric)
        if kept is not None and kept.retention is not None and kept.retention.value < floor:
            reasons.append(f"kept {kept.retention.value:.1%} of {metric}, whose floor is {floor:.0%}")
    return reasons


def notes(teacher: Results, student: Results) -> list[str]:
    """What a reader of a comparison should know besides."""
    found = []
    if teacher.facts.template != student.facts.template and teacher.facts.template and student.facts.template:
        found.append("Their prompts have different forms, so this compares more than models.")
    unknown = [one.facts.model for one in (teacher, student) if not one.facts.template]
    if unknown:
        found.append(f"The form of the prompts of {' and '.join(unknown)} is not known, so this may compare more than models.")
    if bool(teacher.left_out) != bool(student.left_out):
        found.append(f"{max(teacher.left_out, student.left_out)} items are left out that only one of their engines could be asked.")
    if teacher.judge:
        found.append(f"Free answers were graded by {teacher.judge}.")
    return found


def told(found: Comparison) -> dict[str, Any]:
    """A comparison as JSON has it."""

    def one(kept: Kept) -> dict[str, Any]:
        known = kept.retention and kept.retention._asdict()
        return {**kept._asdict(), "teacher": kept.teacher._asdict(), "student": kept.student._asdict(), "retention": known}

    groups = {"metrics": found.metrics, "domains": found.domains}
    return {"all": one(found.whole), **{name: {key: one(kept) for key, kept in some.items()} for name, some in groups.items()}}


def _drawn(models: Sequence[Sequence[float]], seed: int, cell: Cell) -> Floats:
    """[models, 1 + DRAWS]: a cell's mean as it is, then with its items drawn anew, the same for all models."""
    values = np.array(models)
    dice = np.random.default_rng([seed, *"/".join(cell).encode()])
    chosen = dice.integers(0, values.shape[1], (DRAWS, values.shape[1]))
    return np.concatenate((values.mean(1, keepdims=True), values[:, chosen].mean(2)), 1)


def _interval(drawn: Floats) -> Estimate:
    low, high = np.quantile(drawn[1:], (0.025, 0.975))
    return Estimate(float(drawn[0]), float(low), float(high))


def _kept(pairs: Sequence[Floats], sizes: Sequence[int], weights: Sequence[float]) -> Kept:
    teacher, student = (_interval(np.average([pair[at] for pair in pairs], 0, weights)) for at in (0, 1))
    known = [size >= FEW and _interval(pair[0]).low > 0 for pair, size in zip(pairs, sizes, strict=True)]
    counted = [(pair, weight) for pair, weight, one in zip(pairs, weights, known, strict=True) if one]
    if not counted:
        return Kept(teacher, student, None, 0, len(pairs))
    sums = [sum(weight * pair[at] for pair, weight in counted) for at in (0, 1)]
    ratio = np.asarray(sums[1]) / np.maximum(np.asarray(sums[0]), 1e-9)
    return Kept(teacher, student, _interval(ratio), len(counted), len(pairs))
