"""Ways to answer a question with less than the whole context. A ``Method`` is all that the benchmarks know of one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

from bench.context.prompt import Prompt, Rank, kept
from bench.context.reader import Reader
from edge_rt.core.context.grading import content_grader

Method = Callable[[Reader, Prompt, int], str]
"""Answers a prompt's question; its context may take up to so many tokens of the cache."""
Losses = Callable[[Reader, Prompt, int], list[float]]
"""Minus the log probability of each token of a prompt's question but the first, likewise."""


def full(reader: Reader, prompt: Prompt, _budget: int) -> str:
    """The whole context, whatever the budget: what the model can do."""
    return _answer(reader, prompt, prompt.context)


def blind(reader: Reader, prompt: Prompt, _budget: int) -> str:
    """No context but the head: what can be guessed."""
    return _answer(reader, prompt, prompt.head)


def ranked(rank: Rank, reader: Reader, prompt: Prompt, budget: int) -> str:
    """What ``kept`` keeps by a rank, read as if the rest had never been there."""
    return _answer(reader, prompt, kept(prompt, budget, rank))


def _answer(reader: Reader, prompt: Prompt, context: Sequence[int]) -> str:
    with reader.after(context) as sequence:
        return reader.answer(sequence, prompt.question, prompt.limit)


def full_losses(reader: Reader, prompt: Prompt, _budget: int) -> list[float]:
    """After the whole context, whatever the budget."""
    return _losses(reader, prompt, prompt.context)


def ranked_losses(rank: Rank, reader: Reader, prompt: Prompt, budget: int) -> list[float]:
    """After what ``kept`` keeps by a rank."""
    return _losses(reader, prompt, kept(prompt, budget, rank))


def _losses(reader: Reader, prompt: Prompt, context: Sequence[int]) -> list[float]:
    with reader.after(context) as sequence:
        return reader.losses(sequence, prompt.question)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def by_place(prompt: Prompt) -> Sequence[float]:
    """The newest stays longest: a sliding window."""
    return range(len(prompt.parts))


def by_chance(prompt: Prompt) -> Sequence[float]:
    """In random order, the same for all questions about a text."""
    rng = random.Random(f"by_chance {prompt.seed}")
    return [rng.random() for _ in prompt.parts]


def by_grade(prompt: Prompt) -> Sequence[float]:
    """By the content grader with its default weights; of equals, the newest stays."""
    grade = _grader()
    return [grade(segment).score + 1e-9 * i for i, segment in enumerate(prompt.segments)]


_grader = lru_cache(maxsize=1)(content_grader)

RANKS: Mapping[str, Rank] = {"newest": by_place, "random": by_chance, "graded": by_grade}
METHODS: Mapping[str, Method] = {"full": full, "blind": blind, **{name: partial(ranked, rank) for name, rank in RANKS.items()}}
LOSSES: Mapping[str, Losses] = {"full": full_losses, **{name: partial(ranked_losses, rank) for name, rank in RANKS.items()}}
UNBOUNDED = ("full", "blind")
"""Methods that take no notice of the budget."""
