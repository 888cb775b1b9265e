"""The same measures by domain and by language: which layers and heads matter more for one than for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edge_rt_distill.diagnose.parts import Array, Part
from edge_rt_distill.diagnose.rows import Labels
from edge_rt_distill.model.rows import TokenSequence


class Group(NamedTuple):
    """Sequences of one ``domain`` or ``language`` (``kind``). ``loss``: nats a token. ``removal``: sequences on which layers were left out.

    ``heads`` [L, H], ``layer_kl`` [L] (nats a token; None where ``removal`` is 0): as for all sequences, of these alone.
    """

    kind: str
    name: str
    sequences: int
    predictions: int
    removal: int
    loss: float
    heads: Array
    layer_kl: Array | None


def by_label(sequences: Sequence[TokenSequence], labels: Mapping[str, Labels], gradients: Part, removal: Part, depth: int) -> list[Group]:
    """Groups of all domains and languages that have a name, if there are two or more of that kind."""
    predictions = np.array([sum(map(bool, one.targets[1:])) for one in sequences], np.float64)
    sums, counts = removal.arrays["removal_sums"][:depth], removal.arrays["removal_counts"]
    found: list[Group] = []
    for place, kind in enumerate(Labels._fields):
        of = [labels.get(one.sample, Labels())[place] for one in sequences]
        names = sorted(set(of) - {""})
        for name in names if len(names) > 1 else []:
            among = np.array([one == name for one in of])
            seen = among & (counts > 0)
            found.append(Group(
                kind, name, int(among.sum()), int(predictions[among].sum()), int(seen.sum()),
                float(gradients.arrays["loss"][among].sum() / predictions[among].sum()),
                gradients.arrays["heads_by_sequence"][among].mean(0),
                (sums[:, seen].sum(1) / counts[seen].sum()).astype(np.float32) if seen.any() else None,
            ))  # fmt: skip
    return found


def lift(own: Array, whole: Array) -> Array:
    """By how much a part's share of a group's total is larger than its share of the whole's; 1: the same. 0 where nothing is."""
    share, usual = own / max(float(own.sum()), 1e-30), whole / max(float(whole.sum()), 1e-30)
    return np.divide(share, usual, out=np.zeros_like(share), where=usual > 0)
