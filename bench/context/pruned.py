"""What is left of retrieval and of perplexity when the cache itself is pruned, by edge-rt's method and by those it is measured against.

All methods keep as many cells, the same first and last ones of them, and ask with the same queries. Retrieval is query-aware: the question
is fed before the pass and stays besides the budget. Perplexity is not: what follows is unknown, and the last tokens of the context take
the question's place. Each is pruned as edge-rt prunes then: ``ASKED`` and ``UNASKED`` of core/kv/pruning.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import edge_rt
from bench import models
from bench.context.methods import Method, full, full_losses
from bench.context.perplexity import BEFORE, SHARE, texts
from bench.context.prompt import Prompt
from bench.context.reader import Reader
from bench.context.retrieval import BUDGETS, CONTEXT, MODEL, asked
from bench.context.runner import Score, by_method, in_rounds, table, versus
from bench.context.score import Groups, difference
from bench.context.tasks import KINDS, REPORTING
from bench.results import Result, Settings
from edge_rt.core.context.recall import same_tokens
from edge_rt.core.engine import PrunesCells, RemovesCells, SequenceBatch
from edge_rt.core.kv.pruning import ASKED, METHODS, SINKS, UNASKED, WATCHED, PruningMethod, PruningPlan, choose_tokens, spans

LENGTHS = (1000, 2000, 4000)
LEAST = {0.2: 0.95, 0.1: 0.80}
"""Share of the whole cache's score that must be left, by budget."""
MOST_ABOVE = 0.01
"""By how much perplexity may rise when half is kept."""


@contextmanager
def pruned(reader: Reader, method: str, way: PruningMethod, context: Sequence[int], question: Sequence[int], budget: int) -> Iterator[int]:
    """A sequence that holds ``budget`` cells of a context, and the question that they were chosen for, if any."""
    older = len(context) - WATCHED
    with reader.after(context[:older]) as sequence:
        engine = reader.model.engine
        assert isinstance(engine, PrunesCells), "edge-rt's own engine is"
        engine.watch(sequence, WATCHED)
        engine.step([SequenceBatch(sequence, [*context[older:], *question], "none")])
        keep, last = budget + len(question), int(way.newest * budget) + len(question)
        engine.prune(sequence, keep, first=SINKS, last=last, method=method, queries=way.queries)
        yield sequence


# ---- retrieval -------------------------------------------------------------------------------------------------------


def answered(method: str, reader: Reader, prompt: Prompt, budget: int) -> str:
    """The answer from a cache pruned for the question."""
    with pruned(reader, method, ASKED, prompt.context, prompt.question[:-1], budget) as sequence:
        return reader.answer(sequence, prompt.question[-1:], prompt.limit)


def _by_tokens(reader: Reader, prompt: Prompt, budget: int) -> str:
    """The answer after tokens left as wholes: what a session does on an engine that does not show its attention."""
    question, n = prompt.question[:-1], len(prompt.context)
    tokens = [*prompt.context, *question]
    last = int(ASKED.newest * budget) + len(question)
    kept = choose_tokens(tokens, question, PruningPlan(budget + len(question), SINKS, last, *ASKED[:2]), same_tokens)
    with reader.after(prompt.context) as sequence:
        engine = reader.model.engine
        assert isinstance(engine, RemovesCells), "edge-rt's own engine is"
        engine.remove_cells(sequence, list(spans(sorted({*range(n)}.difference(kept)))))
        return reader.answer(sequence, prompt.question, prompt.limit)


def retrieval(settings: Settings) -> list[Result]:
    """``settings.items`` seeds for each length, or as many as there is time for."""
    methods: dict[str, Method] = {"full": full, **{name: partial(answered, name) for name in METHODS}, "tokens": _by_tokens}
    lengths, seeds = settings.pick(LENGTHS, LENGTHS[:1]), REPORTING[: settings.items or settings.pick(100, 1)]
    with edge_rt.open(models.smollm2(settings, MODEL), context=CONTEXT) as model, Reader(model) as reader:
        rounds = (asked(reader, methods, seed, length, BUDGETS) for seed in seeds for length in lengths)
        scores = in_rounds(rounds, settings.deadline)
    return [result for budget in BUDGETS for result in _tables(scores, budget)]


def _tables(scores: Sequence[Score], budget: float) -> Iterator[Result]:
    kept = f"{budget:.0%} of the cells kept"
    for kind in KINDS:
        yield table(f"{kind}, {kept}", by_method((score for score in scores if score.kind == kind), budget), ASKED.method)
    groups = by_method(scores, budget)
    yield table(f"all retrieval, {kept}", groups, ASKED.method)
    for rival in (*METHODS, "tokens"):
        if rival != ASKED.method:
            yield versus(f"{ASKED.method} pruning, {kept}", groups, ASKED.method, rival)
    yield _left(groups, budget)


def _left(groups: Mapping[str, Groups], budget: float) -> Result:
    """Our share of the whole cache's score."""
    ours, whole = ([value for values in groups[name].values() for value in values] for name in (ASKED.method, "full"))
    share = sum(ours) / sum(whole) if sum(whole) else 0.0
    return Result(
        name=f"what pruning to {budget:.0%} leaves of the score",
        requirement=f"≥ {LEAST[budget]:.0%}",
        unit="score",
        ours=ours,
        peers={"full": whole},
        ok=share >= LEAST[budget],
        shown=f"{share:.1%} of the whole cache's",
        notes=[f"{len(ours)} items"],
    )


# ---- perplexity ------------------------------------------------------------------------------------------------------


def losses(method: str, reader: Reader, prompt: Prompt, budget: int) -> list[float]:
    """Minus the log probabilities of what follows a context whose cache was pruned."""
    with pruned(reader, method, UNASKED, prompt.context, [], budget) as sequence:
        return reader.losses(sequence, prompt.question)


def perplexity(settings: Settings) -> list[Result]:
    """``settings.items`` texts: every method's perplexity, and how much above that of the whole context it is."""
    found: dict[str, dict[Hashable, list[float]]] = {name: {} for name in ("full", *METHODS)}
    with edge_rt.open(models.smollm2(settings, MODEL), context=CONTEXT) as model, Reader(model) as reader:
        for prompt in texts(reader, range(settings.items or settings.pick(20, 2)), settings.pick(BEFORE, 512)):
            if len(found["full"]) >= 2 and time.monotonic() > settings.deadline:
                break
            found["full"][prompt.seed] = full_losses(reader, prompt, 0)
            for name in METHODS:
                found[name][prompt.seed] = losses(name, reader, prompt, int(SHARE * len(prompt.context)))
    return [_above(name, found) for name in METHODS]


def _above(name: str, found: Mapping[str, Groups]) -> Result:
    """A method's perplexity, the geometric mean over the tokens, against the whole cache's."""
    ours, whole = ([math.exp(sum(loss) / len(loss)) for loss in found[method].values()] for method in (name, "full"))
    mean, low, high, items, _ = difference(found[name], found["full"])
    return Result(
        name=f"perplexity, {name}, {SHARE:.0%} of the cells kept",
        requirement=f"≤ {MOST_ABOVE:+.0%}" if name == UNASKED.method else "",
        unit="perplexity",
        ours=ours,
        peers={"full": whole},
        ok=math.expm1(mean) <= MOST_ABOVE if name == UNASKED.method else None,
        shown=f"{math.expm1(mean):+.1%} [{math.expm1(low):+.1%}, {math.expm1(high):+.1%}] above the whole cache's",
        notes=[f"{items} tokens of {len(whole)} texts"],
    )
