"""The post-processor ``punctuation``: what of a stream can be decided, what is held, and how it ends. Its rules:

``complete``
    Where a missing full stop or question mark is added: ``"text"`` (at the end of the text), ``"paragraphs"`` (at the end of each) or
    ``"never"``.
``close``
    Where quotes and brackets that are plainly open are closed: ``"text"``, ``"paragraphs"`` or ``"never"``.
``close_cut``
    Whether that is also done where a text was cut off, by the token limit or a cancel. (A full stop is never added there.)
``width``
    ``"auto"``: ``,.?!:;()`` are full-width in Chinese and ASCII in Latin text. ``"full"``: full-width wherever they are prose.
    ``"half"``: ASCII everywhere. ``"keep"``: as they are written.
``digits``
    Whether full-width digits and Latin letters become ASCII.
``ellipsis``
    Whether three dots, or three full stops, become ``……`` in Chinese and ``…`` in Latin text.
``spacing``
    Whether a space is put between Han letters and Latin words or numbers.
``shortest``
    A sentence alone in its paragraph is completed if it has this many words; a Han letter counts as one. Less is an answer, as "42".
"""

from __future__ import annotations

import re
from collections.abc import Callable

from edge_rt.hooks import CodeSpans, Rules
from edge_rt.plugins.punctuation.ending import missing_stop
from edge_rt.plugins.punctuation.marks import TOKEN, Marks, Settings
from edge_rt.plugins.punctuation.pairs import Pairs
from edge_rt.plugins.punctuation.reading import Reading

BLANKS = 16
"""White space that is held back, at most: a full stop may have to go before it. After more, nothing is added."""

_INTERESTING = re.compile(f"[{TOKEN.characters}]")
_PLACES = ("text", "paragraphs", "never")


def compile_rules(rules: Rules) -> Callable[[], Punctuation]:
    """Read the table of rules. Raises RuleError."""
    settings = Settings(
        rules.choice("complete", _PLACES, "text"),
        rules.choice("close", _PLACES, "text"),
        rules.flag("close_cut", True),
        rules.choice("width", ("auto", "full", "half", "keep"), "auto"),
        rules.flag("digits", True),
        rules.flag("ellipsis", True),
        rules.flag("spacing", False),
        rules.integer("shortest", 4, 1, 1000),
    )
    return lambda: Punctuation(settings)


class Punctuation:
    """One stream. ``held`` is a mark whose neighbour is not known yet, or white space that may end the text."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.held = ""
        self.counts = {"completed": 0, "closed": 0, "normalised": 0}
        self._spans, self._reading, self._pairs = CodeSpans(), Reading(), Pairs()
        self._marks = Marks(settings, self._reading, self._pairs, self.counts)
        self._code = False  # in code
        self._gap = False  # more white space than is held back went out, and nothing since
        self._ended = False

    def feed(self, text: str) -> str:
        """Take more text and return what can no longer change."""
        if self._marks.raw:
            return text
        pieces = self._spans.feed(text)
        if len(pieces) == 1 and pieces[0][1] is self._code and not self._gap:
            if self._code:
                return text
            whole = self.held + text
            if not _INTERESTING.search(whole) and not self._marks.spaces(whole):
                certain = whole.rstrip()
                self.held = whole[len(certain) :]
                if len(self.held) <= BLANKS:
                    self._reading.add(certain)
                    return certain
                self.held = ""
                pieces = [(whole, False)]
        return "".join([self._code_piece(piece) if code else self._prose(piece) for piece, code in pieces])

    def flush(self) -> str:
        """The text is complete: return the rest with what it lacks."""
        return self._end(self._settings.complete != "never", self._settings.close != "never")

    def cut(self, following: str) -> str:
        """The text was cut off. Only before a stop string is it taken to be complete."""
        return self.flush() if following else self._end(False, self._settings.close != "never" and self._settings.close_cut)

    def _end(self, complete: bool, close: bool) -> str:
        if self._ended or self._marks.raw:
            return ""
        self._ended = True
        if self._code:
            if self._spans.feed("x")[-1][1]:
                return ""  # nothing is added to code
            self._reading.add("`")
        text = self._read(self.held, len(self.held.rstrip()), True)
        blanks, self.held = self.held, ""
        return text + ("" if self._gap else self._missing(complete, close)) + blanks

    def _missing(self, complete: bool, close: bool) -> str:
        """What the text lacks here, at the end of a paragraph."""
        self._reading.settle()
        stop = missing_stop(self._reading, self._settings.shortest, self._settings.width) if complete else ""
        missing = self._pairs.closing(stop) if close and not self._reading.line.startswith("|") else stop
        if close:
            self._pairs.open.clear()
        self.counts["completed"] += bool(stop)
        self.counts["closed"] += len(missing) - len(stop)
        self._reading.add(missing)
        return missing

    def _code_piece(self, code: str) -> str:
        """Code goes out as it is. What is held is followed by it."""
        if self._code or self._marks.raw:
            return code
        held = self.held + "`"
        before = self._read(held, len(held) - 1, False)
        self._code, self._gap, self.held = True, False, ""
        return before + code

    def _prose(self, text: str) -> str:
        if self._marks.raw:
            return text
        if self._code:
            self._code = False
            self._reading.add("`")  # all code is one character to us
        text = self.held + text
        if self._gap:
            self.held = ""
            start = len(text) - len(text.lstrip())
            self._gap = start == len(text)
            self._white(text[:start])
            return text[:start] + (self._prose(text[start:]) if text[start:] else "")
        read = self._read(text, len(text.rstrip()), False)
        if len(self.held) > BLANKS and self.held.isspace():
            self._gap = True
            self._white(self.held)
            read, self.held = read + self.held, ""
        return read

    def _read(self, text: str, body: int, final: bool) -> str:
        """Decide what can be decided of the first ``body`` characters of a text; the rest is held. ``final``: nothing follows it."""
        out, at = [], 0
        for match in TOKEN.pattern.finditer(text, 0, body):
            start, end = match.span()
            if start < at:
                continue  # a space that went with the mark before it
            out.append(self._marks.plain(text[at:start]))
            if text[start].isspace() and (end - start > 1 or text[start] == "\n"):
                out.append(self._blanks(text[start:end]))
                at = end
                continue
            found = self._marks.decide(text, start, end, final)
            if found is None:
                self.held = text[start:]
                return "".join(out)
            out.append(found[0])
            at = found[1]
        if at < body:
            out.append(self._marks.plain(text[at:body]))
            at = body
        self.held = text[at:]
        return "".join(out)

    def _blanks(self, run: str) -> str:
        """White space inside the text: it may end a line or a paragraph."""
        places = self._settings
        missing = ""
        if len(run) <= BLANKS and run.count("\n") > 1 and "paragraphs" in (places.complete, places.close):
            self._reading.settle()
            if self._reading.line:
                missing = self._missing(places.complete == "paragraphs", places.close == "paragraphs")
        self._white(run)
        return missing + run

    def _white(self, run: str) -> None:
        """Take note of white space that goes out."""
        for _ in range(run.count("\n")):
            self._reading.settle()
            self._pairs.end_line()
            if self._reading.end_line():
                self._pairs.end_paragraph()
        self._reading.add(run)
