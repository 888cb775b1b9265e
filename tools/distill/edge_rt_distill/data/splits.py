"""A training and an evaluation set without anything in common, and the proof of it.

Which side a sample falls on is a hash of its content and the seed: adding samples moves no other one, unless it ties them together.
Tied samples fall on one side: near-duplicates (dedupe.py), those with the same question, and those that share a run of 13 units.
Runs of 13 are what GPT-3's authors looked for between training and test data (Brown et al. 2020, arXiv 2005.14165, appendix C),
there words without case and punctuation; here also Chinese characters. ``leaks`` looks for them in any two sets.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from edge_rt.hooks import DataError
from edge_rt_distill.data.dedupe import near_pairs, shingles
from edge_rt_distill.data.samples import Sample
from edge_rt_distill.data.text import units

GRAM = 13
COMMON = 10
"""A run in more samples than this is a turn of phrase or a form letter: it ties no samples together. ``leaks`` tells it all the same."""


class Leak(NamedTuple):
    """The evaluation sample ``evaluation`` has ``shared`` of its ``total`` runs also in training, the first in the sample ``train``."""

    evaluation: str
    train: str
    shared: int
    total: int
    text: str
    """The first shared run, for a person to judge."""

    @property
    def share(self) -> float:
        return self.shared / self.total


def grams(sample: Sample, size: int = GRAM) -> list[tuple[str, ...]]:
    """The runs of ``size`` units of what was said, each message by itself; a shorter sample is one run."""
    parts = [sample.text] if sample.text else [message.content for message in sample.messages if message.role != "system"]
    listed = [units(part) for part in parts]
    found = [tuple(part[at : at + size]) for part in listed for at in range(len(part) - size + 1)]
    if found:
        return found
    whole = tuple(unit for part in listed for unit in part)
    return [whole] if whole else []


def split(samples: Sequence[Sample], *, held_out: float = 0.1, seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """(train, evaluation): about ``held_out`` of the samples to evaluate on, with ``split`` set in each, in the order given.

    What is marked ``evaluation`` goes there with all that is tied to it. Raises ``DataError`` where one side would stay empty.
    """
    if not 0 < held_out < 1:
        raise DataError(f"held_out is {held_out}; choose a share between 0 and 1, such as 0.1")
    groups = tied(samples)
    if len(groups) < 2:
        raise DataError(f"{len(samples)} samples that all repeat one another cannot be split; add samples that differ")
    marked = [any(samples[index].split == "evaluation" for index in group) for group in groups]
    places = [_place(min(samples[index].id for index in group), seed) for group in groups]
    held = [mark or place < held_out for mark, place in zip(marked, places, strict=True)]
    if not any(held):  # a small set: the group nearest to the line goes over
        held[min(range(len(groups)), key=lambda index: places[index])] = True
    if all(held):
        free = [index for index in range(len(groups)) if not marked[index]]
        if not free:
            raise DataError("all samples are marked or tied to the evaluation set, and none is left to train on; add samples for training")
        held[max(free, key=lambda index: places[index])] = False
    side = {index: held[number] for number, group in enumerate(groups) for index in group}
    train = [sample._replace(split="train") for index, sample in enumerate(samples) if not side[index]]
    return train, [sample._replace(split="evaluation") for index, sample in enumerate(samples) if side[index]]


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) that only key and seed determine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:7], "big") / (1 << 56)


def tied(samples: Sequence[Sample]) -> list[list[int]]:
    """The indices of ``samples`` in groups that must stay together, in the order of their first members."""
    parent = list(range(len(samples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for first, second in _ties(samples):
        one, other = sorted((root(first), root(second)))
        parent[other] = one
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(samples)):
        groups[root(index)].append(index)
    return list(groups.values())


def _ties(samples: Sequence[Sample]) -> Iterable[tuple[int, int]]:
    for first, second, _ in near_pairs([shingles(sample.content) for sample in samples]):
        yield first, second
    same: dict[str, list[int]] = defaultdict(list)
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        same[sample.id].append(index)
        if sample.prompt:
            same[" ".join(unit for message in sample.prompt if message.role == "user" for unit in units(message.content))].append(index)
        for gram in set(grams(sample)):
            holders[gram].append(index)
    for members in (*same.values(), *(members for members in holders.values() if len(members) <= COMMON)):
        for member in members[1:]:
            yield members[0], member


def leaks(train: Sequence[Sample], evaluation: Sequence[Sample], size: int = GRAM) -> list[Leak]:
    """The samples of ``evaluation`` that share a run of ``size`` units with ``train``, the largest share first."""
    holder: dict[tuple[str, ...], str] = {}
    for sample in train:
        for gram in grams(sample, size):
            holder.setdefault(gram, sample.id)
    found = []
    for sample in evaluation:
        own = list(dict.fromkeys(grams(sample, size)))
        shared = [gram for gram in own if gram in holder]
        if shared:
            found.append(Leak(sample.id, holder[shared[0]], len(shared), len(own), " ".join(shared[0])))
    return sorted(found, key=lambda leak: (-leak.share, leak.evaluation))
