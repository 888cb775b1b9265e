"""The post-processor ``language_tags``: marks changes of language as text streams. docs/post/language_tags.md explains the rules.

A *unit* is text in one script, up to another script or the end of the line (and for Latin, if its language may change, of the sentence).
Characters of no script (digits, punctuation, spaces, emoji) and code go with what is before them, opening brackets and quotes with what
comes after. A unit is settled when its language is known and it is long enough (``minimum_words``, ``minimum_characters``), when it
ends, or when ``LOOK_AHEAD`` characters are held back, whichever comes first. Until then it is held back; from then on its text streams
through. A unit that is too short stays in the language before it, or at the start of the text in that after it, unless it fills its
line, or is Han and begins it, or goes on after an insertion: ``The word 你好 means hello``.

- Han is Japanese if kana, or a character that only Japanese writes, come before one that only Chinese writes, in the sentence or
  quotation. With neither it is Chinese, unless it is short and most such units before were Japanese. Kana in a Chinese sentence are
  Japanese by themselves.
- Latin is what the identifier says of the unit. It is asked once, or twice: the first ``GLANCE`` characters can be enough to see that
  the language has not changed.

All decisions depend on the text alone, not on how it was divided: each is made from the same characters however they arrive.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring
from typing import NamedTuple

from edge_rt.hooks import CodeSpans, PostProcessor, Rules
from edge_rt_text import identifier
from edge_rt_text.scripts import LAST_STRONG, LOWER, OPEN_END, OPENING, SCRIPT, SCRIPTS, STRONG_OR_LINE, WORD, Patterns, evidence, patterns

LOOK_AHEAD = 48
"""Most characters held back."""
GLANCE = 24
"""Characters after which a unit may be found to be in the language before."""
INSERTION = 16
"""Most characters in another script after which a word or two in Latin script go on with what was before them."""
WITHOUT_KANA = 8
"""Han characters among which a Japanese sentence would have some kana."""
LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl")
"""Candidates for Latin script by default."""

_TAG = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")  # as BCP 47 forms it; whether its parts are registered is not looked up
_XML = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", ord("\r"): "&#13;"}  # a bare \r is read as \n (XML 1.0, 2.11)
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_XML_SPECIAL = re.compile("[\x00-\x08\x0b-\x1f&<>\ud800-\udfff\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")

_CODE = "`"  # stands for a character of code
_FENCE = re.compile(" {0,3}```")
_QUOTE_OR_LINE = re.compile('["\n]')
_ANY, _SENTENCE = "", "sentence"  # kinds of stream that are in no script: any begins a unit; any but what cannot begin a sentence
_FAMILY = {"ja": "han", "kana": "han"}  # scripts that one span goes on in


def _xml(text: str) -> str:
    return _NO_XML.sub("\ufffd", text).translate(_XML) if _XML_SPECIAL.search(text) else text


def _json(text: str) -> str:
    written: str = encode_basestring(text)[1:-1]
    return written if written.isascii() else _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", written)


class Format(NamedTuple):
    """How a span begins and ends, with ``{tag}`` for its language, and how text is written in it so that it can be read back exactly.

    ``always``: also spans of the primary and of no known language. ``lines``: a span ends with each line and goes on in a new one.
    """

    begin: str
    end: str
    text: Callable[[str], str]
    always: bool = False
    lines: bool = False


FORMATS = {
    "plain": Format("<{tag}>", "</{tag}>", lambda text: text.replace("<", "<<")),
    "ssml": Format('<lang xml:lang="{tag}">', "</lang>", _xml),
    "json": Format('{{"lang":"{tag}","text":"', '"}}\n', _json, always=True, lines=True),
}


class Writer:
    """Writes the spans of one stream. A span begins with its first text, so none is empty."""

    def __init__(self, form: Format) -> None:
        self._form, self._begin, self._end = form, "", ""
        self.opened = False

    def switch(self, tag: str | None) -> str:
        """What follows is in a language, None: it is not marked. Returns the end of the span before."""
        end = self.close()
        marks = self._form[:2] if tag is not None or self._form.always else ("", "")
        self._begin, self._end = (mark.format(tag=tag or "und") for mark in marks)
        return end

    def text(self, text: str) -> str:
        """Text of the span."""
        form = self._form
        if form.lines and "\n" in text:
            return "".join(self._line(line) for line in re.findall("[^\n]*\n|[^\n]+", text))
        if self.opened:
            return form.text(text)
        self.opened = bool(text)
        return self._begin + form.text(text) if text else ""

    def _line(self, line: str) -> str:
        written = ("" if self.opened else self._begin) + self._form.text(line)
        self.opened = not line.endswith("\n")
        return written if self.opened else written + self._end

    def close(self) -> str:
        """The end of the span, if one was begun."""
        end, self.opened = self._end if self.opened else "", False
        return end


class Plan(NamedTuple):
    """The compiled rules, which all streams of a version of them share."""

    form: Format
    primary: str
    latin: str  # the language of Latin script until another is found
    identify: identifier.Identifier | None  # None: Latin script is in one language
    languages: Mapping[str, str]  # by script, without Latin
    tags: Mapping[str, str | None]  # by language; None: it is not marked
    minimum_words: int
    minimum_characters: int


def compile_rules(rules: Rules) -> Callable[[], PostProcessor]:
    """Return a function that makes the post-processor of one stream. Raises RuleError."""
    form = FORMATS[rules.choice("format", tuple(FORMATS), "plain")]
    latin = _latin(rules)
    table = rules.table("scripts")
    languages = {name: _tag(table, name, language) for name, (language, _) in SCRIPTS.items() if language}
    known = dict.fromkeys((*latin, *languages.values()))
    table = rules.table("tags")
    tags: dict[str, str | None] = {language: _tag(table, language, language) for language in known}
    primary = rules.text("primary", "")
    if primary and primary not in known:
        raise rules.error(f"primary is {primary!r}, which no script is in; add it to languages or scripts", "primary")
    if primary and not form.always:
        tags[primary] = None
    for kind in ("han", "ja", "kana"):
        patterns(kind)
    patterns("latin", len(latin) > 1)
    evidence()
    plan = Plan(
        form,
        primary,
        primary if primary in latin else latin[0],
        identifier.Identifier(latin) if len(latin) > 1 else None,
        languages,
        tags,
        rules.integer("minimum_words", 3, 1, 6),
        rules.integer("minimum_characters", 2, 1, 16),
    )
    return lambda: LanguageTags(plan)


def _latin(rules: Rules) -> tuple[str, ...]:
    """The languages of Latin script."""
    installed = identifier.installed()
    latin = rules.texts("languages", LANGUAGES if installed else LANGUAGES[:1])
    if not latin:
        raise rules.error("languages is empty; name those that Latin script may be in", "languages")
    if len(latin) == 1:
        if not _TAG.fullmatch(latin[0]):
            raise rules.error(f"languages has {latin[0]!r} in it; give language tags such as en", "languages", 0)
        return latin
    if not installed:
        reason = "languages names several, and what tells them apart is not installed; pip install 'edge-rt-text[languages]', or name one"
        raise rules.error(reason, "languages")
    for i, language in enumerate(latin):
        if language not in identifier.known():
            raise rules.error(f"languages has {language!r} in it, which the identifier does not know; leave it out", "languages", i)
    return latin


def _tag(table: Rules, key: str, default: str) -> str:
    tag = table.text(key, default)
    if not _TAG.fullmatch(tag):
        raise table.error(f"{key} is {tag!r}; give a language tag such as zh or zh-CN", key)
    return tag


class _Unit(NamedTuple):
    """What there is of a unit: from ``at`` to ``stop``; ``end``: of the text that may be looked at."""

    at: int
    stop: int
    end: int
    ended: bool  # no more of it comes
    full: bool  # no more text may be waited for
    alone: bool  # it fills its line
    fresh: bool  # it begins its line
    returns: bool  # it goes on after an insertion


class LanguageTags:
    """The post-processor of one stream."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._writer = Writer(plan.form)
        self.counts: dict[str, int] = {}  # spans, by language
        # The text that is looked at, and the same with code replaced and straight quotes directed. What was sent of it is still there
        # if it may be a part of what ends a sentence.
        self._raw = self._mask = ""
        self._sent = 0
        self._at = 0  # where to look on; in a unit, its first letter
        self._kind = _ANY  # the script of the stream, to which a unit that is too short returns
        self._unit = ""  # the script of the unit that is not settled yet
        self._glanced = False
        self._fresh = True  # no letter since the line began
        self._language: str | None = None  # None: nothing is settled; "": it is none
        self._first = ""  # the language of the first unit, while nothing is settled
        self._latin = plan.latin  # the Latin language before
        self._japanese = 0  # Japanese units less Chinese ones
        self._code = CodeSpans()
        self._prose = False  # a letter of prose came in this line, so only a backtick or a line's end means anything to CodeSpans
        self._quoted = False  # an odd number of straight quotes came in this line
        # While these are set pieces that match change nothing: they are sent as they are, or kept until there are so many characters.
        self._passes: Callable[[str], object] | None = None
        self._keeps: Callable[[str], object] | None = None
        self._keep = 0
        self._base = 0  # where in the whole text the text that is looked at begins
        self._span_kind, self._span_at = "", 0  # what the span is in, and where in the whole text it began
        self._before = ""  # what the span before it was in, if that is in the same line
        if plan.primary:
            self._begin(plan.primary)

    @property
    def held(self) -> str:
        """Text not yet sent."""
        return self._raw[self._sent :]

    def feed(self, text: str) -> str:
        """Take more text and return what can no longer change."""
        if self._passes is not None:
            if self._passes(text):
                self._base += len(text)
                return text
        elif self._keeps is not None and len(self._raw) + len(text) < self._keep and self._keeps(text):
            self._raw += text
            self._mask += text
            return ""
        if not text:
            return ""
        self._take(text)
        sent = self._scan(final=False)
        self._forget()
        return sent

    def flush(self) -> str:
        """The text is complete, or cut off: return the rest, with the end of its last span."""
        sent = self._scan(final=True) + self._writer.close()
        self._raw = self._mask = ""
        self._sent = self._at = 0
        self._passes = self._keeps = None
        return sent

    def _take(self, text: str) -> None:
        self._raw += text
        if not self._prose or "`" in text or "\n" in text:
            pieces = self._code.feed(text)
            last, code = pieces[-1]
            if last.strip(" \n"):
                self._prose = not code
            elif len(pieces) > 1 or last == "\n":
                self._prose = False
            text = "".join(_CODE * len(piece) if code else piece for piece, code in pieces)
        if '"' in text or (self._quoted and "\n" in text):
            text = _QUOTE_OR_LINE.sub(self._direct, text)
        self._mask += text

    def _direct(self, found: re.Match[str]) -> str:
        """A straight quote is an opening one if it is the first, third, ... of its line."""
        self._quoted = found[0] == '"' and not self._quoted
        return "\n" if found[0] == "\n" else "“" if self._quoted else "”"

    def _forget(self) -> None:
        """Drop text that is done with, and see what pieces need no looking at."""
        done = min(self._sent, self._at)
        if done:
            self._raw, self._mask = self._raw[done:], self._mask[done:]
            self._base += done
            self._sent -= done
            self._at -= done
        self._passes = self._keeps = None
        if not self._prose:
            return
        if self._unit == "latin" and self._plan.identify is not None:
            self._keeps = self._patterns("latin").boring.fullmatch
            self._keep = self._sent + (LOOK_AHEAD if self._glanced else GLANCE)
        elif not self._raw and not self._unit and self._kind not in (_ANY, _SENTENCE) and self._writer.opened:
            self._passes = self._patterns(self._kind).boring.fullmatch

    def _scan(self, final: bool) -> str:
        out: list[str] = []
        while self._settle(out, final) if self._unit else self._find(out, final):
            pass
        return "".join(out)

    def _patterns(self, kind: str) -> Patterns:
        return patterns(kind, kind == "latin" and self._plan.identify is not None)

    def _send(self, out: list[str], end: int) -> None:
        if end > self._sent:
            out.append(self._writer.text(self._raw[self._sent : end]))
            self._sent = end

    def _begin(self, language: str) -> str:
        """A span begins. Returns the end of the one before."""
        self._language = language
        if language:
            self.counts[language] = self.counts.get(language, 0) + 1
        return self._writer.switch(self._plan.tags[language] if language else None)

    def _opening(self, end: int) -> int:
        """Where the opening brackets and quotes before a place begin."""
        found = OPENING.search(self._mask, max(self._sent, end - 8), end)
        return found.start() if found else end

    def _find(self, out: list[str], final: bool) -> bool:
        """Look for the beginning of a unit, and send the text before it. False: there is none in the text so far."""
        mask, kind = self._mask, self._kind
        unsettled = self._language is None
        if unsettled and _FENCE.match(self._raw):  # a tag before it would make it no fence
            self._begin("")
            unsettled = False
        end = min(len(mask), self._sent + LOOK_AHEAD) if unsettled else len(mask)
        free = kind in (_ANY, _SENTENCE)
        found = (STRONG_OR_LINE if free else self._patterns(kind).border).search(mask, self._at, end)
        if found is None:
            partial = OPEN_END.search(mask, self._at) if kind == "latin" else None
            self._at = partial.start() if partial else end
            if unsettled and (final or end == self._sent + LOOK_AHEAD):
                self._begin(self._first)
                return True
            if not unsettled:
                self._send(out, end if final else self._opening(end))
            return False
        if script := SCRIPT.match(found[0]):
            self._start(out, found.start(), str(script.lastgroup))
            return True
        if found[0] == "\n":
            self._fresh, self._before = True, ""
        self._kind = _SENTENCE if len(found[0]) > 1 else _ANY
        self._at = found.end()
        return True

    def _start(self, out: list[str], at: int, script: str) -> None:
        """A unit begins at a letter, unless the sentence goes on."""
        self._at = at
        if self._kind == _SENTENCE:
            self._kind = "latin" if script == "latin" and LOWER.match(self._mask, at) else _ANY
            if self._kind:
                return
        if self._language is not None:
            self._send(out, self._opening(at))
        self._unit, self._glanced = script, False

    def _settle(self, out: list[str], final: bool) -> bool:
        """Settle the unit. False: more text is needed."""
        mask, at, script = self._mask, self._at, self._unit
        limit = self._sent + LOOK_AHEAD
        end = min(len(mask), limit)
        kana_alone = script == "kana" and self._kind == "han"
        kind = "ja" if script in ("han", "kana") and not kana_alone else script
        stop = self._patterns(kind).stop.search(mask, at, end)
        full = final or len(mask) >= limit
        unit = _Unit(
            at,
            stop.start() if stop else end,
            end,
            ended=stop is not None or full,
            full=full,
            alone=self._fresh and (stop[0] == "\n" if stop else final),
            fresh=self._fresh,
            returns=_FAMILY.get(script, script) == self._before and (script != "latin" or self._base + at - self._span_at <= INSERTION),
        )
        known = (self._latin_unit if script == "latin" else self._han_unit if kind == "ja" else self._other_unit)(unit)
        if known is None:
            return False
        language, kind = known
        if kind:
            if language != self._language:
                out.append(self._begin(language))
                self._before = "" if self._fresh else self._span_kind
                self._span_at = self._base + at
            self._kind = kind
            self._span_kind = _FAMILY.get(kind, kind)
        else:  # it is too short and stays where it is
            last = LAST_STRONG.match(mask, at, unit.stop)
            self._at = last.end() if last else at + 1
            self._first = self._first or language
        self._unit, self._fresh = "", False
        return True

    def _latin_unit(self, unit: _Unit) -> tuple[str, str] | None:
        """The language of a unit and what script the stream is in then, "" if it is too short; None: it is not known yet."""
        identifier = self._plan.identify
        glance = self._sent + GLANCE
        if identifier is not None and not self._glanced and unit.at < glance <= unit.stop:
            self._glanced = True
            if self._words(unit.at, glance) and identifier.continues(self._mask[unit.at : glance], self._latin):
                return self._latin, "latin"
        if not unit.ended and (identifier is not None or not (unit.returns or self._words(unit.at, unit.stop))):
            return None
        if not unit.alone and not self._words(unit.at, unit.stop, clause=unit.fresh):
            return self._latin, "latin" if unit.returns else ""
        if identifier is not None:
            self._latin = identifier.identify(self._mask[unit.at : unit.stop], self._latin)
        return self._latin, "latin"

    def _words(self, at: int, stop: int, clause: bool = False) -> bool:
        """Whether there are enough. ``clause``: two are if one is in small letters; it is a name else."""
        words = WORD.findall(self._mask, at, stop)
        return len(words) >= self._plan.minimum_words or (clause and len(words) > 1 and any(map(str.islower, words)))

    def _han_unit(self, unit: _Unit) -> tuple[str, str] | None:
        """As ``_latin_unit``, for Han and kana."""
        languages = self._plan.languages
        short = not unit.fresh and not self._letters("ja", unit)
        if short and not unit.ended:
            return None
        found = evidence().search(self._mask, unit.at, unit.stop if short else unit.end)
        if found is None and not short and not unit.full:
            return None
        kind = found.lastgroup if found else None
        if kind is not None and not short:
            self._japanese += 1 if kind == "ja" else -1
        if kind is None:
            letters = patterns("ja").letters.findall(self._mask, unit.at, found.start() if found else unit.end)
            kind = "ja" if self._japanese > 0 and len(letters) < WITHOUT_KANA else "han"
        return languages["kana" if kind == "ja" else "han"], "" if short else kind

    def _other_unit(self, unit: _Unit) -> tuple[str, str] | None:
        """As ``_latin_unit``, for scripts of one language."""
        script = self._unit
        language = self._plan.languages[script]
        if unit.alone or self._letters(script, unit):
            return language, script
        return (language, "") if unit.ended else None

    def _letters(self, kind: str, unit: _Unit) -> bool:
        """Whether there are enough."""
        return unit.returns or len(patterns(kind).letters.findall(self._mask, unit.at, unit.stop)) >= self._plan.minimum_characters
