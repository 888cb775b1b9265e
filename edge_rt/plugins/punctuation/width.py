"""Which width a mark should have, by what stands around it and what the sentence is written in."""

from __future__ import annotations

import re

from edge_rt.plugins.punctuation.characters import BREAK, CLOSER, CODE, LETTER, OTHER, WIDE, left_kind, right_kind
from edge_rt.plugins.punctuation.reading import Reading

_NO_STOP = re.compile(
    r"(?:(?<![^\W_])[A-Za-z]|\b(?:etc|vs|cf|al|approx|dept|est|fig|figs|vol|pp|ed|eds|ch|sec|no|nos|mr|mrs|ms|dr|prof|st|jr|sr|gen|col|lt"
    r"|sgt|rev|hon|pres|gov|sen|rep|inc|ltd|co|corp|llc|bros|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|wed|thu|fri|sat|sun"
    r"|ph|ii|iii|iv|vi|vii|viii|ix|xi|xii))$",
    re.IGNORECASE,
)
_MARKER = re.compile(r"(?:[-*+•]\s+)?[(（]?(?:\d{1,3}(?:\.\d{1,3})*|[A-Za-z]|[ivxIVX]{1,4}|[一二三四五六七八九十]{1,3})$")
_ENTITY = re.compile(r"&#?\w{1,8}$")


def is_marker(reading: Reading) -> bool:
    """Whether the line so far is the number of an item in a list."""
    return len(reading.line) <= 14 and _MARKER.match(reading.line) is not None


def is_abbreviation(before: str) -> bool:
    """Whether a full stop after this text may belong to an abbreviation or an initial."""
    return _NO_STOP.search(before[-8:]) is not None


def becomes_full(mark: str, left: int, right: str, after: str, reading: Reading, always: bool) -> bool:
    """Whether an ASCII mark should be full-width. ``right``: the next character; ``after``: that after it, if the next is a space.

    ``always``: the text is Chinese whatever it quotes. Else the sentence so far must be: the more of it, the less its neighbours tell.
    """
    han, words = reading.counts
    kind, spaced = right_kind(right), right == " "
    if left not in (WIDE, LETTER) or kind == CODE or not (han or always):
        return False
    if spaced:
        kind = right_kind(after)
    if not always and kind == LETTER and left == LETTER:
        return False  # Latin text in a sentence keeps its marks
    if mark == "." and not _may_be_stop(left, kind, spaced, reading):
        return False
    if mark == ";" and left == LETTER and _ENTITY.search(reading.before):
        return False
    if left == LETTER and ((kind == LETTER and not spaced) or (kind == CLOSER and not always)):
        return False  # inside a word; the end of a quotation, which may be Latin text
    if always:
        return True
    if kind == LETTER:
        return han > max(2 * words, 3) and reading.text_han > reading.text_words if spaced else han > words
    return han > words if kind == WIDE and not spaced else han > 2 * words


def _may_be_stop(left: int, kind: int, spaced: bool, reading: Reading) -> bool:
    """Whether an ASCII full stop ends a sentence, by what stands around it."""
    if kind == LETTER and not spaced:
        return False  # .NET, a file's name
    if left == LETTER and (is_abbreviation(reading.before) or (reading.before[-1:].isdigit() and kind not in (BREAK, CLOSER))):
        return False
    return not is_marker(reading)


def becomes_half(left: int, right: str, reading: Reading) -> bool:
    """Whether a full-width mark should be ASCII: it follows Latin text, in a paragraph without Han letters of a text that has few."""
    return (
        left == LETTER
        and reading.words > 0
        and not reading.paragraph_han
        and reading.text_words > reading.text_han
        and right_kind(right) in (LETTER, BREAK, CLOSER, OTHER)
    )


def bracket_becomes_full(right: str, reading: Reading) -> bool:
    """Whether an ASCII bracket should open full-width: it follows Chinese text, or begins a Chinese line. Spaces around it are kept."""
    han, words = reading.counts
    if not reading.line:
        return right_kind(right) == WIDE and reading.text_han >= reading.text_words
    return left_kind(reading.before) == WIDE and han > 2 * words
