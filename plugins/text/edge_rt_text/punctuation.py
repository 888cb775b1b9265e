"""The post-processor ``punctuation``: what can be decided so far, what is held back, and what is added at the end.

docs/post/punctuation.md explains the rules.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from edge_rt.hooks import CodeSpans, Rules
from edge_rt_text.marks import MAY_CHANGE, TOKEN, Marks, Pairs, Settings
from edge_rt_text.text_state import HAN_LETTER, TextState

BLANKS = 16
"""Most white space characters held back, because a full stop may have to go before them. After more, nothing is added."""

_PLACES = ("text", "paragraphs", "never")


def compile_rules(rules: Rules) -> Callable[[], Punctuation]:
    """Return a function that makes the post-processor of one stream. Raises RuleError."""
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
    """The post-processor of one stream. ``held`` is a mark whose neighbour is not known yet, or white space that may end the text."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.held = ""
        self.counts = {"completed": 0, "closed": 0, "normalised": 0}
        self._spans, self._state, self._pairs = CodeSpans(), TextState(), Pairs()
        self._marks = Marks(settings, self._state, self._pairs, self.counts)
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
            if not MAY_CHANGE.search(whole) and not self._marks.spaces(whole):
                certain = whole.rstrip()
                self.held = whole[len(certain) :]
                if len(self.held) <= BLANKS:
                    self._state.add(certain)
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
            self._state.add("`")
        text = self._read(self.held, len(self.held.rstrip()), True)
        blanks, self.held = self.held, ""
        return text + ("" if self._gap else self._missing(complete, close)) + blanks

    def _missing(self, complete: bool, close: bool) -> str:
        """What the text lacks here, at the end of a paragraph."""
        self._state.settle()
        stop = missing_stop(self._state, self._settings.shortest, self._settings.width) if complete else ""
        missing = self._pairs.closing(stop) if close and not self._state.line.startswith("|") else stop
        if close:
            self._pairs.open.clear()
        self.counts["completed"] += bool(stop)
        self.counts["closed"] += len(missing) - len(stop)
        self._state.add(missing)
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
            self._state.add("`")  # all code is one character to us
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
        for match in TOKEN.finditer(text, 0, body):
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
            self._state.settle()
            if self._state.line:
                missing = self._missing(places.complete == "paragraphs", places.close == "paragraphs")
        self._white(run)
        return missing + run

    def _white(self, run: str) -> None:
        """Take note of white space that goes out."""
        for _ in range(run.count("\n")):
            self._state.settle()
            self._pairs.end_line()
            if self._state.end_line():
                self._pairs.end_paragraph()
        self._state.add(run)


_BOLD = re.compile(r"\*\*[^*]+\*\*$")
_HEADING_OR_TABLE = re.compile(r"#{1,6}\s|\|")
_NAME_OF_FILE = re.compile(r"(?:\S@\S+|[^\W\d]\.[A-Za-z]\w*|(?:^|\s)[~.]?/\S+|\\\S+|\w_\w+)$")
_SMALL = "a|an|and|as|at|by|de|for|from|in|la|of|on|or|the|to|with"
_TITLE = re.compile(rf"(?:[*_“\"'‘(]*[A-Z0-9][\w’'.-]*[,:*_”\"'’)]*|{_SMALL})(?:\s+(?:[A-Z0-9][\w’'.-]*[,:*_”\"'’)]*|{_SMALL}))*\s*$")

_SUBJECT = "you|he|she|it|we|they|i|there|this|that|these|those|the|a|an|my|your|his|her|our|their"
_QUESTION = re.compile(
    r"(?:so|and|but|well|now|ok|okay)?,?\s*(?:"
    rf"(?:is|are|was|does|did|can|could|would|will|has|am)(?:n['’]t)?\s(?:{_SUBJECT})\b"
    r"|(?:do|have)(?:n['’]t)?\s(?:you|we|they|i)\b"
    rf"|(?:what|where|when|who|why|how)(?:['’]s|\s(?:is|are|was|were|do|does|did|can|could|would|will|should|has|have))\s(?:{_SUBJECT})\b"
    r"|how\s(?:many|much|long|often|old|far)\s\w+\s(?:is|are|was|were|do|does|did|can|will|would)\b)",
    re.IGNORECASE,
)
_WHEN_CLAUSE = re.compile(r"(?:when|where|how|what|who)\s.*,", re.IGNORECASE)
_ASKS = re.compile(
    "吗$|(?:是不是|对不对|好不好|行不行|可不可以|能不能)$|(?:什么|怎么|怎样|怎么样|谁|哪|为何|几|多少|如何).*呢$|^[你您我他她它]们?呢$"
)


def missing_stop(state: TextState, shortest: int, width: str) -> str:
    """The mark that the text read so far lacks, or "".

    ``shortest``: Han letters and other words of a lone sentence, at least. ``width``: "full" or "half"; else that of the sentence.
    """
    before, line = state.before, state.line
    core = before.rstrip("*_)）”’\"'」』》〉】〕")
    if state.address or not core or _HEADING_OR_TABLE.match(line):
        return ""
    if not (core[-1].isalnum() or core[-1] in "%％°℃‰" or unicodedata.category(core[-1]).startswith("M")):
        return ""  # it does not end with a word
    if before[-1] in ")）" and state.head.lstrip("”’\"'」』 ")[:1] in ("(", "（"):
        return ""  # a remark in brackets after the last sentence, or the only one
    if _BOLD.match(state.head):
        return ""  # a heading
    han, words = state.han, state.words
    if state.is_item:
        if not (state.items_end or state.line_ended):
            return ""
    elif not state.sentence_ended:
        # After a line with a colon there are names, values and parts of a list as often as sentences.
        if han + words - state.clause < shortest * (2 if state.line_end in (":", "：") else 1):
            return ""
        if state.lines and state.line_end not in ("，", ",", "；", ";", "、"):  # a verse, a column of names
            return ""
        if not han and _TITLE.match(state.head):
            return ""
    if not han + words:
        return ""
    wide = han > words or (han == words and HAN_LETTER.match(state.head.lstrip("*_“\"‘'（([《「『")) is not None)
    if _NAME_OF_FILE.search(before) and (not wide or "@" in before.rpartition(" ")[2]):
        return ""
    marks = "？。" if width == "full" or (wide and width != "half") else "?."
    return marks[0] if _asks(core, state.head, wide) else marks[1]


def _asks(text: str, head: str, chinese: bool) -> bool:
    """Whether a sentence is a question. ``text``: the end of it, ``head``: its beginning."""
    if chinese:
        return _ASKS.search(re.split("[，。；：,:;]", text)[-1]) is not None or head.startswith(("请问", "敢问"))
    head = head.lstrip("*_“\"'‘( ")
    return _QUESTION.match(head) is not None and not _WHEN_CLAUSE.match(head)
