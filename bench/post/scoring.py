"""What counts as a leak, and what else was replaced.

A *leak* is a window of a secret's significant characters in what came out, where the text had none outside of its secrets. Significant
are digits of numbers and letters and digits of anything else, in their plain form (NFKC) and small; a window is three digits, or four
letters or digits, or the whole of a shorter secret. So nothing hides a leak: neither a changed separator nor full-width characters. A
secret that was cut off must not leak once enough of it had come (``Secret.enough``).

The *strict* measure goes by characters: of a secret that came whole every significant one must have been replaced.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from bench.post.secret import ZERO_WIDTH, Span, significant

REPLACED = "\ue000"
"""Stands for anything that took a secret's place."""
NUMBER_WINDOW, TEXT_WINDOW = 3, 4
_REPLACEMENTS = re.compile(f"{REPLACED}+")
_SILENT = re.compile(rf"[{ZERO_WIDTH}\s\-‐‑‒–—―−.,()/:+]+")
_BREAK = re.compile(r"[^0-9]+")
_LETTERS = re.compile(rf"[^\w{REPLACED}]+|_+")


class Leak(NamedTuple):
    """A piece of a secret that came out."""

    span: Span
    window: str


class Strict(NamedTuple):
    """Significant characters of whole secrets that came out, by kind of secret, and how many characters beside secrets were replaced."""

    kept: dict[str, int]
    beside: int


def hidden(spans: Iterable[Span], shown: int) -> tuple[list[Span], list[Span]]:
    """Of the secrets in a text of which ``shown`` characters came: those that must not be seen, cut off where the text was, and stumps
    that are too short to tell.
    """
    must: list[Span] = []
    short: list[Span] = []
    for span in spans:
        if span.start < shown:
            seen = span._replace(end=min(span.end, shown))
            (must if seen.end - seen.start >= min(span.enough, span.end - span.start) else short).append(seen)
    return must, short


def leaks(text: str, spans: Sequence[Span], output: str) -> list[Leak]:
    """The secrets (``spans``) of which something came out, each with the first piece. ``output`` has ``REPLACED`` for replacements."""
    outside = REPLACED.join(outside_of(text, spans))
    streams: dict[bool, tuple[str, str]] = {}
    came: dict[Span, list[str]] = {}
    for span in spans:
        if span.numeric not in streams:
            streams[span.numeric] = _stream(outside, span.numeric), _stream(output, span.numeric)
        before, after = streams[span.numeric]
        windows = [window for window in _windows(text[span.start : span.end], span.numeric) if window in after and window not in before]
        if windows:
            came[span] = windows
    return [Leak(span, windows[0]) for span, windows in came.items() if not _borrowed(text, windows, span, came)]


def _borrowed(text: str, windows: Sequence[str], span: Span, came: Mapping[Span, Sequence[str]]) -> bool:
    """Whether all that seems to have come out of a secret is also in others of which more came out."""
    mine = (len(windows), -span.start)
    others = [_stream(text[other.start : other.end], span.numeric) for other, its in came.items() if (len(its), -other.start) > mine]
    return all(any(window in other for other in others) for window in windows)


def outside_of(text: str, spans: Sequence[Span]) -> list[str]:
    """What stands before, between and after the secrets."""
    ends = [0, *(span.end for span in spans)]
    return [text[end:start] for end, start in zip(ends, [*(span.start for span in spans), len(text)], strict=True)]


def _stream(text: str, numeric: bool) -> str:
    """A text's significant characters; in between stands what no window can match."""
    if numeric:
        return _BREAK.sub(" ", _SILENT.sub("", unicodedata.normalize("NFKC", text)))
    return _LETTERS.sub("", unicodedata.normalize("NFKC", text)).casefold()


def _windows(secret: str, numeric: bool) -> list[str]:
    plain = significant(secret)
    if numeric:
        plain = "".join(c for c in plain if c in "0123456789")
    size = min(NUMBER_WINDOW if numeric else TEXT_WINDOW, len(plain))
    return [plain[i : i + size] for i in range(len(plain) - size + 1)] if size else []


def strict(text: str, must: Sequence[Span], output: str, *, open_end: bool) -> Strict:
    """Compare character by character. ``open_end``: the output may be the beginning only (a cancel)."""
    expected = _REPLACEMENTS.sub(REPLACED, REPLACED.join(outside_of(text, must)))
    got = _REPLACEMENTS.sub(REPLACED, output)
    if got == expected or (open_end and expected.startswith(got)):
        return Strict({}, 0)
    gone = min(_alignments(text, got, open_end), key=lambda found: _shown(text, must, found))
    kept: dict[str, int] = {}
    for span in must:
        count = _shown(text, [span], gone)
        if count:
            kept[span.kind] = kept.get(span.kind, 0) + count
        gone[span.start : span.end] = [False] * (span.end - span.start)
    return Strict(kept, 0 if open_end else sum(gone))


def replaced(text: str, output: str) -> int:
    """How many characters of a text were replaced in the output."""
    return sum(_alignments(text, _REPLACEMENTS.sub(REPLACED, output), False)[0]) if text != output else 0


def _shown(text: str, spans: Sequence[Span], gone: Sequence[bool]) -> int:
    """Significant characters of secrets that were not replaced."""
    return sum(text[i].isalnum() and not gone[i] for span in spans for i in range(span.start, span.end))


def _alignments(text: str, output: str, open_end: bool) -> list[list[bool]]:
    """For each character, was it replaced? Twice where it may be ambiguous: with what was kept as far to the left as it fits, and right.

    If the output is not the text with parts replaced, it is compared as texts are that somebody edited.
    """
    parts = output.split(REPLACED)
    left = _gaps(text, parts, open_end)
    if left is not None:
        right = None if open_end else _gaps(text[::-1], [part[::-1] for part in reversed(parts)], False)
        return [left] if right is None else [left, right[::-1]]
    gone = [True] * len(text)
    for block in SequenceMatcher(None, text, output, autojunk=False).get_matching_blocks():
        gone[block.a : block.a + block.size] = [False] * block.size
    return [gone]


def _gaps(text: str, parts: Sequence[str], open_end: bool) -> list[bool] | None:
    """What of the text is not in the parts, which follow each other in it, each as far to the left as possible; None if they do not."""
    gone = [False] * len(text)
    place = len(parts[0])
    if not text.startswith(parts[0]):
        return None
    for number, part in enumerate(parts[1:], start=2):
        last = number == len(parts) and not open_end
        start = len(text) - len(part) if last else text.find(part, place + 1)
        if start <= place or not text.startswith(part, start):
            return None
        gone[place:start] = [True] * (start - place)
        place = start + len(part)
    gone[place:] = [True] * (len(text) - place)
    return gone if open_end or place == len(text) else None
