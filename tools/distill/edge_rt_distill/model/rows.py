"""Sequences of tokens side by side: what models are given, in every stage.

Rows are filled up at their right end with token 0, which causal attention never sees. What counts is told by position, never by id: in
some vocabularies the end of a turn and the filling are the same token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_rt.hooks import DataError

T = TypeVar("T")


class TokenSequence(NamedTuple):
    """A sample, or a piece of one, as tokens. ``targets[t]``: the prediction of token t, made at t - 1, counts. ``sample``: its id."""

    tokens: list[int]
    targets: list[bool]
    sample: str = ""


def count_tokens(one: TokenSequence) -> int:
    """Tokens of a sequence."""
    return len(one.tokens)


class Rows(NamedTuple):
    """``tokens`` [B, T] int64; ``mask`` [B, T] float32: what the prediction of the NEXT token weighs, 0 where it does not count;
    ``lengths`` [B] int64; ``numbers``: the place of each row in the list of sequences it was taken from, if it is from one."""

    tokens: Tensor
    mask: Tensor
    lengths: Tensor
    numbers: tuple[int, ...] = ()

    @property
    def real(self) -> Tensor:
        """[B, T] bool: where there is a token of the sequence."""
        return torch.arange(self.tokens.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @property
    def labels(self) -> Tensor:
        """The token behind each position [B, T]; behind the last, 0, whose weight is 0."""
        return F.pad(self.tokens[:, 1:], (0, 1))


def fill(tokens: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None, numbers: Iterable[int] = ()) -> Rows:
    """Rows of some tokens. ``weights``: for each token what its prediction weighs (of the first, nothing); None: 1."""
    lengths = [len(one) for one in tokens]
    filled, mask = torch.zeros(len(tokens), max(lengths), dtype=torch.int64), torch.zeros(len(tokens), max(lengths))
    for row, (one, length) in enumerate(zip(tokens, lengths, strict=True)):
        filled[row, :length] = torch.tensor(one, dtype=torch.int64)
        mask[row, : length - 1] = 1.0 if weights is None else torch.tensor(weights[row][1:], dtype=torch.float32)
    return Rows(filled, mask, torch.tensor(lengths), tuple(numbers))


def rows_of(sequences: Sequence[TokenSequence], numbers: Sequence[int] | None = None) -> Rows:
    """Those of some ``numbers`` (None: all) as rows. Raises DataError where a sequence's lists have different lengths."""
    numbers = range(len(sequences)) if numbers is None else numbers
    chosen = [sequences[number] for number in numbers]
    for one in chosen:
        if len(one.tokens) != len(one.targets):
            raise DataError(f"sample {one.sample}: {len(one.tokens)} tokens and {len(one.targets)} targets; encode it again")
    return fill([one.tokens for one in chosen], [one.targets for one in chosen], numbers)


def grouped(lengths: Sequence[int], batch_tokens: int, order: Iterable[int] | None = None, square: int = 0) -> Iterator[list[int]]:
    """Which sequences stand side by side: those that follow each other in ``order`` (None: by rising length), as many at once as make
    rows x longest <= ``batch_tokens``. One that is longer stands alone.

    ``square``: if given, rows x longest^2 <= ``square`` too, which bounds what attention maps take.
    """
    found: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)) if order is None else order:
        more = max(longest, lengths[index])
        if found and ((len(found) + 1) * more > batch_tokens or (square and (len(found) + 1) * more**2 > square)):
            yield found
            found, more = [], lengths[index]
        found.append(index)
        longest = more
    if found:
        yield found


def beginning(items: Sequence[T], tokens: int, size: Callable[[T], int]) -> list[T]:
    """The first, as many as have at most ``tokens`` tokens together; at least one, if there is one. ``size``: of one."""
    for count, one in enumerate(items):
        tokens -= size(one)
        if count and tokens < 0:
            return list(items[:count])
    return list(items)
