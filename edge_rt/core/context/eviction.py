"""What leaves the context first: what must stay, the candidates, and the built-in policies that choose among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from edge_rt.chat.transcript import Span
from edge_rt.core.context.history import Segment, overlapping
from edge_rt.errors import ContextOverflow

if TYPE_CHECKING:
    from edge_rt.core.context.grading import Grade
    from edge_rt.core.context.history import Evicted

# What must stay in the context whatever its grade. (Attention sinks, the first cells, are counted in tokens: candidates.py adds them.)

Protection = Literal["attention sinks", "system prompt", "tool schema", "newest part", "current question"]

NEWEST = 0.1
"""The share of all characters, from the end, that is protected as the newest part."""


def protections(segments: Sequence[Segment], share: float = NEWEST) -> list[tuple[Protection, ...]]:
    """Why each segment is protected; an empty tuple: it is not. A segment that reaches into the newest part is protected whole.

    ``share`` of all characters is the newest part (0: there is none; the window counts it in tokens).
    """
    question = max((segment.message for segment in segments if segment.role == "user"), default=None)
    total = sum(len(segment.text) for segment in segments)
    after = total  # characters from this segment's beginning to the end
    found: list[tuple[Protection, ...]] = []
    for segment in segments:
        newest = after - len(segment.text) < share * total
        after -= len(segment.text)
        reasons: list[tuple[bool, Protection]] = [
            (segment.kind == "system", "system prompt"),
            (segment.kind == "schema", "tool schema"),
            (newest and segment.kind != "schema", "newest part"),
            (segment.message == question, "current question"),
        ]
        found.append(tuple(name for holds, name in reasons if holds))
    return found


# What a policy chooses from: the pieces of a prompt with their grades, and why some must stay.

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
    pieces: Sequence[Span], evicted: Sequence[Evicted], *, fed: int, allowed: int, grade: Callable[[Segment], Grade], answer: int
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


def parts(pieces: Sequence[Span], allowed: int) -> Iterator[Part]:
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


def answer_pieces(pieces: Sequence[Span], end: int, text: Callable[[int, int], str]) -> list[Span]:
    """The answer so far, which ends at token ``end``, in pieces; ``text`` is that of tokens [start, end)."""
    start, message = pieces[-1].end, 1 + max(piece.segment.message for piece in pieces)
    found = []
    for at in range(start, end, ANSWER_PIECE):
        said = text(at, min(end, at + ANSWER_PIECE))
        found.append(Span(at, min(end, at + ANSWER_PIECE), Segment(message, "assistant", said, 0, len(said), "paragraph")))
    return found


def _size(piece: Span) -> int:
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


# The built-in policies: which candidates stay when not all fit. Pure functions of the candidates and a budget of tokens.


def keep_strict(candidates: Sequence[Candidate], budget: int) -> list[int]:
    """All, or ContextOverflow."""
    total = sum(candidate.tokens for candidate in candidates)
    if total > budget:
        message = f"the prompt has {total} tokens and the context leaves room for {budget}; shorten it, raise --ctx or use --policy graded"
        raise ContextOverflow(message, total, budget)
    return list(range(len(candidates)))


def keep_slide(candidates: Sequence[Candidate], budget: int) -> list[int]:
    """What is protected, and of the rest the newest, without a hole. Raises ContextOverflow."""
    kept, room = _protected(candidates, budget)
    for i in reversed(range(len(candidates))):
        if i in kept:
            continue
        room -= candidates[i].tokens
        if room < 0:
            break
        kept.add(i)
    return sorted(kept)


def keep_graded(candidates: Sequence[Candidate], budget: int) -> list[int]:
    """What is protected; of the rest the lowest scores leave, of equal ones the oldest, until all fits. Raises ContextOverflow."""
    kept, room = _protected(candidates, budget)
    rest = [i for i in range(len(candidates)) if i not in kept]
    room -= sum(candidates[i].tokens for i in rest)
    for i in sorted(rest, key=lambda i: candidates[i].score):  # stable: of equals the oldest first
        if room >= 0:
            kept.add(i)
        else:
            room += candidates[i].tokens
    return sorted(kept)


def _protected(candidates: Sequence[Candidate], budget: int) -> tuple[set[int], int]:
    """What must stay, and the room it leaves. Raises ContextOverflow, which says what is too large."""
    kept = {i for i, candidate in enumerate(candidates) if candidate.protections}
    needed = sum(candidates[i].tokens for i in kept)
    if needed > budget:
        sizes: Counter[str] = Counter()
        for i in kept:
            sizes[candidates[i].protections[0]] += candidates[i].tokens
        what = ", ".join(f"{name} {tokens}" for name, tokens in sizes.most_common())
        message = f"what must stay in the context has {needed} tokens ({what}) and there is room for {budget}; shorten it or raise --ctx"
        raise ContextOverflow(message, needed, budget)
    return kept, budget - needed
