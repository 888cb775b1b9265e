"""Tells prose from what terms leave alone: code, and addresses of the web and of mail."""

from __future__ import annotations

import re

from edge_rt.hooks import CodeSpans

_MARK = re.compile(r"[a-z0-9]://|(?<![a-z0-9_.-])www\.|[a-z0-9._%+-]@", re.IGNORECASE | re.ASCII)
"""From here on it is an address. Four characters at most, the one before ``www`` included."""
_END = re.compile(r"[^a-z0-9._~:/?#\[\]@!$&'()*+,;=%-]", re.IGNORECASE | re.ASCII)
"""What is in no address (RFC 3986)."""
_LOCAL = re.compile(r"[a-z0-9._%+-]{0,64}", re.IGNORECASE | re.ASCII)
_LONGEST_LOCAL = 64  # characters before the @ (RFC 5321)
MAX_LOOK = _LONGEST_LOCAL + len("://")
"""Characters after a term that tell whether it is the beginning of an address."""


class Prose:
    """One stream. Nothing is held back, so the beginning of an address, up to its ``://`` or ``@``, counts as prose."""

    def __init__(self, *, in_code: bool, in_addresses: bool) -> None:
        """``in_code``, ``in_addresses``: whether these are prose too."""
        self._code = None if in_code else CodeSpans()
        self._find_addresses = not in_addresses
        self._in_address = False
        self._before = ""  # prose just before, in which a mark may begin

    def feed(self, text: str) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is prose."""
        pieces = [(text, False)] if self._code is None else self._code.feed(text)
        if not self._find_addresses:
            return [(piece, not code) for piece, code in pieces]
        found = []
        for piece, code in pieces:
            if code:
                self._in_address, self._before = False, ""
                found.append((piece, False))
            elif self._in_address or "@" in piece or "/" in piece or "." in piece:
                found += self._divide(piece)
            else:
                self._before = (self._before + piece[-4:])[-4:]
                found.append((piece, True))
        return found

    def _divide(self, piece: str) -> list[tuple[str, bool]]:
        whole, at, start = self._before + piece, len(self._before), 0  # start: of the prose
        found = []
        while at < len(whole):
            if self._in_address:
                match = _END.search(whole, at)
                end = start = match.start() if match else len(whole)
            else:
                match = _MARK.search(whole, max(start, at - 3))  # one that ends after at
                end = match.end() if match else len(whole)
            if end > at:
                found.append((whole[at:end], not self._in_address))
            at = end
            if match:
                self._in_address = not self._in_address
        self._before = "" if self._in_address else whole[start:][-4:]
        return found


def may_be_address(text: str, at: int) -> bool | None:
    """Whether the word that goes on at a place turns out to be the beginning of an address; None: the text does not say yet."""
    found = _LOCAL.match(text, at)
    end = found.end() if found else at
    if end - at == _LONGEST_LOCAL:
        return False
    rest = text[end : end + 3]
    if rest[:1] == "@" or rest == "://":
        return True
    return None if "://".startswith(rest) else False
