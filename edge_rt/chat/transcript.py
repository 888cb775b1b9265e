"""Which characters of a prompt are there because of tools: they are protected, wherever the template puts them.

Templates write schemas in their own ways and places: into a system turn, into the first message of the user, before the last one. So
they are found by what the prompt would be without tools: what differs is theirs."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.core.context.history import Kind, Segment, segments
from edge_rt.errors import ConstraintError
from edge_rt.types import Message

if TYPE_CHECKING:
    from edge_rt.chat.template import Placed
    from edge_rt.native.llama import Vocab

SchemaSpan = tuple[int, int]
"""Characters [start, end) of a prompt."""


def find_schema_spans(
    text: str, given: Placed, found: Sequence[Found] | None, begins: Collection[int], render: Callable[[Placed], str | None]
) -> list[SchemaSpan] | None:  # fmt: skip
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


def _inserted(text: str, bare: str, at: int, begins: Collection[int]) -> SchemaSpan | None:
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


def blanked(text: str, spans: Sequence[SchemaSpan]) -> str:
    """The text with blanks in the place of spans."""
    for start, end in spans:
        text = text[:start] + "\0" * (end - start) + text[end:]
    return text


def cut_out(
    text: str, parts: Sequence[tuple[int, Segment]], spans: Sequence[SchemaSpan], found: Sequence[Found]
) -> list[tuple[int, Segment]]:
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


def _joined(spans: Sequence[SchemaSpan]) -> list[SchemaSpan]:
    """The same characters in rising spans that neither touch nor overlap."""
    found: list[SchemaSpan] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif start < end:
            found.append((start, end))
    return found


# A prompt in pieces: which of its tokens belong to which segment of the conversation.
#
# The tokens are those of the whole prompt, so a piece is found by where its text stands in the prompt. The template is run a second time
# with a private character in the place of each message: what lies between those characters is the template's own text, and the prompt
# is that text with the messages put back (some templates trim them). Where this does not come out, because a template rewrites messages
# or looks into them, long messages are looked for in order. A message that is not found is a piece as it stands, undivided; if none is
# found, the prompt is one piece, which is protected.
#
# A last message of the assistant begins the answer: it is a piece of the prompt and yet none of the history (``answer_start``).
#
# Template text (role markers, control tokens) belongs to the message it opens or closes. A turn that the template itself puts in front,
# such as a default system prompt, is a system message.
#
# What is there because of tools is cut out of all that, as a piece of its own (schema_spans.py).

RAW = "text"
"""The role of a text without a chat template: it is nobody's question."""
WORTH_FINDING = 16
"""Characters a message must have to be looked for by its text alone: a shorter one may stand anywhere."""

NEAR = 32
"""Bytes that may be missing between one token and the next."""

_STANDS_FOR = 0x100000  # private characters, other than those that template.py uses
_MANY = 0xFFFD


class Span(NamedTuple):
    """Tokens [start, end) of a prompt, and the segment they are."""

    start: int
    end: int
    segment: Segment


class Found(NamedTuple):
    """A message's text, as ``text`` has it, at character ``start`` of the prompt."""

    message: int
    start: int
    text: str

    @property
    def end(self) -> int:
        """Character after it."""
        return self.start + len(self.text)


def find_spans(
    vocab: Vocab, prompt: str | Sequence[Message] | None, tokens: Sequence[int], tools: Sequence[Mapping[str, Any]] = ()
) -> list[Span]:  # fmt: skip
    """The pieces of a prompt whose tokens are ``tokens``: at least one token each, together all of them, in order.

    ``prompt`` None: its text is that of the tokens.
    """
    if prompt is None:
        prompt = vocab.detokenize(tokens, special=True).decode(errors="replace")
    if isinstance(prompt, str):
        text, parts = prompt, [(segment.start, segment) for segment in segments([{"role": RAW, "content": prompt}])]
    else:
        text, parts = _conversation(vocab, prompt, tools)
    starts = token_starts(vocab, tokens, text)
    found: list[Span] = []
    bounds = _token_bounds(text, starts, [(at, segment.kind == "schema") for at, segment in parts[1:]], len(tokens))
    for (_, segment), start, end in zip(parts, [0, *bounds], [*bounds, len(tokens)], strict=True):
        if start < end:
            found.append(Span(start, end, segment))
    return found


def answer_start(pieces: Sequence[Span]) -> int:
    """The token of a prompt at which the answer begins: where a last message of the assistant does, else after the prompt."""
    last = pieces[-1]
    if last.segment.role != "assistant" or last.segment.message < max(piece.segment.message for piece in pieces):
        return last.end
    return next(piece.start for piece in pieces if piece.segment.message == last.segment.message)


def question(pieces: Sequence[Span]) -> int:
    """The number of the user's last message, -1 if there is none."""
    return max((piece.segment.message for piece in pieces if piece.segment.role == "user"), default=-1)


def _conversation(vocab: Vocab, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, Segment]]]:
    """The prompt's text, and its segments with the character where each begins; the first begins at 0."""
    from edge_rt.chat.template import placed, render_messages

    def attempt(given: Placed) -> str | None:
        try:
            return render_messages(vocab, given)
        except ConstraintError:  # the template looks into what is not there now
            return None

    ends = [name for token in vocab.eog_tokens() if (name := vocab.piece(token, special=True).decode("utf-8", "replace"))]
    turn_end = re.compile("(?:" + "|".join(map(re.escape, ends)) + r")\s*") if ends else None
    given = placed(vocab, messages, tools)
    text, messages = render_messages(vocab, given), given.messages
    found = _by_template(text, messages, lambda changed: attempt(given._replace(messages=changed)))
    parts = list(_parts(text, messages, found, turn_end)) if found else []
    if not given.tools and not given.written:
        parts = parts or list(_parts(text, messages, list(_by_text(text, messages)), turn_end))
        return text, parts or [(0, _segment(-1, "system", text, "system"))]

    spans = find_schema_spans(text, given, found, [at for at, _ in parts], attempt)
    if spans is not None and found is None:
        found = list(_by_text(blanked(text, spans), messages))
        parts = list(_parts(text, messages, found, turn_end))
    if spans is None or not found:
        return text, [(0, _segment(-1, "system", text, "system"))]
    return text, cut_out(text, parts, spans, found)


# ---- where messages stand --------------------------------------------------------------------------------------------


def marks(messages: Sequence[Message]) -> list[str]:
    """A private character for each message, equal ones for equal messages (templates compare them); none for one without text."""
    first: dict[tuple[str, str], str] = {}
    found = []
    for i, message in enumerate(messages):
        content = message.get("content")
        found.append(first.setdefault((message["role"], content), chr(_STANDS_FOR + i)) if isinstance(content, str) and content else "")
    return found


def frame(messages: Sequence[Message], render: Callable[[Sequence[Message]], str | None]) -> list[str]:
    """The template's own text around messages, and between two of its parts the mark of a message; empty: it fails."""
    marked = [{**message, "content": mark} if mark else message for message, mark in zip(messages, marks(messages), strict=True)]
    text = render(marked)
    return [] if text is None else re.split(f"([{chr(_STANDS_FOR)}-{chr(_STANDS_FOR + _MANY)}])", text)


def _by_template(text: str, messages: Sequence[Message], render: Callable[[Sequence[Message]], str | None]) -> list[Found] | None:
    """Where messages stand, by the template's own text around them; None if that does not explain the prompt."""
    if len(messages) > _MANY or re.search(f"[{chr(_STANDS_FOR)}-{chr(_STANDS_FOR + _MANY)}]", text):
        return None
    numbers: dict[str, deque[int]] = {}
    for i, mark in enumerate(marks(messages)):
        numbers.setdefault(mark, deque()).append(i)
    parts = frame(messages, render)
    found, at = [], 0
    for i, part in enumerate(parts):
        if i % 2:
            same = numbers[part]
            number = same.popleft() if len(same) > 1 else same[0]
            content = messages[number]["content"]
            after = parts[i + 1]
            variants = (form(content) for form in (str, str.strip, str.rstrip, str.lstrip, _escaped))
            fitting = next((v for v in variants if text.startswith(v + after, at)), None)
            if fitting is None:
                return None
            found.append(Found(number, at, fitting))
            at += len(fitting)
        elif text.startswith(part, at):
            at += len(part)
        else:
            return None
    return found if at == len(text) else None


def _escaped(content: str) -> str:
    """A text as it stands in JSON: so some templates show what a tool gave."""
    return json.dumps(content, ensure_ascii=False)[1:-1]


def _by_text(text: str, messages: Sequence[Message]) -> Iterator[Found]:
    """Where long messages stand, in order."""
    at = 0
    for i, message in enumerate(messages):
        content = message.get("content")
        stripped = content.strip() if isinstance(content, str) else ""
        start = text.find(stripped, at) if len(stripped) >= WORTH_FINDING else -1
        if start >= 0:
            yield Found(i, start, stripped)
            at = start + len(stripped)


# ---- from messages to segments ---------------------------------------------------------------------------------------


def _parts(
    text: str, messages: Sequence[Message], found: Sequence[Found], turn_end: re.Pattern[str] | None
) -> Iterator[tuple[int, Segment]]:
    """Segments with the character where each begins, and so where the one before ends."""
    divided: dict[int, list[Segment]] = {}
    for segment in segments(messages):
        divided.setdefault(segment.message, []).append(segment)
    known = {one.message for one in found}
    end = expected = 0  # of the message before; the number of this one, if none is missing
    for i, here in enumerate(found):
        closes, opens = _borders(text[end : here.start], turn_end, first=i == 0)
        begin = end + closes  # with the template's text that opens the message
        missing = [n for n in range(expected, here.message) if n not in known]
        if i == 0 and opens:
            yield 0, _segment(-1, "system", text[:opens], "system")
            begin = opens
        elif missing and closes < opens:
            yield begin, _undivided(messages, missing, text[begin : end + opens])
            begin = end + opens
        yield from _divided(divided[here.message], here, messages[here.message], begin)
        end, expected = here.end, max(expected, here.message + 1)
    missing = [n for n in range(expected, len(messages)) if n not in known]
    begin = end + _borders(text[end:], turn_end, first=False)[0]
    if missing and begin < len(text):
        yield begin, _undivided(messages, missing, text[begin:])


def _borders(between: str, turn_end: re.Pattern[str] | None, *, first: bool) -> tuple[int, int]:
    """Where the text between two messages stops closing the one and starts to open the other; apart if more lies in between.

    A turn ends with a token that ends generation, or else with a line. Before the first message there is nothing to close.
    """
    ends = [end.end() for end in turn_end.finditer(between)] if turn_end else []
    if first:
        return 0, ends[-1] if ends else 0
    if ends:
        return ends[0], ends[-1]
    line = re.match(r"[^\n]*\n\s*", between)
    at = line.end() if line else len(between)
    return at, at


def _divided(parts: Sequence[Segment], here: Found, message: Message, begin: int) -> Iterator[tuple[int, Segment]]:
    """A message's segments: the first has the template's text that opens it."""
    content = message["content"]
    lead = content.find(here.text)  # what the template trimmed; -1: it escaped
    for i, segment in enumerate(parts):
        offset = segment.start - lead if lead >= 0 else len(_escaped(content[: segment.start]))
        yield (begin if i == 0 else min(here.end, max(here.start, here.start + offset))), segment


def _undivided(messages: Sequence[Message], numbers: Sequence[int], text: str) -> Segment:
    """One segment for messages that were not found; it is what the weightiest of them is."""
    roles = [str(messages[n].get("role")) for n in numbers]
    if "system" in roles or "developer" in roles:
        return _segment(numbers[roles.index("system" if "system" in roles else "developer")], "system", text, "system")
    number = max((n for n in numbers if messages[n].get("role") == "user"), default=numbers[-1])
    return _segment(number, str(messages[number].get("role")), text, "message")


def _segment(message: int, role: str, text: str, kind: Kind) -> Segment:
    return Segment(message, role, text, 0, len(text), kind)


# ---- from characters to tokens ---------------------------------------------------------------------------------------


def token_starts(vocab: Vocab, tokens: Sequence[int], text: str) -> list[int]:
    """The byte of the text (in UTF-8) at which each token begins, rising.

    Tokens the tokenizer adds (a begin-of-text token, a space that stands for the beginning of a word) take no room, bytes that the
    vocabulary cannot spell have no token. Where the tokens hardly spell the text at all, because the vocabulary normalises it, places
    are estimated by how long the tokens' own texts are.
    """
    data = text.encode("utf-8", "surrogatepass")
    spelled = [vocab.piece(token, special=True) for token in tokens]
    starts, at, lost = [], 0, 0
    for token, piece in zip(tokens, spelled, strict=True):
        if not data.startswith(piece, at):
            if piece.startswith(b" ") and data.startswith(piece[1:], at):
                piece = piece[1:]
            elif (later := data.find(piece, at, at + NEAR)) >= 0 and not vocab.is_control(token):
                at = later
            else:
                lost += not vocab.is_control(token)
                piece = b""
        starts.append(at)
        at += len(piece)
    if 8 * lost <= len(tokens) and len(data) - at <= NEAR:
        return starts
    total, at, starts = sum(map(len, spelled)) or 1, 0, []
    for piece in spelled:
        starts.append(at * len(data) // total)
        at += len(piece)
    return starts


def _token_bounds(text: str, starts: Sequence[int], bounds: Sequence[tuple[int, bool]], n: int) -> list[int]:
    """The first token that begins at or after each of some rising characters of the text: one that straddles goes before.

    Where the flag beside the character is true, one that straddles goes after.
    """
    found, token, char, byte = [], 0, 0, 0
    for bound, after in bounds:
        bound = max(bound, char)
        byte += len(text[char:bound].encode("utf-8", "surrogatepass"))
        char = bound
        while token < n and starts[token] < byte:
            token += 1
        straddles = after and token > 0 and (token == n or starts[token] > byte)
        found.append(token - 1 if straddles else token)
    for i in reversed(range(len(found) - 1)):
        found[i] = min(found[i], found[i + 1])
    return found
