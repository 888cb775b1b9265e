"""The same text in a student's tokens and in those of a teacher that has more: where both have read as much of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from edge_rt_distill.model.tokens import Tokeniser
from edge_rt_distill.model.vocabulary import Fewer


class Aligned(NamedTuple):
    """``tokens``: the teacher's. ``read``: for each of the student's tokens how many of them are read where it ends, 0 where none ends
    there: within a word that the student writes in pieces. ``origin``: for each of the teacher's the student's token in which it begins."""

    tokens: list[int]
    read: list[int]
    origin: list[int]


def align(tokens: Sequence[int], teacher: Tokeniser, fewer: Fewer) -> Aligned:
    """The teacher's tokens of what the student's ``tokens`` say. What is no text, as a sequence that begins or ends within a character,
    stays as it is.
    """
    texts = [fewer.teacher.tokeniser.vocab.piece(token, False) for token in tokens]
    theirs, sizes = list[int](), list[int]()
    for start, end in _stretches(texts):
        some = [fewer.kept[token] for token in tokens[start:end]]
        if texts[start] and (text := _decoded(b"".join(texts[start:end]))) is not None:
            some = teacher.encode(text)
        theirs += some
        sizes += [len(teacher.vocab.piece(token, False)) or 1 for token in some]
    own, other = list(accumulate(len(text) or 1 for text in texts)), list(accumulate(sizes))
    place = {at: number for number, at in enumerate(other, 1)}
    return Aligned(theirs, [place.get(at, 0) for at in own], [bisect_right(own, begin) for begin in [0, *other[:-1]]])


def _stretches(texts: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Tokens of text in a row, and each control token, which has none, by itself: it is counted as a byte."""
    start = 0
    for at, text in enumerate(texts):
        if not text:
            if start < at:
                yield start, at
            yield at, at + 1
            start = at + 1
    if start < len(texts):
        yield start, len(texts)


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None
