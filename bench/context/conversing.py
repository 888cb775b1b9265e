"""A fact at the head of a conversation five times longer than the window, asked for at the end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import edge_rt
from bench import models
from bench.context.conversations import TONGUES, conversation
from bench.context.methods import METHODS, UNBOUNDED
from bench.context.prompt import of_conversation
from bench.context.reader import Reader
from bench.context.retrieval import CONTEXT, MODEL
from bench.context.runner import Item, Score, by_method, in_rounds, table, versus
from bench.context.score import any_found
from bench.results import Result, Settings

WINDOW, TIMES = 256, 5
_LIMIT = 12  # tokens of an answer
_OURS, _RIVALS = "graded", ("newest", "random")


def run(settings: Settings) -> list[Result]:
    """Fifty conversations, or ``settings.items``, in English, Chinese and mixed in turn."""
    with edge_rt.open(models.smollm2(settings, MODEL), context=CONTEXT) as model, Reader(model) as reader:
        scores = in_rounds((_round(reader, seed) for seed in range(settings.items or settings.pick(51, 3))), settings.deadline)
    groups = by_method(scores, 1 / TIMES)
    by_tongue = [table(f"conversations, {t}", by_method((s for s in scores if s.kind == t), 1 / TIMES), _OURS) for t in TONGUES]
    compared = [versus(f"conversations, grading against {rival}", groups, _OURS, rival) for rival in _RIVALS]
    return [*by_tongue, table("conversations, all", groups, _OURS), *compared]


def _round(reader: Reader, seed: int) -> Iterator[Score]:
    """One conversation with every method. The window holds the question and the answer too."""
    tongue = TONGUES[seed % len(TONGUES)]
    one = conversation(seed, tongue, TIMES * WINDOW, reader.count)
    prompt = of_conversation(reader, one, _LIMIT)
    item = Item(tongue, TIMES * WINDOW, prompt, partial(any_found, accepted=one.accepted))
    budget = WINDOW - len(prompt.question) - _LIMIT
    for name, method in METHODS.items():
        answer = method(reader, prompt, budget)
        yield Score(name, 1.0 if name in UNBOUNDED else 1 / TIMES, tongue, item.length, seed, item.judge(answer), answer)
