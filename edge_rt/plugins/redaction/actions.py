"""What stands in the text where a secret was: a placeholder, a hash by which equal secrets are recognised, or stars."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable

from edge_rt.plugins.redaction.characters import significant

MAX_KEPT = 16
"""Characters that a mask may show at either end."""
UNCLEAR = 1 << 16
"""The rank of what a cut left unclear: any other match names the whole."""
_STARS = 32
_HASH_DIGITS = 12


class Concealed:
    """A secret while it is read. It may be long, so only its ends, its length and its hash are kept."""

    def __init__(self, start: int, key: bytes) -> None:
        self.start = self.end = start
        self.kind = ""
        self.rest: re.Pattern[str] | None = None
        self._best = (-1, 0, 0)
        self._hash = hmac.new(key, digestmod=hashlib.sha256) if key else None
        self._first = self._last = ""
        self._length = 0

    def add(self, kind: str, rank: int, start: int, end: int, rest: re.Pattern[str] | None) -> None:
        """A match that is part of it. The longest names it, of equal ones the first, of those the one of the lowest rank."""
        better = (end - start, -start, -rank)
        if rank == UNCLEAR:
            better = (0, 0, 0)
        if better > self._best:
            self._best, self.kind = better, kind
        self.end = max(end, self.end)
        if rest is not None and (self.rest is None or len(self.rest.pattern) < len(rest.pattern)):
            self.rest = rest

    def read(self, text: str) -> None:
        """Its next characters."""
        plain = significant(text)
        if self._hash is not None:
            self._hash.update(plain.casefold().encode(errors="surrogatepass"))
        if len(self._first) < MAX_KEPT:
            self._first = (self._first + plain)[:MAX_KEPT]
        self._last = (self._last + plain)[-MAX_KEPT:]
        self._length += len(plain)

    def stars(self, first: int, last: int) -> str:
        """Its first and last characters with stars between; stars alone if those were fewer than four, or than a third."""
        if self._length - first - last < max(4, self._length / 3):
            first = last = 0
        hidden = min(self._length - first - last, _STARS)
        return self._first[:first] + "*" * hidden + (self._last[-last:] if last else "")

    def hashed(self) -> str:
        """The first digits of its HMAC-SHA256."""
        return self._hash.hexdigest()[:_HASH_DIGITS] if self._hash is not None else ""


Conceal = Callable[[Concealed], str]


def placeholder(text: str) -> Conceal:
    """Conceals by a text."""
    return lambda secret: text


def mask(first: int, last: int) -> Conceal:
    """Conceals by stars but for some characters at the ends."""
    return lambda secret: secret.stars(first, last)


def hash_of(name: str) -> Conceal:
    """Conceals by a keyed hash."""
    return lambda secret: f"[{name}:{secret.hashed()}]"
