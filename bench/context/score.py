"""Scores of answers, and how sure they are: bootstrap intervals over contexts, and differences of pairs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

ROUNDS = 2000
"""Resamples of a bootstrap."""

Groups = Mapping[Hashable, Sequence[float]]
"""Scores by seed and length. The items of a group share texts, so they are drawn together: groups are what is independent."""
FEWEST = 5
"""Groups without which an interval says nothing."""


def share_found(answer: str, wanted: Sequence[str]) -> float:
    """The share of the wanted texts that an answer holds. Raises ValueError if none is wanted."""
    if not wanted:
        raise ValueError("there is no score where no answer is wanted")
    return sum(holds(answer, text) for text in wanted) / len(wanted)


def any_found(answer: str, accepted: Sequence[str]) -> float:
    """1 if an answer holds one of the accepted texts, else 0."""
    return float(any(holds(answer, text) for text in accepted))


def holds(answer: str, text: str) -> bool:
    """Does an answer hold a text? Letter case and full width do not matter; a number or a Latin word must stand by itself."""
    pattern = re.escape(_plain(text))
    if text[0].isascii():
        pattern = rf"(?<![a-z0-9]){pattern}"
    if text[-1].isascii():
        pattern = rf"{pattern}(?![a-z0-9])"
    return re.search(pattern, _plain(answer)) is not None


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


class Interval(NamedTuple):
    """A mean with the bounds between which it lies in 95 % of the resamples. ``items`` and ``groups`` it is of."""

    mean: float
    low: float
    high: float
    items: int
    groups: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interval(groups: Groups) -> Interval:
    """Mean over all items, and its interval by drawing groups with replacement (Efron's percentile bootstrap, by cluster).

    Always the same for the same scores. A single group has no spread to show: the bounds are the mean. Raises ValueError for no scores.
    """
    sums = np.array([sum(scores) for scores in groups.values()], dtype=float)
    counts = np.array([len(scores) for scores in groups.values()], dtype=float)
    if counts.sum() == 0:
        raise ValueError("there is no mean of nothing")
    drawn = np.random.default_rng(0).integers(0, len(sums), (ROUNDS, len(sums)))
    means = sums[drawn].sum(axis=1) / np.maximum(counts[drawn].sum(axis=1), 1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high), int(counts.sum()), len(counts))


def difference(ours: Groups, theirs: Groups) -> Interval:
    """The mean of ours minus theirs, item by item, with its interval. Raises ValueError unless both have the same items."""
    if list(ours) != list(theirs):
        raise ValueError("these scores are of other items: they cannot be compared in pairs")
    return interval({group: [a - b for a, b in zip(ours[group], theirs[group], strict=True)] for group in ours})
