"""What a run learns from, and is tested on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from torch import Tensor

from edge_rt.hooks import DataError
from edge_rt_distill.behaviour.examples import Example, Pair
from edge_rt_distill.losses.attention import HeadMatch
from edge_rt_distill.losses.hidden import DEPTHS
from edge_rt_distill.model.rows import Rows, fill
from edge_rt_distill.stages.levels import Level

T = TypeVar("T")


class Answers(NamedTuple):
    """How the student's own answers are drawn. ``tokens``: of an answer at most. ``end``: the token that ends one, None if none does."""

    tokens: int = 100
    temperature: float = 1.0
    end: int | None = None


DEFAULT_ANSWERS = Answers()


@dataclass(frozen=True)
class Material:
    """Training data, and held-out data that shares nothing with it.

    ``epoch``: (number, start) -> its batches from number ``start`` on, the same whenever it is asked (``data.batches.batches``).
    ``held_out``: batches of a corpus. ``examples``, ``held_out_examples``, ``pairs``, ``prompts``: for level 4. ``beside``: how many of
    each a batch takes. ``prior``: log of the unigram distribution [V]. ``depths``: where hidden states are compared. ``heads``: maps
    that are compared, with the importance of each student's head in ``head_importance`` (layer of the student -> [H]).
    ``seed``: of what is drawn here.
    """

    epoch: Callable[[int, int], Iterator[Rows]]
    held_out: Sequence[Rows]
    examples: Sequence[Example] = ()
    held_out_examples: Sequence[Example] = ()
    pairs: Sequence[Pair] = ()
    prompts: Sequence[Sequence[int]] = ()
    answers: Answers = DEFAULT_ANSWERS
    beside: int = 4
    prior: Tensor | None = None
    depths: Sequence[float] = DEPTHS
    heads: Sequence[HeadMatch] = ()
    head_importance: dict[int, Tensor] = field(default_factory=dict)
    seed: int = 0

    def turn(self, items: Sequence[T], number: int) -> list[T]:
        """The ``number``-th handful of some items: all are taken once before any is taken again, in an order that changes each time."""
        count, found = min(self.beside, len(items)), list[T]()
        for place in range(number * count, (number + 1) * count):
            order = list(range(len(items)))
            random.Random(f"turn {self.seed} {place // len(items)}").shuffle(order)
            found.append(items[order[place % len(items)]])
        return found


def check_material(material: Material, levels: Sequence[Level]) -> None:
    """Raises DataError if levels need what is not there."""
    for rows in material.held_out:
        if not bool(rows.mask.any()):
            raise DataError("a held-out batch has no position that counts; leave out samples without an answer")
    if not material.held_out:
        raise DataError("there is no held-out data, and no level can be judged without; add samples, or hold more of them out")
    wanted = {term for level in levels for term, weight in level.terms.items() if weight}
    if any(level.name == "behaviour" for level in levels) and not material.held_out_examples:
        raise DataError("the level behaviour is judged on held-out examples, and there are none; record more rollouts, or leave it out")
    for term, there in (("imitation", material.examples), ("preference", material.pairs), ("on_policy", material.prompts)):
        if term in wanted and not there:
            raise DataError(f"the loss {term} has nothing to learn from; set its weight to 0, or record rollouts that give it something")


def rows_of_examples(examples: Sequence[Example]) -> Rows:
    """Examples as rows; the mask is their weights."""
    weights = [[weight if target else 0.0 for target, weight in zip(one.targets, one.weights, strict=True)] for one in examples]
    return fill([one.tokens for one in examples], weights)
