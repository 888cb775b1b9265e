"""Conversations in segments, and what of a session's conversation is in the cells."""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice
from typing import Any, Literal, NamedTuple

from edge_rt.errors import OptionError
from edge_rt.types import Message

# Conversations in segments: the parts that are graded, and that leave the context or come back as a whole.
#
# A short message is one segment. A long one is divided at blank lines, into paragraphs; code between fences and tables stay whole.
# A paragraph too long for that is divided at the ends of sentences (Chinese and English), between words where there is no such end,
# and in the middle of what has no words. Blank lines belong to the segment before them: the segments of a message, joined, are its text.

Kind = Literal["system", "schema", "tool", "message", "paragraph", "code", "table"]

SHORT = 600
"""Characters up to which a message is one segment."""
LONGEST = 2000
"""Characters of a paragraph above which it is divided."""

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_SENTENCE_END = re.compile(r"[。！？!?…]+[”’」』）\"')]*\s*|\.[\"')]*\s+|\n")


class Segment(NamedTuple):
    """A part of a conversation.

    ``message``: its message's index, -1 for a tool schema. ``start``, ``end``: characters of the message's text.
    ``kind``: ``system`` and ``schema`` are whole; ``tool`` is (part of) a tool's result; ``message`` a whole message;
    ``paragraph``, ``code`` and ``table`` are parts of a long one.
    """

    message: int
    role: str
    text: str
    start: int
    end: int
    kind: Kind


def segments(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[Segment]:
    """The segments of tool schemas (one each, as JSON) and then of messages, at least one each.

    Raises OptionError for messages that have no role or whose content is no text; no content counts as an empty text.
    """
    found = []
    for tool in tools:
        text = json.dumps(tool, ensure_ascii=False)
        found.append(Segment(-1, "tools", text, 0, len(text), "schema"))
    for i, message in enumerate(messages):
        role, text = _checked(i, message)
        start = 0
        for kind, part in _parts(role, text):
            found.append(Segment(i, role, part, start, start + len(part), kind))
            start += len(part)
    return found


def _checked(i: int, message: Message) -> tuple[str, str]:
    """A message's role and text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise OptionError(f"message {i} has no role; give it one such as 'user'")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise OptionError(f"message {i} has content of type {type(content).__name__}; give it as text")
    return message["role"], content or ""


def _parts(role: str, text: str) -> Iterator[tuple[Kind, str]]:
    """A message's parts; joined, they are its text."""
    if role in ("system", "developer"):
        yield "system", text
    elif len(text) <= SHORT:
        yield ("tool" if role == "tool" else "message"), text
    else:
        for kind, block in _blocks(text):
            pieces = _divided(block) if kind == "paragraph" else (block,)
            yield from ((("tool" if role == "tool" else kind), piece) for piece in pieces)


def _blocks(text: str) -> Iterator[tuple[Kind, str]]:
    """Paragraphs, fenced code and tables with the blank lines after them. A fence nobody closes lasts to the end, as in Markdown."""
    block: list[str] = []
    kind: Kind | None = None  # of the block, once it has a line that is not blank
    fence = ""  # what closes the code we are in
    ended = False  # only blank lines may still join the block
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if fence:
            if bare.startswith(fence) and not bare.strip(fence[0]):
                fence, ended = "", True
        elif not bare:
            ended = kind is not None
        else:
            opening = _FENCE.match(line)
            this: Kind = "code" if opening else "table" if bare.startswith("|") else "paragraph"
            if kind and (ended or this != kind):
                yield kind, "".join(block)
                block = []
            kind, ended, fence = this, False, opening[1] if opening else ""
        block.append(line)
    if block:
        yield kind or "paragraph", "".join(block)


def _divided(paragraph: str) -> Iterator[str]:
    """Pieces of at most LONGEST characters, as long as possible."""
    start = 0
    while len(paragraph) - start > LONGEST:
        bound = start + LONGEST
        ends = [found.end() for found in _SENTENCE_END.finditer(paragraph, start, bound)]
        space = paragraph.rfind(" ", start, bound) + 1
        end = ends[-1] if ends else space if space > start else bound
        yield paragraph[start:end]
        start = end
    yield paragraph[start:]


# What was said in a session, and what of it is in the cells: the rest was evicted, and is remembered.


class Evicted(NamedTuple):
    """Tokens [start, end) of the history that left the context, with the text and the score of the segment they are (a part) of."""

    start: int
    end: int
    text: str
    score: float


def overlapping(evicted: Sequence[Evicted], start: int, end: int) -> Iterator[Evicted]:
    """Those of rising spans that share tokens with [start, end): looked up, for there may be thousands."""
    for gone in islice(evicted, bisect_right(evicted, start, key=lambda gone: gone.end), None):
        if gone.start >= end:
            return
        yield gone


class Condensed(NamedTuple):
    """The first ``tokens`` tokens of a history share their cells since these were pruned: ``missing`` cells fewer than tokens.

    Which of them a cell holds differs from head to head, so they go or stay together.
    """

    tokens: int = 0
    missing: int = 0


_NOT_CONDENSED = Condensed()


class SequenceState:
    """Tokens in order, of which the first ``fed`` were dealt with: each is in a cell, in order, or was evicted, or is ``condensed``.

    The others are still to be fed, where they were not evicted before they ever were.
    """

    def __init__(self, tokens: Sequence[int] = (), evicted: Sequence[Evicted] = (), condensed: Condensed = _NOT_CONDENSED) -> None:
        """``evicted``: rising, apart, within ``tokens``; all other tokens are in cells. Raises ValueError."""
        bounds = [at for gone in evicted for at in (gone.start, gone.end)]
        if bounds != sorted(bounds) or any(not 0 <= gone.start < gone.end <= len(tokens) for gone in evicted):
            raise ValueError(f"evicted spans do not rise within {len(tokens)} tokens")
        self.tokens, self.fed, self.condensed = list(tokens), len(tokens), condensed
        self.evicted = evicted
        if condensed.tokens > len(tokens) or not 0 <= condensed.missing <= self.kept(condensed.tokens):
            raise ValueError(f"{condensed.missing} cells cannot be missing for {condensed.tokens} of {len(tokens)} tokens")
        self._absent = 0  # of the tokens dealt with
        self._count()

    @property
    def evicted(self) -> Sequence[Evicted]:
        """What left the context, rising. There may be as many as there are lines in a book."""
        return self._evicted

    @evicted.setter
    def evicted(self, evicted: Sequence[Evicted]) -> None:
        self._evicted = tuple(evicted)
        self._gone = [0, *accumulate(gone.end - gone.start for gone in self._evicted)]  # tokens of the first n

    @property
    def cells(self) -> int:
        """Cells in use."""
        return self.fed - self._absent

    def kept(self, at: int) -> int:
        """How many of the tokens before token ``at`` were not evicted."""
        n = bisect_left(self._evicted, at, key=lambda gone: gone.start)
        return at - self._gone[n] + (max(0, self._evicted[n - 1].end - at) if n else 0)

    def cell(self, at: int) -> int:
        """Cells that the tokens before token ``at`` take, once they are fed. It is none of the condensed but the first."""
        return self.kept(at) - (self.condensed.missing if at else 0)

    def condense(self, gone: int, last: int) -> None:
        """Every head of the cache lost ``gone`` cells, none of them the ``last``."""
        if not gone:
            return
        apart = min(last, self.cells - self.cell(self.condensed.tokens))
        self.condensed = Condensed(self._newest(apart), self.condensed.missing + gone)
        self._count()

    def _newest(self, n: int) -> int:
        """Where the last ``n`` of the tokens begin that were fed and not evicted."""
        at = self.fed
        for gone in reversed(self.evicted[: bisect_right(self.evicted, at, key=lambda gone: gone.end)]):
            if at - gone.end >= n:
                break
            n -= at - gone.end
            at = gone.start
        return at - n

    def resident(self) -> list[int]:
        """The tokens in the cells, in order; of those that are condensed, each is in some heads' cells or in none."""
        return [self.tokens[place] for place in self.places()]

    def places(self) -> list[int]:
        """Where in the history ``resident`` tokens are."""
        found: list[int] = []
        start = 0
        for gone in self.evicted:
            found += range(start, min(gone.start, self.fed))
            start = gone.end
        return [*found, *range(start, self.fed)]

    def whole(self) -> list[int]:
        """The tokens up to the first that was evicted, none if some are condensed: their cells know of no other history."""
        if self.condensed.tokens:
            return []
        return self.tokens[: min([self.fed, *(gone.start for gone in self.evicted[:1])])]

    def boundary(self, at: int) -> int:
        """The last token up to ``at`` that is not within an evicted span or among the condensed."""
        if at < self.condensed.tokens:
            return 0
        return next((gone.start for gone in overlapping(self.evicted, at, at + 1)), at)

    def pending(self, most: int) -> tuple[list[int], int]:
        """At most ``most`` tokens to feed next, and what ``fed`` becomes when they are."""
        found: list[int] = []
        at = self.fed
        first = bisect_left(self._evicted, at, key=lambda gone: gone.end)
        for gone in chain(islice(self._evicted, first, None), [Evicted(len(self.tokens), len(self.tokens), "", 0)]):
            if gone.end < at:
                continue
            part = self.tokens[at : min(gone.start, at + most - len(found))]
            found += part
            if at + len(part) < gone.start:
                return found, at + len(part)
            at = max(at, gone.end)
        return found, at

    def advance(self, to: int) -> None:
        """What ``pending`` gave was fed."""
        self.fed = to
        self._count()

    def append(self, tokens: Sequence[int]) -> None:
        """More tokens were said and fed; all before them were."""
        self.tokens.extend(tokens)
        self.fed += len(tokens)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""
        del self.tokens[length:]
        if self.evicted and self.evicted[-1].end > length:
            self.evicted = [gone._replace(end=min(gone.end, length)) for gone in self.evicted if gone.start < length]
        self.rewind(length)

    def rewind(self, at: int) -> None:
        """The cells from token ``at`` on were forgotten: feed it again, and what follows. Of condensed tokens, all cells were."""
        if at < self.condensed.tokens:
            at, self.condensed = 0, _NOT_CONDENSED
        self.fed = min(self.fed, at)
        self._count()

    def cell_spans(self, evicted: Sequence[Evicted]) -> list[tuple[int, int]]:
        """The cells of tokens that are about to be evicted: spans, rising, apart. Tokens not fed yet have none."""
        spans: list[tuple[int, int]] = []
        for gone in sorted(evicted):
            start, end = self.cell(min(gone.start, self.fed)), self.cell(min(gone.end, self.fed))
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            elif start < end:
                spans.append((start, end))
        return spans

    def evict(self, evicted: Sequence[Evicted]) -> None:
        """These tokens are in no cell any more, and will not be fed."""
        self.evicted = sorted([*self.evicted, *evicted])
        self._count()

    def restore(self, gone: Evicted) -> None:
        """An evicted span is back in its cells, or will be fed in its turn."""
        self.evicted = [one for one in self.evicted if one != gone]
        self._count()

    def _count(self) -> None:
        self._absent = self.fed - self.cell(self.fed)
