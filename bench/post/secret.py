"""What a secret is here, how its characters count, and how the same secret is written in other ways."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
"""Characters that show nothing and may stand inside of a word."""
SEPARATORS = (" ", "-", "\u00a0", "\u2013", "\u3000", "\uff0d", " - ")
"""Space, dash, no-break space, en dash, full-width space and dash, and a dash between spaces."""
_RARELY = 0.08
_NOT_SIGNIFICANT = re.compile(r"[\W_]+")
_FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


class Secret(NamedTuple):
    """A secret and what must stand around it. ``enough``: so many of its characters before a cut are as secret as the whole.

    ``numeric``: its digits count, else its letters and digits do. ``lead`` and ``tail`` are no secrets: ``password=`` and a quote.
    """

    kind: str
    text: str
    enough: int
    numeric: bool
    lead: str = ""
    tail: str = ""


class Span(NamedTuple):
    """Where a secret is: characters ``start`` to ``end`` of a text, and ``enough`` and ``numeric`` of the secret."""

    kind: str
    start: int
    end: int
    enough: int
    numeric: bool


class Sample(NamedTuple):
    """A text and its secrets in the order in which they stand; ``language``: zh, en or mixed. ``layout``: what kind of text it is."""

    text: str
    spans: tuple[Span, ...]
    language: str
    layout: str


def significant(text: str) -> str:
    """The letters and digits of a text in their plain form (NFKC), small."""
    return _NOT_SIGNIFICANT.sub("", unicodedata.normalize("NFKC", text)).casefold()


def number(kind: str, text: str) -> Secret:
    """A secret of digits: four of them are enough."""
    return Secret(kind, text, _nth(text, 4, str.isdigit), True)


def textual(kind: str, text: str, enough: int = 0, *, lead: str = "", tail: str = "") -> Secret:
    """A secret of letters and digits; four of them are enough, unless ``enough`` says otherwise."""
    return Secret(kind, text, enough or _nth(text, 4, str.isalnum), False, lead, tail)


def _nth(text: str, n: int, counts: Callable[[str], bool]) -> int:
    """How many characters there are up to the n-th that counts; all, if there are fewer."""
    places = [i + 1 for i, c in enumerate(text) if counts(c)]
    return places[n - 1] if len(places) >= n else len(text)


# ---- other ways of writing it ----------------------------------------------------------------------------------------


def grouped(rng: random.Random, digits: str, groups: tuple[int, ...]) -> str:
    """Digits as they are usually written: in one, in groups, rarely one by one."""
    if rng.random() < 0.4:
        return digits
    separator = rng.choices(SEPARATORS, (8, 8, 2, 2, 1, 1, 1))[0]
    if rng.random() < _RARELY:
        return separator.strip(" ").join(digits) if len(separator) > 1 else separator.join(digits)
    parts, start = [], 0
    for size in groups:
        parts.append(digits[start : start + size])
        start += size
    assert start == len(digits), "the groups are of another number"
    return separator.join(parts)


def disguised(rng: random.Random, secret: Secret) -> Secret:
    """The same secret, rarely in full-width characters or with a zero-width character inside."""
    text, enough = secret.text, secret.enough
    if rng.random() < _RARELY:
        all_of_it = rng.random() < 0.6
        text = "".join(chr(_FULL_WIDTH.get(ord(c), ord(c))) if all_of_it or rng.random() < 0.3 else c for c in text)
    for _ in range(rng.choice((1, 1, 3)) if rng.random() < _RARELY else 0):
        place = rng.randrange(1, len(text))
        text = text[:place] + rng.choice(ZERO_WIDTH) + text[place:]
        enough += place < enough
    return secret._replace(text=text, enough=enough)
