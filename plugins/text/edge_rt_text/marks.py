"""What becomes of each punctuation mark, by what stands around it."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import NamedTuple

from edge_rt.hooks import HALF_WIDTH
from edge_rt_text.text_state import HAN, HAN_LETTER, TextState

DEPTH = 16
"""Most open quotes and brackets kept. Text with more is not prose, and nothing of it is closed until its paragraph ends."""
DOTS = 6
"""Most dots held back; more are no ellipsis."""

FULL_WIDTH_ALNUM = re.compile("[０-９Ａ-Ｚａ-ｚ]")
TO_ASCII = {code: half for code, half in HALF_WIDTH.items() if chr(half).isalnum()}

FULL = dict(zip(",.?!:;()", "，。？！：；（）", strict=True))
HALF = {full: half for half, full in FULL.items()}
CLOSERS = dict(zip("([（“‘「『《〈【〔\"'", ")]）”’」』》〉】〕\"'", strict=True))
"""What closes each opening bracket and quote."""
QUOTES = "“‘「『\"'"
OPENERS = {closer: opener for opener, closer in CLOSERS.items()} | {")": "(", "）": "("}
"""What each closes; brackets of both widths close each other."""

# Kinds of neighbours of a mark.
WIDE, LETTER, BREAK, CLOSER, CODE, OTHER = range(6)
_NEIGHBOURS = (
    dict.fromkeys("）】》」』〉〕，。？！：；、…", WIDE)
    | dict.fromkeys("%％‰℃°)]\"'”’`$€¥+#", LETTER)
    | dict.fromkeys(("", "\n", "\r", " ", "\t", "\u3000"), BREAK)
    | dict.fromkeys("/=\\_@&^~{}<>(-", CODE)
)
_RIGHT = (
    _NEIGHBOURS
    | dict.fromkeys("“‘「『《〈【〔（", WIDE)
    | dict.fromkeys("）】》」』〉〕)]\"'”’，。？！：；、…!?", CLOSER)
    | dict.fromkeys("[,.:;#+", CODE)
)

_BEFORE_QUOTE = " \t\n\u3000([（【「『《“‘—–-:：,，。！？；、*_/"
_ENTITY = re.compile(r"&#?\w{1,8}$")
_MEETING = re.compile(f"(?<=[{HAN}])(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?=[{HAN}])")
_STRETCHES = ('"', "'", "`", "*", "_", "(", "[")  # what may follow a mark that became full-width, without the space between
_AFTER_ELLIPSIS = ("”", "’", '"', "'", "?", "!")

Decision = tuple[str, int] | None
"""What goes out, and up to where that decides the text; None: more text must be known."""

_MARKS = ",.?!:;()\\[\\]\"'{，。？！：；、（）．“”‘’「」『』《》〈〉【】〔〕"
TOKEN = re.compile(rf"\s\s+|\n| (?=[，。？！：；、）】」』》〉〕])|\.\.+|。。+|[{_MARKS}]")
"""Marks, and white space that may end a line or stand before a full-width mark."""
MAY_CHANGE = re.compile(f"[{_MARKS}\n０-９Ａ-Ｚａ-ｚ]")
"""A character without which a text has neither marks nor full-width letters and digits."""


def _letter(character: str) -> int:
    return WIDE if HAN_LETTER.match(character) else LETTER if character.isalnum() else OTHER


def left_kind(before: str) -> int:
    """The kind of neighbour that a mark follows; ``before`` is the text up to it. Marks of emphasis do not count."""
    character = before[-1:] if before[-1:] not in ("*", "_") else before.rstrip("*_")[-1:]
    found = _NEIGHBOURS.get(character)
    return _letter(character) if found is None else found


def right_kind(character: str) -> int:
    """The kind of neighbour that follows a mark; ``character`` is "" at the end of the text."""
    found = _RIGHT.get(character)
    return _letter(character) if found is None else found


class Open(NamedTuple):
    """An opening mark as it went out.

    ``whole``: what it holds is a sentence of its own. ``link``: it is the destination of a Markdown link. ``address``: it is part of a URL.
    """

    mark: str
    whole: bool = False
    link: bool = False
    address: bool = False


class Pairs:
    """The quotes and brackets of one stream that are open, and so must still be closed at its end."""

    __slots__ = ("_lost", "open")

    def __init__(self) -> None:
        self.open: list[Open] = []
        self._lost = False

    @property
    def in_link(self) -> bool:
        """Whether the text is in the destination of a Markdown link."""
        return bool(self.open) and self.open[-1].link

    def push(self, mark: str, whole: bool = False, link: bool = False, address: bool = False) -> None:
        if self._lost:
            return
        self.open.append(Open(mark, whole, link, address))
        if len(self.open) > DEPTH:
            self.open.clear()
            self._lost = True

    def pop(self, closer: str) -> Open | None:
        """A quote or bracket was closed; returns what opened it, or None. What was opened in between is forgotten."""
        opener = OPENERS[closer]
        for i, one in reversed(list(enumerate(self.open))):
            if one.mark == opener or (opener == "(" and one.mark == "（"):
                del self.open[i:]
                return one
        if self.open and self.open[-1].mark + closer in ("[)", "(]"):  # an interval
            return self.open.pop()
        return None

    def straight(self, quote: str, before: str, right: str) -> bool:
        """Whether an ASCII quote opens; what it closes is closed. Else it is an apostrophe, or stands for inches."""
        left, spaced = before[-1:], right.isspace() or not right
        is_open = any(one.mark == quote for one in self.open)
        if quote == "'":
            if is_open and left.strip() and not right.isalnum():
                self.pop(quote)
                return False
            # A lone apostrophe may be one of '90s or 'n'; only after another mark does it plainly open.
            plain = not before.strip() or left in '“"(（：，' or before[-2:] in (", ", ": ")
            return plain and right.isalpha() and not is_open
        if is_open:  # what looks as if it opened again says that the one before was stray
            self.pop(quote)
            if left.strip():
                return False
        return not spaced and (left in _BEFORE_QUOTE or HAN_LETTER.match(left) is not None)

    def end_line(self) -> None:
        """A line ends, and with it the destination of a link."""
        self.open = [one for one in self.open if not one.link]

    def end_paragraph(self) -> None:
        """A paragraph ends: what is open in it no longer plainly is, and a quotation that goes on opens again."""
        self.open.clear()
        self._lost = False

    def closing(self, stop: str) -> str:
        """What closes all that is open, innermost first, with the mark that ends the sentence where it belongs."""
        closers = []
        for one in reversed(self.open):
            if one.link or one.address:
                continue
            # American English puts the full stop inside quotes.
            if stop and (one.whole or (stop in ".?" and one.mark in QUOTES)):
                closers.append(stop)
                stop = ""
            closers.append(CLOSERS[one.mark])
        return "".join(closers) + stop


class Settings(NamedTuple):
    """The rules; docs/post/punctuation.md explains each."""

    complete: str
    close: str
    close_cut: bool
    width: str
    digits: bool
    ellipsis: bool
    spacing: bool
    shortest: int


class Marks:
    """Decides on the marks of one stream. ``raw``: the text turned out to be JSON and is left as it is."""

    def __init__(self, settings: Settings, state: TextState, pairs: Pairs, counts: MutableMapping[str, int]) -> None:
        self._settings, self._state, self._pairs, self._counts = settings, state, pairs, counts
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
            self._state.settle()
            start = self._state.address_length(run)
            last = (self._state.before + run[:start])[-1:]
            spaced, count = _MEETING.subn(" ", last + run[start:])
            run = run[:start] + spaced[len(last) :]
            self._counts["normalised"] += count
        self._state.add(run)
        return run

    def spaces(self, run: str) -> bool:
        """Whether text without marks may get spaces."""
        return self._settings.spacing and _MEETING.search((self._state.unread or self._state.before)[-1:] + run) is not None

    def decide(self, text: str, start: int, end: int, final: bool) -> Decision:
        """What becomes of a token, from ``start`` to ``end`` of a text; ``final``: nothing follows the text."""
        mark, right = text[start], text[end : end + 1]
        last = (self._state.unread or self._state.before)[-1:]
        if mark in ".。" and last == mark:  # more dots than are held back
            return self._out(text[start:end], end)
        if end - start > 1:
            return self._dots(text[start:end], right, end, final)
        if not right and not final and mark not in "“「『《〈【〔”」』》〉】〕 )]":
            return None
        if right.isalnum() and right.isascii() and last.isalnum() and last.isascii() and mark in ",.?!:;'":
            if mark == "." and (self._state.before + self._state.unread)[-3:].lower() == "www":
                self._state.settle()
                self._state.address = True
            return self._out(mark, end)  # inside a number, a name, a word
        if self._plainly_right(mark, right):
            return self._out(mark, end)
        self._state.settle()
        if mark in ",.?!:;，。？！：；、．":
            return self._stop(text, mark, end, final)
        if mark == " ":  # before a full-width mark
            removed = not self._keep and HAN_LETTER.match(self._state.before[-1:])
            return (self._changed(""), end) if removed else self._out(" ", end)
        if (mark == "{" or (mark == "[" and right in ("{", "[", '"'))) and not self._state.before.strip():
            self.raw = True
            return text[start:], len(text)
        return self._out(self._bracket(mark, right), end)

    def _plainly_right(self, mark: str, right: str) -> bool:
        """The commas of ordinary text, told without counting: most marks are these."""
        if mark in "，、；":
            return self._settings.width != "half" and HAN_LETTER.match(right) is not None
        state = self._state
        return mark in ",;" and right == " " and self._settings.width == "auto" and not state.text_han and state.unread.isascii()

    def _out(self, text: str, end: int) -> Decision:
        self._state.add(text)
        return text, end

    def _changed(self, text: str) -> str:
        self._counts["normalised"] += 1
        return text

    def _stop(self, text: str, mark: str, end: int, final: bool) -> Decision:
        state = self._state
        right, after = text[end : end + 1], text[end + 1 : end + 2]
        if self._pairs.in_link or self._in_address(mark, right):
            return self._out(mark, end)
        may_widen = self._may_widen and mark in FULL and (state.counts[0] > 0 or self._settings.width == "full")
        if right == " " and not after and not final and (may_widen or mark not in FULL):
            return None
        out, taken, in_number = mark, end, state.before[-1:].isdigit() and right.isdigit()
        if may_widen and self._widens(mark, right, after):
            out = self._changed(FULL[mark])
            taken += right == " " and (right_kind(after) in (WIDE, LETTER) or after in _STRETCHES)
        elif mark == "．":
            out = self._changed(".") if in_number and self._settings.digits else mark
        elif mark in HALF and self._narrows(right):
            out = self._changed(HALF[mark] + (" " if (right.isalnum() or right in CLOSERS) and not in_number else ""))
        elif mark not in FULL and right == " " and HAN_LETTER.match(after) and not self._keep:
            taken += 1
            self._changed("")
        self._after_stop(out, right)
        return out, taken

    def _in_address(self, mark: str, right: str) -> bool:
        """Whether a mark belongs to a URL or path; ends it where it does not."""
        state = self._state
        if mark == ":" and right == "/" and state.before[-1:].isalpha():
            state.address = True
        if state.address:
            kind = right_kind(right)
            ends = kind in (BREAK, CLOSER) or (kind == WIDE and left_kind(state.before) != WIDE)
            state.address = mark in FULL and not ends
        return state.address

    def _widens(self, mark: str, right: str, after: str) -> bool:
        """Whether an ASCII mark becomes full-width. ``after``: the character behind ``right``, if that is a space.

        With the width "full" all in prose do. Else the sentence must have Han letters: the more, the less the mark's neighbours count.
        """
        state, always = self._state, self._settings.width == "full"
        if mark in "?!" and state.before[-1:] in ("？", "！"):
            return True
        han, words = state.counts
        left, kind, spaced = left_kind(state.before), right_kind(right), right == " "
        face = mark == ":" and right in ("(", ")")
        if face or left not in (WIDE, LETTER) or kind == CODE or not (han or always):
            return False
        if spaced:
            kind = right_kind(after)
        if not always and kind == LETTER and left == LETTER:
            return False  # Latin text in a sentence keeps its marks
        if mark == "." and not _may_be_stop(left, kind, spaced, state):
            return False
        if mark == ";" and left == LETTER and _ENTITY.search(state.before):
            return False
        if left == LETTER and ((kind == LETTER and not spaced) or (kind == CLOSER and not always)):
            return False  # inside a word; the end of a quotation, which may be Latin text
        if always:
            return True
        if kind == LETTER:
            return han > max(2 * words, 3) and state.text_han > state.text_words if spaced else han > words
        return han > words if kind == WIDE and not spaced else han > 2 * words

    def _narrows(self, right: str) -> bool:
        """Whether a full-width mark becomes ASCII: in a paragraph without Han letters, after Latin text, in a text that is mostly Latin."""
        state, width = self._state, self._settings.width
        if width != "auto":
            return width == "half"
        latin = state.words > 0 and not state.paragraph_han and state.text_words > state.text_han
        return latin and left_kind(state.before) == LETTER and right_kind(right) in (LETTER, BREAK, CLOSER, OTHER)

    def _after_stop(self, out: str, right: str) -> None:
        """Take note of a mark that goes out: it may end the sentence."""
        state, mark = self._state, out[:1]
        ends = mark in "。？！" or (mark in ".?!" and right_kind(right) not in (LETTER, CODE))
        ends = ends and not (mark == "." and (state.ends_in_abbreviation or state.is_marker))
        state.add(out)
        state.settle()
        if ends:
            state.end_sentence()
        elif mark in ":：":
            state.clause = state.han + state.words

    def _dots(self, run: str, right: str, end: int, final: bool) -> Decision:
        """Two dots or full stops, or more."""
        if not right and not final and len(run) <= DOTS:
            return None
        state = self._state
        state.settle()
        out = run
        if self._settings.ellipsis and len(run) in (3, 6) and not state.address and not self._pairs.in_link:
            out = self._ellipsis(run, right)
            self._counts["normalised"] += out != run
        state.add(out)
        if out == run and run[0] == "。" and len(run) <= DOTS:
            state.settle()
            state.end_sentence()
        return out, end

    def _ellipsis(self, run: str, right: str) -> str:
        """Three dots as one character in Latin text, as two in Chinese. What may be code or a range stays."""
        before, kind = self._state.before, right_kind(right)
        left = left_kind(before)
        han, words = self._state.counts
        if left == WIDE or (left == BREAK and HAN_LETTER.match(right)):
            return "……"
        if left != LETTER or before[-1:] in "`)]":
            return run
        if kind == WIDE and han > words:
            return "……"
        if run[0] == "." and kind != BREAK and right not in _AFTER_ELLIPSIS:
            return run
        return "……" if han > 2 * words else "…"

    def _bracket(self, mark: str, right: str) -> str:
        """Take note of a bracket or a quote, and return it in the width it should have."""
        state, pairs = self._state, self._pairs
        before = state.before
        if pairs.in_link and mark not in "()":
            return mark
        whole = not state.head or before[-1:] in ("：", ":", "，", ",")
        if mark in "(（":
            return self._round(mark, right, whole)
        if mark in ")）":
            return self._round_closer(mark, right)
        if mark in "\"'":
            if pairs.straight(mark, before, right):
                pairs.push(mark, whole)
            state.address = False
        elif mark == "[":
            if right.strip() and before[-1:] != "\\":
                pairs.push(mark)
        elif mark == "‘":
            if not right.isdigit() and not (before[-1:].isalnum() and not HAN_LETTER.match(before[-1])):
                pairs.push(mark, whole)
        elif mark == "’":
            apostrophe = before[-1:].isalnum() and right.isalnum() and not HAN_LETTER.match(before[-1])
            if not apostrophe and pairs.open and pairs.open[-1].mark == "‘":
                pairs.open.pop()
        elif mark in CLOSERS:
            if mark in "“「『" and any(one.mark == mark for one in pairs.open):
                pairs.pop(CLOSERS[mark])  # one of the two is meant to close; neither is plainly open
            else:
                pairs.push(mark, whole)
        elif mark != "{":
            pairs.pop(mark)
        return mark

    def _round(self, mark: str, right: str, whole: bool) -> str:
        state, pairs = self._state, self._pairs
        last = state.before[-1:]
        if mark == "(":
            link = last == "]" or pairs.in_link
            if link or state.address:
                pairs.push(mark, link=link, address=not link)
                return mark
            if not right.strip() or last == "\\":
                return mark
            han, words = state.counts
            if not state.line:
                chinese = right_kind(right) == WIDE and state.text_han >= state.text_words
            else:
                chinese = left_kind(state.before) == WIDE and han > 2 * words
            if self._may_widen and chinese:
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
            self._state.address = False
        wide = mark == "）"
        if self._keep or (opened is None and self._settings.width != "half"):
            return mark
        if wide and (opened is None or opened.mark == "("):
            return self._changed(")" + (" " if right.isalnum() else ""))
        if not wide and opened is not None and opened.mark == "（":
            return self._changed("）")
        return mark


def _may_be_stop(left: int, kind: int, spaced: bool, state: TextState) -> bool:
    """Whether an ASCII full stop ends a sentence, by what stands around it."""
    if kind == LETTER and not spaced:
        return False  # .NET, a file's name
    if left == LETTER and (state.ends_in_abbreviation or (state.before[-1:].isdigit() and kind not in (BREAK, CLOSER))):
        return False
    return not state.is_marker
