"""What becomes of each mark, by what stands around it."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import NamedTuple

from edge_rt.plugins.punctuation.characters import (
    BREAK,
    CLOSER,
    CLOSERS,
    CODE,
    FULL,
    FULL_WIDTH_ALNUM,
    HALF,
    HAN,
    HAN_LETTER,
    LETTER,
    TO_ASCII,
    WIDE,
    left_kind,
    right_kind,
)
from edge_rt.plugins.punctuation.pairs import Pairs
from edge_rt.plugins.punctuation.reading import Reading
from edge_rt.plugins.punctuation.width import becomes_full, becomes_half, bracket_becomes_full, is_abbreviation, is_marker

DOTS = 6
"""Dots that are held back, at most; more are no ellipsis."""

_MEETING = re.compile(f"(?<=[{HAN}])(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?=[{HAN}])")
_STRETCHES = ('"', "'", "`", "*", "_", "(", "[")  # what may follow a mark that became full-width, without the space between
_AFTER_ELLIPSIS = ("”", "’", '"', "'", "?", "!")

Decision = tuple[str, int] | None
"""What goes out, and up to where that decides the text; None: more text must be known."""


class _Token(NamedTuple):
    """``characters``: those of which a token has one, for a class of a pattern."""

    pattern: re.Pattern[str]
    characters: str


_MARKS = ",.?!:;()\\[\\]\"'{，。？！：；、（）．“”‘’「」『』《》〈〉【】〔〕"
TOKEN = _Token(re.compile(rf"\s\s+|\n| (?=[，。？！：；、）】」』》〉〕])|\.\.+|。。+|[{_MARKS}]"), _MARKS + "\n０-９Ａ-Ｚａ-ｚ")
"""Marks, and white space that may end a line or stand before a full-width mark."""


class Settings(NamedTuple):
    """Compiled rules; see ``processor``."""

    complete: str
    close: str
    close_cut: bool
    width: str
    digits: bool
    ellipsis: bool
    spacing: bool
    shortest: int


class Marks:
    """One stream. ``raw``: the text turned out to be JSON, which nothing is done to."""

    def __init__(self, settings: Settings, reading: Reading, pairs: Pairs, counts: MutableMapping[str, int]) -> None:
        self._settings, self._reading, self._pairs, self._counts = settings, reading, pairs, counts
        self._keep = settings.width == "keep"
        self._may_widen = settings.width in ("auto", "full")
        self.raw = False

    def plain(self, run: str) -> str:
        """Text without marks."""
        if not run:
            return run
        settings = self._settings
        if settings.digits and not run.isascii() and (found := FULL_WIDTH_ALNUM.findall(run)):
            self._counts["normalised"] += len(found)
            run = run.translate(TO_ASCII)
        if settings.spacing and not self._pairs.in_link:
            self._reading.settle()
            start = self._reading.address_length(run)
            last = (self._reading.before + run[:start])[-1:]
            spaced, count = _MEETING.subn(" ", last + run[start:])
            run = run[:start] + spaced[len(last) :]
            self._counts["normalised"] += count
        self._reading.add(run)
        return run

    def spaces(self, run: str) -> bool:
        """Whether text without marks may get spaces."""
        return self._settings.spacing and _MEETING.search((self._reading.unread or self._reading.before)[-1:] + run) is not None

    def decide(self, text: str, start: int, end: int, final: bool) -> Decision:
        """What becomes of a token, from ``start`` to ``end`` of a text; ``final``: nothing follows the text."""
        mark, right = text[start], text[end : end + 1]
        last = (self._reading.unread or self._reading.before)[-1:]
        if mark in ".。" and last == mark:  # more dots than are held back
            return self._out(text[start:end], end)
        if end - start > 1:
            return self._dots(text[start:end], right, end, final)
        if not right and not final and mark not in "“「『《〈【〔”」』》〉】〕 )]":
            return None
        if right.isalnum() and right.isascii() and last.isalnum() and last.isascii() and mark in ",.?!:;'":
            if mark == "." and (self._reading.before + self._reading.unread)[-3:].lower() == "www":
                self._reading.settle()
                self._reading.address = True
            return self._out(mark, end)  # inside a number, a name, a word
        if self._plainly_right(mark, right):
            return self._out(mark, end)
        self._reading.settle()
        if mark in ",.?!:;，。？！：；、．":
            return self._stop(text, mark, end, final)
        if mark == " ":
            return self._space(end)
        if (mark == "{" or (mark == "[" and right in ("{", "[", '"'))) and not self._reading.before.strip():
            self.raw = True
            return text[start:], len(text)
        return self._out(self._bracket(mark, right), end)

    def _plainly_right(self, mark: str, right: str) -> bool:
        """The commas of ordinary text, told without counting: most marks are these."""
        if mark in "，、；":
            return self._settings.width != "half" and HAN_LETTER.match(right) is not None
        reading = self._reading
        return mark in ",;" and right == " " and self._settings.width == "auto" and not reading.text_han and reading.unread.isascii()

    def _out(self, text: str, end: int) -> Decision:
        self._reading.add(text)
        return text, end

    def _changed(self, text: str) -> str:
        self._counts["normalised"] += 1
        return text

    def _space(self, end: int) -> Decision:
        """A space before a full-width mark."""
        if self._keep or not HAN_LETTER.match(self._reading.before[-1:]):
            return self._out(" ", end)
        return self._changed(""), end

    # ---- marks in and after sentences --------------------------------------------------------------------------------

    def _stop(self, text: str, mark: str, end: int, final: bool) -> Decision:
        reading = self._reading
        right, after = text[end : end + 1], text[end + 1 : end + 2]
        if self._pairs.in_link or self._in_address(mark, right):
            return self._out(mark, end)
        may_widen = self._may_widen and mark in FULL and (reading.counts[0] > 0 or self._settings.width == "full")
        if right == " " and not after and not final and (may_widen or mark not in FULL):
            return None
        out, taken = mark, end
        if may_widen and self._widens(mark, right, after):
            out = self._changed(FULL[mark])
            taken += right == " " and (right_kind(after) in (WIDE, LETTER) or after in _STRETCHES)
        elif mark == "．":
            between = reading.before[-1:].isdigit() and right.isdigit()
            out = self._changed(".") if between and self._settings.digits else mark
        elif mark in HALF and self._narrows(right):
            out = self._changed(HALF[mark] + self._gap(right))
        elif mark not in FULL and right == " " and HAN_LETTER.match(after) and not self._keep:
            taken += 1
            self._changed("")
        self._after_stop(out, right)
        return out, taken

    def _in_address(self, mark: str, right: str) -> bool:
        """Whether a mark belongs to a URL or path; ends it where it does not."""
        reading = self._reading
        if mark == ":" and right == "/" and reading.before[-1:].isalpha():
            reading.address = True
        if reading.address:
            kind = right_kind(right)
            ends = kind in (BREAK, CLOSER) or (kind == WIDE and left_kind(reading.before) != WIDE)
            reading.address = mark in FULL and not ends
        return reading.address

    def _widens(self, mark: str, right: str, after: str) -> bool:
        reading = self._reading
        if mark in "?!" and reading.before[-1:] in ("？", "！"):
            return True
        if mark == ":" and right in ("(", ")"):
            return False  # a face
        return becomes_full(mark, left_kind(reading.before), right, after, reading, self._settings.width == "full")

    def _narrows(self, right: str) -> bool:
        if self._settings.width == "half":
            return True
        return self._settings.width == "auto" and becomes_half(left_kind(self._reading.before), right, self._reading)

    def _gap(self, right: str) -> str:
        """The space after a mark that became ASCII."""
        if self._reading.before[-1:].isdigit() and right.isdigit():
            return ""
        return " " if right.isalnum() or right in CLOSERS else ""

    def _after_stop(self, out: str, right: str) -> None:
        """Take note of a mark that goes out: it may end the sentence."""
        reading, mark = self._reading, out[:1]
        ends = mark in "。？！" or (mark in ".?!" and right_kind(right) not in (LETTER, CODE))
        if ends and mark == "." and (is_abbreviation(reading.before) or is_marker(reading)):
            ends = False
        reading.add(out)
        reading.settle()
        if ends:
            reading.end_sentence()
        elif mark in ":：":
            reading.clause = reading.han + reading.words

    def _dots(self, run: str, right: str, end: int, final: bool) -> Decision:
        """Two dots or full stops, or more."""
        if not right and not final and len(run) <= DOTS:
            return None
        reading = self._reading
        reading.settle()
        out = run
        if self._settings.ellipsis and len(run) in (3, 6) and not reading.address and not self._pairs.in_link:
            out = self._ellipsis(run, right)
            self._counts["normalised"] += out != run
        reading.add(out)
        if out == run and run[0] == "。" and len(run) <= DOTS:
            reading.settle()
            reading.end_sentence()
        return out, end

    def _ellipsis(self, run: str, right: str) -> str:
        """Three dots as one character in Latin text, as two in Chinese. What may be code or a range stays."""
        before, kind = self._reading.before, right_kind(right)
        left = left_kind(before)
        han, words = self._reading.counts
        if left == WIDE or (left == BREAK and HAN_LETTER.match(right)):
            return "……"
        if left != LETTER or before[-1:] in "`)]":
            return run
        if kind == WIDE and han > words:
            return "……"
        if run[0] == "." and kind != BREAK and right not in _AFTER_ELLIPSIS:
            return run
        return "……" if han > 2 * words else "…"

    # ---- brackets and quotes -----------------------------------------------------------------------------------------

    def _bracket(self, mark: str, right: str) -> str:
        """Take note of a bracket or a quote, and return it in the width it should have."""
        reading, pairs = self._reading, self._pairs
        before = reading.before
        if pairs.in_link and mark not in "()":
            return mark
        whole = not reading.head or before[-1:] in ("：", ":", "，", ",")
        if mark in "(（":
            return self._round(mark, right, whole)
        if mark in ")）":
            return self._round_closer(mark, right)
        if mark in "\"'":
            if pairs.straight(mark, before, right):
                pairs.push(mark, whole)
            reading.address = False
        elif mark == "[":
            if right.strip() and before[-1:] != "\\":
                pairs.push(mark)
        elif mark == "‘":
            if not right.isdigit() and not (before[-1:].isalnum() and not HAN_LETTER.match(before[-1])):
                pairs.push(mark, whole)
        elif mark == "’":
            pairs.curly(before, right)
        elif mark in CLOSERS:
            if mark in "“「『" and any(one.mark == mark for one in pairs.open):
                pairs.pop(CLOSERS[mark])  # one of the two is meant to close; neither is plainly open
            else:
                pairs.push(mark, whole)
        elif mark != "{":
            pairs.pop(mark)
        return mark

    def _round(self, mark: str, right: str, whole: bool) -> str:
        reading, pairs = self._reading, self._pairs
        last = reading.before[-1:]
        if mark == "(":
            if last == "]" or pairs.in_link:
                pairs.push(mark, link=True)
                return mark
            if reading.address:
                pairs.push(mark, address=True)
                return mark
            if not right.strip() or last == "\\":
                return mark
            if self._may_widen and bracket_becomes_full(right, reading):
                mark = self._changed("（")
        elif self._narrows(right):
            pairs.push("(", whole)
            return self._changed(" (" if last.isalnum() else "(")
        pairs.push(mark, whole)
        return mark

    def _round_closer(self, mark: str, right: str) -> str:
        """A closing round bracket is as wide as what opened it."""
        opened = self._pairs.pop(mark)
        if opened is None or not opened.address:
            self._reading.address = False
        wide = mark == "）"
        if self._keep or (opened is None and self._settings.width != "half"):
            return mark
        if wide and (opened is None or opened.mark == "("):
            return self._changed(")" + (" " if right.isalnum() else ""))
        if not wide and opened is not None and opened.mark == "（":
            return self._changed("）")
        return mark
