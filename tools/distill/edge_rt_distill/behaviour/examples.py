"""What level 4 learns from, as plain data: weighted imitation examples and preference pairs; their losses are elsewhere.

Positions follow the rule of ``data.batches.Sequence``: ``targets[t]`` says that the prediction of token t, made at t - 1, counts.
So ``targets[0]`` is always False. ``weights[t]`` is the weight of that prediction in the loss, 0 where it does not count.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from edge_rt.hooks import DataError


class Example(NamedTuple):
    """One answer to imitate. The three lists have one entry per token, prompt and answer together."""

    tokens: list[int]
    targets: list[bool]
    weights: list[float]
    sample: str = ""
    """The id of the sample whose prompt this answers, for provenance."""
    reward: float = 1.0
    """What the answer got, 0 to 1."""


class Pair(NamedTuple):
    """Two answers to the same prompt, the first better than the second by ``margin`` of reward."""

    chosen: Example
    rejected: Example
    margin: float = 0.0


def example(
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    weight: float = 1.0,
    heavy: Collection[int] = (),
    heavier: float = 2.0,
    sample: str = "",
    reward: float = 1.0,
) -> Example:
    """An example of ``prompt`` followed by ``answer`` in which each answer token weighs ``weight``, those of ``heavy`` times ``heavier``.

    ``heavy``: token ids (the end of the turn, and what format consists of). Raises ``DataError`` for an empty prompt or answer: the
    first token of a sequence is predicted from nothing.
    """
    if not prompt or not answer:
        raise DataError(f"sample {sample or '(unnamed)'} has an empty prompt or answer; leave it out")
    if not (math.isfinite(weight) and weight >= 0 and math.isfinite(heavier) and heavier >= 0):
        raise DataError(f"weights of an example are finite and not negative, not {weight} and {heavier}; check the reward")
    marked = frozenset(heavy)
    weights = [0.0] * len(prompt) + [weight * (heavier if token in marked else 1.0) for token in answer]
    return Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), weights, sample, reward)


def check(item: Example) -> None:
    """Raises ``DataError`` if the lists of ``item`` do not belong together."""
    if not len(item.tokens) == len(item.targets) == len(item.weights):
        raise DataError(f"sample {item.sample}: tokens, targets and weights have different lengths; make its examples again")
    if not item.tokens or item.targets[0] or not any(item.targets):
        raise DataError(f"sample {item.sample}: an example needs a prompt token and at least one target after it; make its examples again")
    if not all(math.isfinite(weight) and weight >= 0 for weight in item.weights):
        raise DataError(f"sample {item.sample}: a weight is negative or not finite; check the reward")
