"""Retrieval from real prose: what each policy's answers are worth at 20 % and 10 % of the context, under equal protection.

By kind over all lengths, by length over all kinds, and the question whether grading is better than its rivals. Seeds are those for
reporting: weights are chosen on others (``tasks.TUNING``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import edge_rt
from bench import models
from bench.context.methods import METHODS
from bench.context.prompt import of_task
from bench.context.reader import Reader
from bench.context.runner import Item, Score, by_method, evaluate, in_rounds, table, versus
from bench.context.score import share_found
from bench.context.tasks import KINDS, REPORTING, tasks
from bench.results import Result, Settings

MODEL = "Q8_0"
"""Close to the unquantised model and fast; in Q4_0 it loses half of the facts with its whole cache."""
CONTEXT = 8192
LENGTHS = (1000, 2000, 4000, 6000)
BUDGETS = (0.2, 0.1)
_OURS, _RIVALS = "graded", ("newest", "random")


def run(settings: Settings) -> list[Result]:
    """All methods; ``settings.items`` seeds for each length, or as many as there is time for."""
    lengths, seeds = settings.pick(LENGTHS, LENGTHS[:1]), REPORTING[: settings.items or settings.pick(100, 1)]
    with edge_rt.open(models.smollm2(settings, MODEL), context=CONTEXT) as model, Reader(model) as reader:
        rounds = (_round(reader, seed, length) for seed in seeds for length in lengths)
        scores = in_rounds(rounds, settings.deadline)
    return results(scores)


def _round(reader: Reader, seed: int, length: int) -> Iterator[Score]:
    items = (
        Item(task.kind, length, of_task(reader, task), partial(share_found, wanted=task.answers))
        for task in tasks(seed, length, reader.count)
    )
    return evaluate(reader, items, METHODS, BUDGETS)


def results(scores: list[Score]) -> list[Result]:
    """The tables: kinds, lengths, and grading against its rivals."""
    found = []
    for budget in BUDGETS:
        kept = f"{budget:.0%} kept"
        for kind in KINDS:
            found.append(table(f"{kind}, {kept}", by_method((s for s in scores if s.kind == kind), budget), _OURS))
        for length in sorted({score.length for score in scores}):
            found.append(table(f"{length:,} tokens, {kept}", by_method((s for s in scores if s.length == length), budget), _OURS))
        groups = by_method(scores, budget)
        found.append(table(f"all retrieval, {kept}", groups, _OURS))
        found += [versus(f"grading against {rival}, {kept}", groups, _OURS, rival) for rival in _RIVALS]
    return found
