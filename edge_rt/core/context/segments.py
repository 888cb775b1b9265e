"""Conversations in segments: the parts that are graded, and that leave the context or come back as a whole.

A short message is one segment. A long one is divided at blank lines, into paragraphs; code between fences and tables stay whole.
A paragraph too long for that is divided at the ends of sentences (Chinese and English), between words where there is no such end,
and in the middle of what has no words. Blank lines belong to the segment before them: the segments of a message, joined, are its text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from edge_rt.errors import OptionError
from edge_rt.types import Message

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
