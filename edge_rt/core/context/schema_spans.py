"""Which characters of a prompt are there because of tools: they are protected, wherever the template puts them.

Templates write schemas in their own ways and places: into a system turn, into the first message of the user, before the last one. So
they are found by what the prompt would be without tools: what differs is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from edge_rt.core.context.segments import Segment
from edge_rt.core.context.transcript import Found, frame, marks

if TYPE_CHECKING:
    from edge_rt.core.context.chat_template import Placed

Span = tuple[int, int]
"""Characters [start, end) of a prompt."""


def find(
    text: str, given: Placed, found: Sequence[Found] | None, begins: Collection[int], render: Callable[[Placed], str | None]
) -> list[Span] | None:  # fmt: skip
    """The spans of a prompt, rising, that tools brought; None: nobody knows.

    ``found``: where messages stand, if that is known; ``begins``: where a turn may begin; ``render``: the text, or None if it fails.
    Compared are the template's texts between messages, or else the whole: then it is all from the first difference to the last.
    """
    if given.written:
        at = text.find(given.written)
        return [(at, at + len(given.written))] if at >= 0 else None
    bare = given._replace(tools=None)
    if found is not None:
        parts = frame(given.messages, lambda messages: render(bare._replace(messages=messages)))
        named = marks(given.messages)
        if parts[1::2] == [named[one.message] for one in found]:
            bounds = [0, *(at for one in found for at in (one.start, one.end)), len(text)]
            gaps = zip(bounds[::2], bounds[1::2], parts[::2], strict=True)
            return [span for start, end, other in gaps if (span := _inserted(text[start:end], other, start, begins))]
    other = render(bare)
    return None if other is None else [span] if (span := _inserted(text, other, 0, begins)) else []


def _inserted(text: str, bare: str, at: int, begins: Collection[int]) -> Span | None:
    """What ``text``, which begins at character ``at``, has and ``bare`` has not.

    It may fit in several places, as turns begin and end alike: then one of ``begins`` is where it does, or the first.
    """
    if text == bare:
        return None
    start = _alike(zip(text, bare, strict=False))
    end = len(text) - min(_alike(zip(reversed(text), reversed(bare), strict=False)), min(len(text), len(bare)) - start)
    while 0 < start < end and at + start not in begins and text[start - 1] == text[end - 1]:
        start, end = start - 1, end - 1
    return (at + start, at + end) if start < end else None


def _alike(pairs: Iterator[tuple[str, str]]) -> int:
    """How many of the first pairs are equal characters."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def blanked(text: str, spans: Sequence[Span]) -> str:
    """The text with blanks in the place of spans."""
    for start, end in spans:
        text = text[:start] + "\0" * (end - start) + text[end:]
    return text


def cut_out(text: str, parts: Sequence[tuple[int, Segment]], spans: Sequence[Span], found: Sequence[Found]) -> list[tuple[int, Segment]]:
    """Segments with the spans of tools cut out of them, each with the character where it begins.

    Where a span stands in a message's turn, the template's text that opens and closes the turn stays with it.
    """
    ends = [*(at for at, _ in parts[1:]), len(text)]
    cuts = list(spans)
    for start, _ in spans:
        at, segment = next((at, one) for (at, one), end in zip(parts, ends, strict=True) if start < end)
        within = next((one for one in found if one.start >= start), None)
        if segment.kind != "system" and within and not any(at <= one.start < start for one in found) and at < start:
            last = next((end for end in ends if end >= within.end), len(text))
            cuts += [(at, start), (within.end, last)]
    cuts = _joined(cuts)
    merged: list[tuple[int, Segment]] = [(start, Segment(-1, "tools", text[start:end], 0, end - start, "schema")) for start, end in cuts]
    for (at, segment), end in zip(parts, ends, strict=True):
        left = at
        for start, stop in cuts:
            if left < start < end:
                merged.append((left, segment))
            left = max(left, min(stop, end)) if start < end else left
        if left < end:
            merged.append((left, segment))
    return sorted(merged, key=lambda part: part[0])


def _joined(spans: Sequence[Span]) -> list[Span]:
    """The same characters in rising spans that neither touch nor overlap."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif start < end:
            found.append((start, end))
    return found
