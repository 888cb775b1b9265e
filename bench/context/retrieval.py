"""Retrieval from real prose: what each policy's answers are worth at 20 % and 10 % of the context, under equal protection.

By kind over all lengths, by length over all kinds, and the question whether grading is better than its rivals. Seeds are those for
reporting: weights are chosen on others (``tasks.TUNING``).

Answers cost seconds each. So policies that drop text are compared over many more texts without the model, too: how many of the wanted
answers are still to be read in what they keep. No model can answer more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import edge_rt
from bench import models
from bench.context.methods import METHODS, RANKS, Method
from bench.context.prompt import kept, of_task
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
SURVEYED = 40
"""Seeds for each length whose texts are only looked through."""
_OURS, _RIVALS = "graded", ("newest", "random")


def run(settings: Settings) -> list[Result]:
    """All methods; ``settings.items`` seeds for each length, or as many as there is time for."""
    lengths, seeds = settings.pick(LENGTHS, LENGTHS[:1]), REPORTING[: settings.items or settings.pick(100, 1)]
    with edge_rt.open(models.smollm2(settings, MODEL), context=CONTEXT) as model, Reader(model) as reader:
        surveyed = [s for seed in REPORTING[: settings.pick(SURVEYED, 2)] for length in lengths for s in survey(reader, seed, length)]
        rounds = (asked(reader, METHODS, seed, length, BUDGETS) for seed in seeds for length in lengths)
        scores = in_rounds(rounds, settings.deadline)
    return results(scores) + survey_results(surveyed)


def asked(reader: Reader, methods: Mapping[str, Method], seed: int, length: int, budgets: Sequence[float]) -> Iterator[Score]:
    """The scores of all methods for one seed and length."""
    items = (
        Item(task.kind, length, of_task(reader, task), partial(share_found, wanted=task.answers))
        for task in tasks(seed, length, reader.count)
    )
    return evaluate(reader, items, methods, budgets)


def survey(reader: Reader, seed: int, length: int) -> Iterator[Score]:
    """The share of the wanted answers that each rank keeps in the text. ``words`` is left out: its answer stands in many places."""
    found = tasks(seed, length, reader.count, [kind for kind in KINDS if kind != "words"])
    for _, group in groupby(found, key=lambda task: task.context):
        asked = list(group)
        prompt = of_task(reader, asked[0])
        for name, rank in RANKS.items():
            for budget in BUDGETS:
                text = reader.model.detokenize(kept(prompt, int(budget * len(prompt.context)), rank))
                for task in asked:
                    yield Score(name, budget, task.kind, length, seed, share_found(text, task.answers), "")


def survey_results(scores: list[Score]) -> list[Result]:
    """Which answers are left, by budget, and grading against its rivals."""
    found = []
    for budget in BUDGETS:
        groups = by_method(scores, budget)
        found.append(table(f"answers left in the text, {budget:.0%} kept", groups, _OURS))
        found += [versus(f"answers left, grading against {rival}, {budget:.0%} kept", groups, _OURS, rival) for rival in _RIVALS]
    return found


def results(scores: list[Score]) -> list[Result]:
    """The tables: kinds, lengths, and grading against its rivals."""
    found = []
    for budget in BUDGETS:
        share = f"{budget:.0%} kept"
        for kind in KINDS:
            found.append(table(f"{kind}, {share}", by_method((s for s in scores if s.kind == kind), budget), _OURS))
        for length in sorted({score.length for score in scores}):
            found.append(table(f"{length:,} tokens, {share}", by_method((s for s in scores if s.length == length), budget), _OURS))
        groups = by_method(scores, budget)
        found.append(table(f"all retrieval, {share}", groups, _OURS))
        found += [versus(f"grading against {rival}, {share}", groups, _OURS, rival) for rival in _RIVALS]
    return found
