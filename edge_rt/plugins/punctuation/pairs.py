"""Open quotes and brackets: what must still be closed at the end."""

from __future__ import annotations

from typing import NamedTuple

from edge_rt.plugins.punctuation.characters import CLOSERS, HAN_LETTER, OPENERS, QUOTES

DEPTH = 16
"""Open quotes and brackets that are kept. Text with more is not prose, and nothing of it is closed until its paragraph ends."""

_BEFORE_QUOTE = " \t\n\u3000([（【「『《“‘—–-:：,，。！？；、*_/"


class Open(NamedTuple):
    """An opening mark as it went out.

    ``whole``: what it holds is a sentence of its own. ``link``: it is the destination of a Markdown link. ``address``: it is part of a URL.
    """

    mark: str
    whole: bool = False
    link: bool = False
    address: bool = False


class Pairs:
    """One stream."""

    __slots__ = ("_lost", "open")

    def __init__(self) -> None:
        self.open: list[Open] = []
        self._lost = False

    @property
    def in_link(self) -> bool:
        """In the destination of a Markdown link."""
        return bool(self.open) and self.open[-1].link

    def push(self, mark: str, whole: bool = False, link: bool = False, address: bool = False) -> None:
        """A quote or bracket was opened."""
        if self._lost:
            return
        self.open.append(Open(mark, whole, link, address))
        if len(self.open) > DEPTH:
            self.open.clear()
            self._lost = True

    def pop(self, closer: str) -> Open | None:
        """A quote or bracket was closed; returns what opened it, or None. What was opened in between is forgotten."""
        opener = OPENERS[closer]
        for i in range(len(self.open) - 1, -1, -1):
            one = self.open[i]
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
            plain = not before.strip() or left in '“"(（' or before[-2:] in (", ", ": ") or left in "：，"
            return plain and right.isalpha() and not is_open
        if is_open:  # what looks as if it opened again says that the one before was stray
            self.pop(quote)
            if left.strip():
                return False
        return not spaced and (left in _BEFORE_QUOTE or HAN_LETTER.match(left) is not None)

    def curly(self, before: str, right: str) -> None:
        """A single curly closing quote, which is also the apostrophe."""
        apostrophe = before[-1:].isalnum() and right.isalnum() and not HAN_LETTER.match(before[-1])
        if not apostrophe and self.open and self.open[-1].mark == "‘":
            self.open.pop()

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
