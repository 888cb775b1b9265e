"""Retrieval when nobody knows the question yet: what is left in a cache that was pruned, or that segments have left, before it is asked.

Shown apart from query-aware pruning (pruned.py), which no such method can be expected to equal, and with and without recall: segments
that are close to the question come back, as in a session (core/context/recall.py), in the place of those with the lowest grades.
"""

from __future__ import annotations

from functools import partial

import edge_rt
from bench import models
from bench.context.methods import Method, by_grade, full, ranked
from bench.context.prompt import Prompt, kept
from bench.context.pruned import pruned
from bench.context.reader import Reader
from bench.context.retrieval import CONTEXT, MODEL, asked
from bench.context.runner import by_method, in_rounds, table, versus
from bench.context.tasks import KINDS, REPORTING
from bench.results import Result, Settings
from edge_rt.core.context.recall import RELEVANT, SHARE, embedded, relevances
from edge_rt.core.engine import EmbedsTokens
from edge_rt.core.kv.pruning import METHODS, UNASKED

LENGTHS = (1000, 2000)
BUDGET = 0.2
GRADED, RECALLING = "segments by grade", "segments by grade with recall"


def run(settings: Settings) -> list[Result]:
    """``settings.items`` seeds for each length, or as many as there is time for."""
    methods: dict[str, Method] = {"full": full, **{name: partial(_answered, name) for name in METHODS}}
    methods |= {GRADED: partial(ranked, by_grade), RECALLING: _recalled}
    lengths, seeds = settings.pick(LENGTHS, LENGTHS[:1]), REPORTING[: settings.items or settings.pick(100, 1)]
    with edge_rt.open(models.smollm2(settings, MODEL), context=CONTEXT) as model, Reader(model) as reader:
        rounds = (asked(reader, methods, seed, length, (BUDGET,)) for seed in seeds for length in lengths)
        groups = by_method(scores := in_rounds(rounds, settings.deadline), BUDGET)
    kinds = [kind for kind in KINDS if any(score.kind == kind for score in scores)]
    by_kind = [
        table(f"{kind}, not asked yet, {BUDGET:.0%} kept", by_method((s for s in scores if s.kind == kind), BUDGET), UNASKED.method)
        for kind in kinds
    ]
    compared = [versus(f"recall against {rival}, {BUDGET:.0%} kept", groups, RECALLING, rival) for rival in (GRADED, UNASKED.method)]
    return [*by_kind, table(f"all retrieval, not asked yet, {BUDGET:.0%} kept", groups, UNASKED.method), *compared]


def _answered(method: str, reader: Reader, prompt: Prompt, budget: int) -> str:
    """The answer from a cache that was pruned before the question was known."""
    with pruned(reader, method, UNASKED, prompt.context, [], budget) as sequence:
        return reader.answer(sequence, prompt.question, prompt.limit)


def _recalled(reader: Reader, prompt: Prompt, budget: int) -> str:
    """The answer after segments left by grade and those close to the question came back, within a quarter of the budget."""
    engine = reader.model.engine
    assert isinstance(engine, EmbedsTokens), "edge-rt's own engine does"
    near = relevances(prompt.question, prompt.parts, embedded(engine.token_embeddings))
    ranks, room = list(by_grade(prompt)), budget // SHARE
    for i in sorted(range(len(near)), key=lambda i: -near[i]):
        if near[i] > RELEVANT and len(prompt.parts[i]) <= room:
            room -= len(prompt.parts[i])
            ranks[i] += 1
    with reader.after(kept(prompt, budget, lambda _: ranks)) as sequence:
        return reader.answer(sequence, prompt.question, prompt.limit)
