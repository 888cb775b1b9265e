"""How spans are written. Each format can be read back to the text exactly."""

from __future__ import annotations

import re
from collections.abc import Callable
from json.encoder import encode_basestring
from typing import NamedTuple

_XML = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", ord("\r"): "&#13;"}  # a bare \r is read as \n (XML 1.0, 2.11)
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_XML_SPECIAL = re.compile("[\x00-\x08\x0b-\x1f&<>\ud800-\udfff\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _plain(text: str) -> str:
    return text.replace("<", "<<")


def _xml(text: str) -> str:
    return _NO_XML.sub("\ufffd", text).translate(_XML) if _XML_SPECIAL.search(text) else text


def _json(text: str) -> str:
    written: str = encode_basestring(text)[1:-1]
    return written if written.isascii() else _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", written)


class Format(NamedTuple):
    """How a span begins and ends, with ``{tag}`` for its language, and how text is written in it.

    ``always``: also spans of the primary and of no known language. ``lines``: a span ends with each line and goes on in a new one.
    """

    begin: str
    end: str
    text: Callable[[str], str]
    always: bool = False
    lines: bool = False


FORMATS = {
    "plain": Format("<{tag}>", "</{tag}>", _plain),
    "ssml": Format('<lang xml:lang="{tag}">', "</lang>", _xml),
    "json": Format('{{"lang":"{tag}","text":"', '"}}\n', _json, always=True, lines=True),
}


class Writer:
    """One stream. A span begins with its first text, so none is empty."""

    def __init__(self, form: Format) -> None:
        self._form, self._begin, self._end = form, "", ""
        self.opened = False

    def switch(self, tag: str | None) -> str:
        """What follows is in a language, None: it is not marked. Returns the end of the span before."""
        end = self.close()
        form = self._form
        marked = tag is not None or form.always
        self._begin, self._end = (part.format(tag=tag or "und") if marked else "" for part in (form.begin, form.end))
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
