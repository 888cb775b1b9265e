"""Near-duplicates: texts that share most of their shingles, in Latin script and Chinese alike.

Shingles are runs of three units (data/text.py), so words or characters. Candidates come from MinHash signatures (Broder 1997, "On the
resemblance and containment of documents") cut into bands (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3), as
Lee et al. 2021 (arXiv 2107.06499) clean training data; each candidate is then decided by the exact Jaccard similarity of the sets.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_rt_distill.data.samples import Sample
from edge_rt_distill.data.text import units

SHINGLE = 3
NEAR = 0.6
"""Jaccard similarity from which two texts count as the same. One changed word of 20 leaves .7 of the shingles of three words."""
BANDS, ROWS = 32, 4
"""A pair of similarity s becomes a candidate with probability 1 - (1 - s^4)^32: .988 at .6, 1 - 2e-4 at .7."""


class Duplicate(NamedTuple):
    """``dropped`` says the same as ``kept`` (ids); ``similarity`` 1 means equal but for case, width and punctuation."""

    dropped: str
    kept: str
    similarity: float


class Deduplicated(NamedTuple):
    samples: list[Sample]
    exact: list[Duplicate]
    near: list[Duplicate]

    def __str__(self) -> str:
        return f"{len(self.samples)} samples kept, {len(self.exact)} exact and {len(self.near)} near duplicates dropped"


def shingles(text: str) -> frozenset[int]:
    """The hashed shingles of ``text``; a text of fewer than three units is one shingle."""
    found = units(text)
    runs = (" ".join(found[at : at + SHINGLE]) for at in range(max(1, len(found) - SHINGLE + 1)))
    return frozenset(zlib.crc32(run.encode()) for run in runs)


def similarity(first: frozenset[int], second: frozenset[int]) -> float:
    """Jaccard: the share of all shingles of both that both have, 0 to 1."""
    return len(first & second) / len(first | second) if first or second else 1.0


def near_pairs(sets: Sequence[frozenset[int]], near: float = NEAR) -> list[tuple[int, int, float]]:
    """(i, j, similarity) for the pairs i < j of ``sets`` that are at least ``near`` alike, found by MinHash and then measured."""
    buckets: dict[bytes, list[int]] = defaultdict(list)
    for index, signature in enumerate(_signatures(sets)):
        for band in range(BANDS):
            buckets[bytes([band]) + signature[band * ROWS : (band + 1) * ROWS].tobytes()].append(index)
    candidates = {pair for members in buckets.values() if len(members) > 1 for pair in _pairs(members)}
    measured = ((first, second, similarity(sets[first], sets[second])) for first, second in sorted(candidates))
    return [pair for pair in measured if pair[2] >= near]


_CROWD = 50


def _pairs(members: Sequence[int]) -> Iterable[tuple[int, int]]:
    """All pairs of a bucket; of a crowded one each with its first few only, which ties a crowd of copies together all the same."""
    firsts = members if len(members) <= _CROWD else members[:3]
    return ((first, second) for at, first in enumerate(firsts) for second in members[at + 1 :])


def _signatures(sets: Sequence[frozenset[int]]) -> list[npt.NDArray[np.uint32]]:
    """[BANDS x ROWS] smallest hashes of each set, under as many multiply-shift hash functions (Dietzfelbinger et al. 1997)."""
    seed = np.frombuffer(hashlib.shake_128(b"edge-rt-distill minhash 1").digest(16 * BANDS * ROWS), dtype="<u8").astype(np.uint64)
    factors, terms = seed[::2] | np.uint64(1), seed[1::2]  # odd factors; uint64 wraps around, as the method has it
    found = []
    for items in sets:
        values = np.fromiter(items, dtype=np.uint64, count=len(items))
        least = np.full(len(factors), 0xFFFFFFFF, dtype=np.uint32)
        for start in range(0, len(values), 4096):  # bounds the matrix for a text of millions of words
            hashed = (values[start : start + 4096, None] * factors + terms) >> np.uint64(32)
            least = np.minimum(least, hashed.min(axis=0).astype(np.uint32))
        found.append(least)
    return found


def deduplicate(samples: Sequence[Sample], near: float = NEAR) -> Deduplicated:
    """``samples`` without those that say what an earlier one says, in their order.

    Exact: the same units in the same order, so equal but for case, width, spaces and punctuation. Near: at least ``near`` alike.
    """
    first_of: dict[str, int] = {}
    exact: list[Duplicate] = []
    rest: list[Sample] = []
    for sample in samples:
        key = hashlib.sha256("\n".join(units(sample.content)).encode()).hexdigest() if units(sample.content) else sample.id
        if key in first_of:
            exact.append(Duplicate(sample.id, rest[first_of[key]].id, 1.0))
        else:
            first_of[key] = len(rest)
            rest.append(sample)
    dropped: dict[int, Duplicate] = {}
    for first, second, alike in near_pairs([shingles(sample.content) for sample in rest], near):
        if first not in dropped and second not in dropped:
            dropped[second] = Duplicate(rest[second].id, rest[first].id, alike)
    return Deduplicated([sample for index, sample in enumerate(rest) if index not in dropped], exact, list(dropped.values()))
