"""Asks every method every question, and gathers the scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from bench.context.methods import UNBOUNDED, Method
from bench.context.prompt import Prompt
from bench.context.reader import Reader
from bench.context.score import FEWEST, Groups, Interval, difference, interval
from bench.results import Result


class Item(NamedTuple):
    """A question. ``length``: tokens of the whole. ``judge`` scores an answer, 0 to 1."""

    kind: str
    length: int
    prompt: Prompt
    judge: Callable[[str], float]


class Score(NamedTuple):
    """What a method made of an item. ``budget``: the share of the context that it kept, 1 where it takes no notice."""

    method: str
    budget: float
    kind: str
    length: int
    seed: int
    value: float
    answer: str


def evaluate(reader: Reader, items: Iterable[Item], methods: Mapping[str, Method], budgets: Sequence[float]) -> Iterator[Score]:
    """Scores of every item with every method and budget. Items of one text must follow each other: then each method reads it once."""
    for _, group in groupby(items, key=lambda item: item.prompt.context):
        asked = list(group)
        for name, method in methods.items():
            for share in (1.0,) if name in UNBOUNDED else budgets:
                for item in asked:
                    answer = method(reader, item.prompt, int(share * len(item.prompt.context)))
                    yield Score(name, share, item.kind, item.length, item.prompt.seed, item.judge(answer), answer)


def in_rounds(rounds: Iterable[Iterable[Score]], deadline: float) -> list[Score]:
    """The scores of rounds, of which none begins after the deadline (``time.monotonic``) except the first two."""
    found: list[Score] = []
    for number, scores in enumerate(rounds):
        if number >= 2 and time.monotonic() > deadline:
            break
        found += scores
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------


def by_method(scores: Iterable[Score], budget: float) -> dict[str, dict[Hashable, list[float]]]:
    """Method -> length and seed -> scores, of those with a budget and those without."""
    found: dict[str, dict[Hashable, list[float]]] = {}
    for score in scores:
        if score.budget == budget or score.method in UNBOUNDED:
            found.setdefault(score.method, {}).setdefault((score.length, score.seed), []).append(score.value)
    return found


def table(name: str, groups: Mapping[str, Groups], ours: str) -> Result:
    """All methods' scores on the same items with their intervals."""
    shown = ", ".join(f"{method} {interval(found)}" for method, found in groups.items())
    flat = {method: [value for values in found.values() for value in values] for method, found in groups.items()}
    count = f"{len(flat[ours])} items of {len(groups[ours])} seeds and lengths"
    return Result(name, "", "score", flat.pop(ours), flat, shown=shown, notes=[count])


def versus(name: str, groups: Mapping[str, Groups], ours: str, theirs: str) -> Result:
    """Whether one method is better than another, in pairs."""
    found = difference(groups[ours], groups[theirs])
    values = [value for values in groups[ours].values() for value in values]
    return Result(name, "", "score", values, shown=f"{ours} - {theirs}: {_signed(found)}, {verdict(found)}")


def verdict(found: Interval) -> str:
    """What a difference shows: an interval that holds 0 shows nothing, nor does one of few groups."""
    if found.groups < FEWEST:
        return "too few to tell"
    return "better" if found.low > 0 else "worse" if found.high < 0 else "no difference shown"


def _signed(found: Interval) -> str:
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
