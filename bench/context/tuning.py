"""Chooses the weights of the content grader: ``python -m bench.context.tuning``. Nothing is written, the weights are printed.

What is maximised needs no model: the share of wanted answers whose paragraph is kept whole at the budgets of ``retrieval``, over texts
of half of the tuning seeds; the other half judges. A coordinate search multiplies one weight at a time by each of ``STEPS`` and keeps
what is better by ``LEAST``, until a round over all features changes nothing. Every weight stays within ``WIDEST`` times its default and
keeps its sign, and length (``FIXED``) is worth what it was: texts of one kind must not teach the grader that names are worth nothing,
or that who talks longest says most. What it finds is adopted only if the labelled pairs of tests/unit/test_grading.py agree.

Tried and left out: ``WIDEST`` 4 kept 1.5 % more of the answers in the half that judges and graded one or two pairs wrong; with ``words``
free it quadrupled that weight, and facts left conversations before small talk did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.context.prompt import NEWEST
from bench.context.retrieval import BUDGETS, LENGTHS
from bench.context.score import holds
from bench.context.tasks import KINDS, TUNING, tasks
from edge_rt.core.context.grading import Features, grade, load_weights
from edge_rt.core.context.history import segments

STEPS = (0.5, 0.8, 1.25, 2.0)
WIDEST = 3.0
LEAST = 0.005
FIXED = ("words",)
_SEEDS = 40  # of each half


class Text(NamedTuple):
    """``points`` [segments, features] that a weight of 1 adds; ``sizes`` [segments] in tokens; the segments that hold each answer."""

    points: Any
    sizes: Any
    answers: tuple[tuple[int, ...], ...]


def texts(seeds: Sequence[int], count: Callable[[str], int]) -> Iterator[Text]:
    """The texts of some seeds at every length. ``words`` is left out, as its answer stands in many places."""
    ones = {name: weight._replace(points=1.0) for name, weight in load_weights().items()}
    place = {name: i for i, name in enumerate(Features._fields)}
    for seed in seeds:
        for length in LENGTHS:
            asked: dict[str, list[str]] = {}
            for task in tasks(seed, length, count, [kind for kind in KINDS if kind != "words"]):
                asked.setdefault(task.context, []).extend(task.answers)
            for context, answers in asked.items():
                found = segments([{"role": "user", "content": context}])
                points = np.zeros((len(found), len(place)))
                for i, segment in enumerate(found):
                    for part in grade(segment, ones).contributions:
                        points[i, place[part.feature]] = part.points
                where = tuple(tuple(i for i, one in enumerate(found) if holds(one.text, answer)) for answer in answers)
                yield Text(points, np.array([count(one.text) for one in found]), where)


def share_kept(found: Sequence[Text], weights: Any) -> float:
    """The share of the answers that stand in a paragraph kept whole, mean over the budgets. ``weights`` [features]."""
    kept = [
        float(any(stays[i] for i in answer))
        for budget in BUDGETS
        for text in found
        for stays in [_stays(text, weights, budget)]
        for answer in text.answers
    ]
    return sum(kept) / len(kept)


def _stays(text: Text, weights: Any, budget: float) -> Any:
    """Which segments are kept whole [segments]: the best graded, of equals the newest, in what the newest part leaves of the budget."""
    room = (1 - NEWEST) * budget * text.sizes.sum()
    sums = np.maximum(0.0, text.points @ weights)
    order = np.lexsort((-np.arange(len(sums)), -sums))
    stays = np.zeros(len(sums), dtype=bool)
    stays[order[np.cumsum(text.sizes[order]) <= room]] = True
    return stays


def search(found: Sequence[Text], start: Any) -> Any:
    """Weights that keep more of the answers than ``start`` [features]; the same for the same texts."""
    best, score, changed = start.copy(), share_kept(found, start), True
    while changed:
        changed = False
        for i in (i for i, name in enumerate(Features._fields) if name not in FIXED):
            for step in STEPS:
                tried = best.copy()
                tried[i] *= step
                if abs(tried[i]) > WIDEST * abs(start[i]) or abs(tried[i]) * WIDEST < abs(start[i]):
                    continue
                share = share_kept(found, tried)
                if share >= score + LEAST:
                    best, score, changed = tried, share, True
    return best


def main() -> None:
    """Print the search's weights, and what both halves of the tuning seeds say of them."""
    from edge_rt import model_hub
    from edge_rt.native.llama import Vocab

    vocab = Vocab.load(model_hub.fetch_model(model_hub.DEFAULT))
    try:
        halves = [
            list(texts(seeds, lambda text: len(vocab.tokenize(text, bos=False))))
            for seeds in (TUNING[100 : 100 + _SEEDS], TUNING[100 + _SEEDS : 100 + 2 * _SEEDS])
        ]
    finally:
        vocab.close()
    start = np.array([load_weights()[name].points for name in Features._fields])
    found = search(halves[0], start)
    for name, half in zip(("searched on", "held out"), halves, strict=True):
        print(f"{name}: {share_kept(half, start):.3f} before, {share_kept(half, found):.3f} with these weights")
    for name, weight in zip(Features._fields, found, strict=True):
        print(f"{name} = {weight:.3g}")


if __name__ == "__main__":
    main()
