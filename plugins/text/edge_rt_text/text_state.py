"""What ``punctuation`` knows of the text so far: its last characters, and counts by sentence, paragraph and text."""

from __future__ import annotations

import re

# Characters that are kept: of the text so far, of the sentence's beginning, of the line's beginning (by which lists, headings and tables
# are told apart), and of text that waits to be counted.
CONTEXT, HEAD, LINE, UNREAD = 48, 64, 24, 256

HAN = "\u3005-\u3007\u3040-\u30ff\u3105-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Letters that are written with full-width marks: Han, kana, bopomofo. For a character class of a pattern."""
NARROW = "0-9A-Za-z\u00c0-\u024f\u0300-\u036f\u0370-\u03ff\u0400-\u04ff\u1e00-\u1eff\uac00-\ud7a3"
"""Letters and digits that are written with ASCII marks: Latin, Greek, Cyrillic, Hangul."""

HAN_LETTER = re.compile(f"[{HAN}]")
WORD_START = re.compile(f"(?<![{NARROW}])(?<![{NARROW}]['’.,:])[{NARROW[3:]}]")  # numbers are of no language
# Han letters after a slash, as in a path of a wiki, belong to the address; after a letter they are the sentence going on.
_ADDRESS_END = re.compile(f'[\\s，。？！；、：）】》」』”’"<>]|(?<=[{NARROW}])[{HAN}]')
_LIST = re.compile(
    r"[-*+•·]\s|\d{1,3}[.)、．](?!\d)|[（(][\d一二三四五六七八九十]{1,2}[)）]|[一二三四五六七八九十]{1,3}[、.]|[A-Za-z][.)]\s"
)
_NO_STOP = re.compile(
    r"(?:(?<![^\W_])[A-Za-z]|\b(?:etc|vs|cf|al|approx|dept|est|fig|figs|vol|pp|ed|eds|ch|sec|no|nos|mr|mrs|ms|dr|prof|st|jr|sr|gen|col|lt"
    r"|sgt|rev|hon|pres|gov|sen|rep|inc|ltd|co|corp|llc|bros|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|wed|thu|fri|sat|sun"
    r"|ph|ii|iii|iv|vi|vii|viii|ix|xi|xii))$",
    re.IGNORECASE,
)
_MARKER = re.compile(r"(?:[-*+•]\s+)?[(（]?(?:\d{1,3}(?:\.\d{1,3})*|[A-Za-z]|[ivxIVX]{1,4}|[一二三四五六七八九十]{1,3})$")
_ENDED = re.compile("[。．.！!？?；;…][*_”’\"')）」』】\\s]*$")


class TextState:
    """What is known of one stream. Text is counted when the counts are needed; how it was divided does not matter."""

    __slots__ = (
        "address", "before", "clause", "fall_back", "han", "head", "items_end", "line", "line_end", "line_ended", "lines",
        "paragraph_han", "sentence_ended", "text_han", "text_words", "unread", "words",
    )  # fmt: skip

    def __init__(self) -> None:
        self.unread = ""
        self.before = ""  # the last CONTEXT characters
        self.head = self.line = ""  # beginnings of the sentence and the line
        self.han = self.words = 0  # Han letters and other words of the sentence
        self.clause = 0  # han + words at its last colon
        self.fall_back = (0, 0)  # han and words of the sentence before
        self.paragraph_han = self.text_han = self.text_words = 0
        self.line_end = ""  # the last character of the line before
        self.lines = 0  # of the paragraph, before this one
        self.sentence_ended = self.line_ended = False  # in this paragraph, in this line
        self.items_end: bool | None = None  # do the items of the list end with a mark? None: there is no list
        self.address = False  # in a URL or a path

    def add(self, text: str) -> None:
        """Text that went out."""
        self.unread += text
        if len(self.unread) > UNREAD:
            self.settle()

    def settle(self) -> None:
        """Count what was added."""
        run, self.unread = self.unread, ""
        if not run:
            return
        seen, at = self.before + run, len(self.before)
        if not run.isascii() and (han := len(HAN_LETTER.findall(run))):
            self.han += han
            self.paragraph_han += han
            self.text_han += han
        if self.address:  # what it is made of are no words
            end = _ADDRESS_END.search(seen, at)
            self.address = end is None
            words = 0 if end is None else len(WORD_START.findall(seen, end.start()))
        else:
            words = len(WORD_START.findall(seen, at))
        self.words += words
        self.text_words += words
        if len(self.head) < HEAD:
            self.head = (self.head + run)[:HEAD] if self.head else run.lstrip()[:HEAD]
        if len(self.line) < LINE:
            self.line = (self.line + run)[:LINE] if self.line else run.lstrip(" \t\r\n>")[:LINE]
        self.before = seen[-CONTEXT:]

    @property
    def counts(self) -> tuple[int, int]:
        """Han letters and other words of the sentence, or of the one before if there are none yet."""
        return (self.han, self.words) if self.han or self.words else self.fall_back

    @property
    def is_item(self) -> bool:
        """Whether the line is an item of a list."""
        return _LIST.match(self.line) is not None

    @property
    def is_marker(self) -> bool:
        """Whether the line so far is the number of an item in a list."""
        return len(self.line) <= 14 and _MARKER.match(self.line) is not None

    @property
    def ends_in_abbreviation(self) -> bool:
        """Whether a full stop that comes next may belong to an abbreviation or an initial."""
        return _NO_STOP.search(self.before[-8:]) is not None

    def address_length(self, run: str) -> int:
        """How many characters of text that comes next still belong to a URL or path."""
        if not self.address:
            return 0
        end = _ADDRESS_END.search(self.before + run, len(self.before))
        return end.start() - len(self.before) if end else len(run)

    def end_sentence(self) -> None:
        """A mark that ends a sentence went out."""
        self.sentence_ended = self.line_ended = True
        self._begin_sentence()

    def _begin_sentence(self) -> None:
        self.fall_back = self.counts
        self.han = self.words = self.clause = 0
        self.head = ""

    def end_line(self) -> bool:
        """A line ends; returns whether a paragraph ended with it: the line is blank."""
        blank = not self.line
        if blank:
            self.paragraph_han = self.lines = 0
            self.sentence_ended = False
        else:
            self.lines += 1
            self.items_end = _ENDED.search(self.before) is not None if self.is_item else None
        self._begin_sentence()
        if self.line:
            self.line_end = self.before.rstrip("*_ \t\r\n")[-1:]
        self.line, self.line_ended, self.address = "", False, False
        return blank
