"""The sequences a diagnosis looks at: checked, mixed so that every domain has its part, and laid side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from edge_rt.hooks import DataError


class Sequenced(Protocol):
    """A tokenised sample, as data/batches.py makes them. ``targets[t]``: the prediction of token t, from those before it, counts."""

    @property
    def tokens(self) -> Sequence[int]:
        """Token ids."""

    @property
    def targets(self) -> Sequence[bool]:
        """As many as tokens."""

    @property
    def sample(self) -> str:
        """The id of the sample it was made of."""


class Labels(NamedTuple):
    """What a sample is about, for measures by domain and by language. "": not known."""

    domain: str = ""
    language: str = ""


class Rows(NamedTuple):
    """Sequences side by side, padded on the right with token 0, which causal attention never sees.

    ``tokens`` [B, T] int64; ``mask`` [B, T] float, 1 where the prediction of the NEXT token counts; ``lengths`` [B];
    ``numbers``: the number of each sequence in the list they were taken from.
    """

    tokens: Tensor
    mask: Tensor
    lengths: Tensor
    numbers: tuple[int, ...]

    @property
    def real(self) -> Tensor:
        """[B, T] bool: no padding."""
        return torch.arange(self.tokens.shape[1], device=self.lengths.device) < self.lengths[:, None]


def checked(sequences: Sequence[Sequenced], vocabulary: int) -> list[Sequenced]:
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


def mixed(sequences: Sequence[Sequenced], seed: int, labels: Mapping[str, Labels]) -> list[Sequenced]:
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


def beginning(sequences: Sequence[Sequenced], tokens: int) -> list[Sequenced]:
    """The first that have ``tokens`` tokens together at most; at least one."""
    used = 0
    for count, one in enumerate(sequences):
        used += len(one.tokens)
        if count and used > tokens:
            return list(sequences[:count])
    return list(sequences)


def in_rows(sequences: Sequence[Sequenced], batch_tokens: int, square: int = 0) -> Iterator[Rows]:
    """All sequences, long ones first, so many at once that B * T <= ``batch_tokens`` (at least one).

    ``square``: if given, B * T * T <= ``square`` too, which bounds what attention maps take.
    """
    order = sorted(range(len(sequences)), key=lambda number: (-len(sequences[number].tokens), number))
    start = 0
    while start < len(order):
        longest = len(sequences[order[start]].tokens)
        count = max(1, batch_tokens // longest)
        if square:
            count = max(1, min(count, square // longest**2))
        yield side_by_side(sequences, order[start : start + count])
        start += count


def side_by_side(sequences: Sequence[Sequenced], index: Sequence[int]) -> Rows:
    """Some of the sequences as one batch."""
    lengths = [len(sequences[number].tokens) for number in index]
    tokens = torch.zeros(len(index), max(lengths), dtype=torch.long)
    mask = torch.zeros(len(index), max(lengths))
    for row, number in enumerate(index):
        one = sequences[number]
        tokens[row, : lengths[row]] = torch.tensor(one.tokens)
        mask[row, : lengths[row] - 1] = torch.tensor(one.targets[1:], dtype=torch.float32)
    return Rows(tokens, mask, torch.tensor(lengths), tuple(index))
