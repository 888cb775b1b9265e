"""The sequences a diagnosis looks at: checked, mixed so that every domain has its part, and laid side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from edge_rt.hooks import DataError
from edge_rt_distill.model.rows import Rows, TokenSequence, grouped, rows_of


class Labels(NamedTuple):
    """What a sample is about, for measures by domain and by language. "": not known."""

    domain: str = ""
    language: str = ""


def checked(sequences: Sequence[TokenSequence], vocabulary: int) -> list[TokenSequence]:
    """Those in which at least one prediction counts.

    Raises DataError if there are none, or if one does not fit the model: unequal lists, or tokens outside of the vocabulary.
    """
    kept = []
    for one in sequences:
        if len(one.tokens) != len(one.targets):
            raise DataError(f"sample {one.sample} has {len(one.tokens)} tokens and {len(one.targets)} targets; encode it again")
        wrong = next((token for token in one.tokens if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise DataError(
                f"sample {one.sample} has token {wrong}, and the model's vocabulary ends at {vocabulary - 1}; "
                "encode the samples with the teacher's own tokeniser"
            )
        if any(one.targets[1:]):
            kept.append(one)
    if not kept:
        raise DataError("no sample has a token whose prediction counts; give samples with answers, or longer ones")
    return kept


def mixed(sequences: Sequence[TokenSequence], seed: int, labels: Mapping[str, Labels]) -> list[TokenSequence]:
    """All in an order whose beginnings have something of all: domains in turn, each time in another language, by a seeded hash."""
    queues: dict[Labels, list[tuple[bytes, int]]] = {}
    for number, one in enumerate(sequences):
        key = hashlib.sha256(f"{seed}:{one.sample}:{number}".encode()).digest()
        queues.setdefault(labels.get(one.sample, Labels()), []).append((key, number))
    for queue in queues.values():
        queue.sort(reverse=True)
    turns = _turns(queues)
    order: list[int] = []
    while len(order) < len(sequences):
        order += [queues[label].pop()[1] for label in turns if queues[label]]
    return [sequences[number] for number in order]


def _turns(labels: Iterable[Labels]) -> list[Labels]:
    """All domains once, in languages that alternate, then all once more in the next language, until all labels have been named."""
    domains: dict[str, list[Labels]] = {}
    for label in sorted(labels):
        domains.setdefault(label.domain, []).append(label)
    return [
        row[(place + turn) % len(row)]
        for turn in range(max(map(len, domains.values()), default=0)) for place, row in enumerate(domains.values()) if turn < len(row)
    ]  # fmt: skip


def in_rows(sequences: Sequence[TokenSequence], batch_tokens: int, square: int = 0) -> Iterator[Rows]:
    """All sequences, long ones first, in batches: see ``model.rows.grouped``."""
    lengths = [len(one.tokens) for one in sequences]
    order = sorted(range(len(sequences)), key=lambda number: (-lengths[number], number))
    return (rows_of(sequences, numbers) for numbers in grouped(lengths, batch_tokens, order, square))
