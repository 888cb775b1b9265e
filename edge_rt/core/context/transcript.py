"""A prompt in pieces: which of its tokens belong to which segment of the conversation.

The tokens are those of the whole prompt, so a piece is found by where its text stands in the prompt. The template is run a second time
with a private character in the place of each message: what lies between those characters is the template's own text, and the prompt
is that text with the messages put back (some templates trim them). Where this does not come out, because a template rewrites messages
or looks into them, long messages are looked for in order. A message that is not found is a piece as it stands, undivided; if none is
found, the prompt is one piece, which is protected.

A last message of the assistant begins the answer: it is a piece of the prompt and yet none of the history (``answer_start``).

Template text (role markers, control tokens) belongs to the message it opens or closes. A turn that the template itself puts in front,
such as a default system prompt or tool schemas, is a system message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.context.segments import Kind, Segment, segments
from edge_rt.types import Message

if TYPE_CHECKING:
    from edge_rt.native.llama import Vocab

RAW = "text"
"""The role of a text without a chat template: it is nobody's question."""
WORTH_FINDING = 16
"""Characters a message must have to be looked for by its text alone: a shorter one may stand anywhere."""

NEAR = 32
"""Bytes that may be missing between one token and the next."""

_STANDS_FOR = 0x100000  # private characters, other than those that chat_template.py uses
_MANY = 0xFFFD


class Piece(NamedTuple):
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


def pieces(vocab: Vocab, prompt: str | Sequence[Message], tokens: Sequence[int]) -> list[Piece]:
    """The pieces of a prompt whose tokens are ``tokens``: at least one token each, together all of them, in order."""
    if isinstance(prompt, str):
        text, parts = prompt, [(segment.start, segment) for segment in segments([{"role": RAW, "content": prompt}])]
    else:
        text, parts = _conversation(vocab, prompt)
    starts = token_starts(vocab, tokens, text)
    found: list[Piece] = []
    bounds = _token_bounds(text, starts, [at for at, _ in parts[1:]], len(tokens))
    for (_, segment), start, end in zip(parts, [0, *bounds], [*bounds, len(tokens)], strict=True):
        if start < end:
            found.append(Piece(start, end, segment))
    return found


def answer_start(pieces: Sequence[Piece]) -> int:
    """The token of a prompt at which the answer begins: where a last message of the assistant does, else after the prompt."""
    last = pieces[-1]
    if last.segment.role != "assistant" or last.segment.message < max(piece.segment.message for piece in pieces):
        return last.end
    return next(piece.start for piece in pieces if piece.segment.message == last.segment.message)


def question(pieces: Sequence[Piece]) -> int:
    """The number of the user's last message, -1 if there is none."""
    return max((piece.segment.message for piece in pieces if piece.segment.role == "user"), default=-1)


def _conversation(vocab: Vocab, messages: Sequence[Message]) -> tuple[str, list[tuple[int, Segment]]]:
    """The prompt's text, and its segments with the character where each begins; the first begins at 0."""
    from edge_rt.core.context.chat_template import render_messages

    text = render_messages(vocab, messages)
    found = _by_template(text, messages, lambda changed: render_messages(vocab, changed)) or list(_by_text(text, messages))
    if not found:
        return text, [(0, _segment(-1, "system", text, "system"))]
    ends = [name for token in vocab.eog_tokens() if (name := vocab.piece(token, special=True).decode("utf-8", "replace"))]
    turn_end = re.compile("(?:" + "|".join(map(re.escape, ends)) + r")\s*") if ends else None
    return text, list(_parts(text, messages, found, turn_end))


# ---- where messages stand --------------------------------------------------------------------------------------------


def _by_template(text: str, messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> list[Found] | None:
    """Where messages stand, by the template's own text around them; None if that does not explain the prompt."""
    contents = [message.get("content") for message in messages]
    if len(messages) > _MANY or re.search(f"[{chr(_STANDS_FOR)}-{chr(_STANDS_FOR + _MANY)}]", text):
        return None
    marked = [
        {**message, "content": chr(_STANDS_FOR + i)} if isinstance(content, str) and content else message
        for i, (message, content) in enumerate(zip(messages, contents, strict=True))
    ]
    frame = re.split(f"([{chr(_STANDS_FOR)}-{chr(_STANDS_FOR + _MANY)}])", render(marked))
    found, at = [], 0
    for i, part in enumerate(frame):
        if i % 2:
            number = ord(part) - _STANDS_FOR
            content = contents[number]
            assert isinstance(content, str), "only texts are marked"
            variants = (content, content.strip(), content.rstrip(), content.lstrip())
            after = frame[i + 1]
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
    lead = message["content"].find(here.text)  # what the template trimmed
    for i, segment in enumerate(parts):
        yield (begin if i == 0 else min(here.end, max(here.start, here.start + segment.start - lead))), segment


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


def _token_bounds(text: str, starts: Sequence[int], bounds: Sequence[int], n: int) -> list[int]:
    """The first token that begins at or after each of some rising characters of the text: one that straddles goes before."""
    found, token, char, byte = [], 0, 0, 0
    for bound in bounds:
        bound = max(bound, char)
        byte += len(text[char:bound].encode("utf-8", "surrogatepass"))
        char = bound
        while token < n and starts[token] < byte:
            token += 1
        found.append(token)
    return found
