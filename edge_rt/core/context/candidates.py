"""What a policy chooses from: the pieces of a prompt with their grades, and why some must stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.context.history import overlapping
from edge_rt.core.context.protection import NEWEST, Protection, protections
from edge_rt.core.context.segments import Segment
from edge_rt.core.context.transcript import Piece

if TYPE_CHECKING:
    from edge_rt.core.context.grading import Grade
    from edge_rt.core.context.history import Evicted

SINKS = 4
"""Tokens at the beginning that all later ones attend to, whatever they say: without them a model's text falls apart
(Xiao and others, Efficient Streaming Language Models with Attention Sinks, 2023)."""
ANSWER_PIECE = 32
"""Tokens of the answer under way that leave together."""
ANSWER_SCORE = 1.0
"""The answer under way leaves after all history, oldest part first."""


class Candidate(NamedTuple):
    """A segment, or a part of one, that stays in the context or leaves it as a whole.

    ``spans``: its tokens [start, end) in the whole prompt. ``resident``: how many of them are in cells already.
    ``score``: its grade, 0 (first to go) to 1. ``protections``: why it must stay; empty: it need not.
    """

    segment: Segment
    spans: tuple[tuple[int, int], ...]
    resident: int
    score: float
    protections: tuple[Protection, ...] = ()

    @property
    def tokens(self) -> int:
        """Cells it takes."""
        return sum(end - start for start, end in self.spans)


class Part(NamedTuple):
    """Tokens [start, end) of a piece, and why they are protected."""

    start: int
    end: int
    segment: Segment
    protections: tuple[Protection, ...]


def candidates(
    pieces: Sequence[Piece], evicted: Sequence[Evicted], *, fed: int, allowed: int, grade: Callable[[Segment], Grade], answer: int
) -> list[Candidate]:
    """The candidates of a prompt and the answer so far, oldest first; what was evicted before is none.

    ``fed`` tokens are dealt with, cells may number ``allowed``, the answer begins at token ``answer``. Nothing is graded where no grade
    matters, because what must stay takes more cells than that: then every score but the answer's is 0.
    """
    there = [(part, spans) for part in parts(pieces, allowed) if (spans := tuple(_without(part, evicted)))]
    least = sum(end - start for part, spans in there if part.protections for start, end in spans)
    found = []
    for part, spans in there:
        resident = sum(max(0, min(end, fed) - start) for start, end in spans)
        score = ANSWER_SCORE if part.start >= answer else grade(part.segment).score if least <= allowed else 0.0
        found.append(Candidate(part.segment, spans, resident, score, part.protections))
    return found


def must_stay(candidates: Sequence[Candidate]) -> int:
    """Cells of those that are protected."""
    return sum(one.tokens for one in candidates if one.protections)


def parts(pieces: Sequence[Piece], allowed: int) -> Iterator[Part]:
    """Pieces with their protections, divided where one protection ends: the sinks, and the newest part in a piece longer than it.

    The newest part is a share of what the context can hold, not of all that was ever said.
    """
    total = pieces[-1].end
    newest = max(1, int(NEWEST * min(total, allowed)))
    for piece, protected in zip(pieces, protections([piece.segment for piece in pieces], share=0), strict=True):
        bounds = {piece.start, piece.end}
        if not protected:
            bounds |= {at for at in (SINKS, total - newest) if piece.start < at < piece.end and (at == SINKS or _size(piece) > newest)}
        rising = sorted(bounds)
        for start, end in pairwise(rising):
            names = list(protected)
            if start < SINKS:
                names.append("attention sinks")
            if end > total - newest:
                names.append("newest part")
            yield Part(start, end, piece.segment, tuple(names))


def answer_pieces(pieces: Sequence[Piece], end: int, text: Callable[[int, int], str]) -> list[Piece]:
    """The answer so far, which ends at token ``end``, in pieces; ``text`` is that of tokens [start, end)."""
    start, message = pieces[-1].end, 1 + max(piece.segment.message for piece in pieces)
    found = []
    for at in range(start, end, ANSWER_PIECE):
        said = text(at, min(end, at + ANSWER_PIECE))
        found.append(Piece(at, min(end, at + ANSWER_PIECE), Segment(message, "assistant", said, 0, len(said), "paragraph")))
    return found


def _size(piece: Piece) -> int:
    return piece.end - piece.start


def _without(part: Part, evicted: Sequence[Evicted]) -> Iterator[tuple[int, int]]:
    """What is left of a part; ``evicted`` rises."""
    start = part.start
    for gone in overlapping(evicted, part.start, part.end):
        if start < gone.start:
            yield start, gone.start
        start = gone.end
    if start < part.end:
        yield start, part.end
