"""Characters as terms see them: width, case, and where a word begins and ends."""

from __future__ import annotations

import re
from functools import lru_cache
from unicodedata import category

from edge_rt.hooks import HALF_WIDTH

_WIDTH = {**HALF_WIDTH, 0xA0: 0x20}
_CASED = (range(0x41, 0x2E00), range(0xA640, 0xA800), range(0x10400, 0x10430))  # where letters have an upper and a lower case
_LOWER = {code: ord(low) for codes in _CASED for code in codes if len(low := chr(code).lower()) == 1 and ord(low) != code}
_FOLD = _LOWER | {code: _LOWER.get(half, half) for code, half in _WIDTH.items()}
_WIDE = re.compile(f"[{re.escape(''.join(map(chr, _WIDTH)))}]")
_FOLDED = re.compile(f"[{re.escape(''.join(map(chr, _FOLD)))}]")

# Thai and Lao; Burmese; Hangul; Khmer; Han, kana and more to Yi; Hangul; Han; half-width kana and Hangul; more kana; more Han.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc"
    "\U0001b000-\U0001b2ff\U00020000-\U0003ffff"
)
_UNBOUND = re.compile(f"[{_SPACELESS}]")
_WORD = re.compile(f"[^\\W{_SPACELESS}]")
_JOINER = "\u200d"


def narrow(text: str) -> str:
    """The text with full-width characters as half-width ones, of the same length."""
    return text if text.isascii() or not _WIDE.search(text) else text.translate(_WIDTH)


def fold(text: str) -> str:
    """The text, narrow and in lower case, of the same length: each character depends on itself alone, which is not so of ``lower``."""
    if text.isascii():
        return text.lower()
    return text.translate(_FOLD) if _FOLDED.search(text) else text


def unbound(character: str) -> bool:
    """Whether a character is of a script that puts no spaces between words, where a term may begin and end anywhere."""
    return not character.isascii() and _UNBOUND.match(character) is not None


@lru_cache(1024)  # asked for almost every token; the cache takes a third of the time
def in_word(character: str) -> bool:
    """Whether a character is part of a word that ends at a space: a letter, digit, mark or underscore."""
    if character.isascii():
        return character.isalnum() or character == "_"
    return _WORD.match(character) is not None or category(character)[0] == "M"


def continues(character: str) -> bool:
    """Whether a character belongs to the one before it: an accent, a joiner, a skin tone."""
    return not character.isascii() and (character == _JOINER or category(character)[0] == "M" or "\U0001f3fb" <= character <= "\U0001f3ff")


def begins(text: str, at: int) -> bool:
    """Whether a term may begin at a character, by those before it."""
    if not at:
        return True
    c, before = text[at], text[at - 1]
    if not in_word(c):
        return before != _JOINER
    if in_word(before) or before == _JOINER:
        return False
    return not (at > 1 and joins(text[at - 2], before, c))


def joins(before: str, mark: str, after: str) -> bool:
    """Whether a point or comma is inside something (``node.js``, ``3.5``, ``1,000``) and no punctuation."""
    if mark == ".":
        return in_word(before) and (after.islower() or after.isdigit())
    return mark == "," and before.isdigit() and after.isdigit()


def in_case_of(text: str, preferred: str) -> str:
    """A preferred form in lower case as the text is: UPPER, Capitalised, or lower. Another has a case of its own."""
    if preferred != preferred.lower() or text == text.lower():
        return preferred
    letters = [c for c in text if c.lower() != c.upper()]
    if len(letters) > 1 and all(c.isupper() for c in letters):
        return preferred.upper()
    return preferred[0].upper() + preferred[1:] if letters[0].isupper() else preferred
