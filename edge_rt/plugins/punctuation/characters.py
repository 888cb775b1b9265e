"""Characters of Chinese and English text, as punctuation sees them."""

from __future__ import annotations

import re

from edge_rt.hooks import HALF_WIDTH

HAN = "\u3005-\u3007\u3040-\u30ff\u3105-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Letters that are written with full-width marks: Han, kana, bopomofo. For a character class of a pattern."""
NARROW = "0-9A-Za-z\u00c0-\u024f\u0300-\u036f\u0370-\u03ff\u0400-\u04ff\u1e00-\u1eff\uac00-\ud7a3"
"""Letters and digits that are written with ASCII marks: Latin, Greek, Cyrillic, Hangul."""

HAN_LETTER = re.compile(f"[{HAN}]")
WORD_START = re.compile(f"(?<![{NARROW}])(?<![{NARROW}]['’.,:])[{NARROW[3:]}]")  # numbers are of no language
FULL_WIDTH_ALNUM = re.compile("[０-９Ａ-Ｚａ-ｚ]")
TO_ASCII = {code: half for code, half in HALF_WIDTH.items() if chr(half).isalnum()}

FULL = dict(zip(",.?!:;()", "，。？！：；（）", strict=True))
HALF = {full: half for half, full in FULL.items()}
CLOSERS = dict(zip("([（“‘「『《〈【〔\"'", ")]）”’」』》〉】〕\"'", strict=True))
"""What closes each opening bracket and quote."""
QUOTES = "“‘「『\"'"
OPENERS = {closer: opener for opener, closer in CLOSERS.items()} | {")": "(", "）": "("}
"""What each closes; brackets of both widths close each other."""

# Kinds of neighbours of a mark.
WIDE, LETTER, BREAK, CLOSER, CODE, OTHER = range(6)
_NEIGHBOURS = (
    dict.fromkeys("）】》」』〉〕，。？！：；、…", WIDE)
    | dict.fromkeys("%％‰℃°)]\"'”’`$€¥+#", LETTER)
    | dict.fromkeys(("", "\n", "\r", " ", "\t", "\u3000"), BREAK)
    | dict.fromkeys("/=\\_@&^~{}<>(-", CODE)
)
_RIGHT = (
    _NEIGHBOURS
    | dict.fromkeys("“‘「『《〈【〔（", WIDE)
    | dict.fromkeys("）】》」』〉〕)]\"'”’，。？！：；、…!?", CLOSER)
    | dict.fromkeys("[,.:;#+", CODE)
)


def _letter(character: str) -> int:
    if HAN_LETTER.match(character):
        return WIDE
    return LETTER if character.isalnum() else OTHER


def left_kind(before: str) -> int:
    """What a mark follows; ``before`` is the text up to it. Marks of emphasis do not count."""
    character = before[-1:]
    if character in ("*", "_"):
        character = before.rstrip("*_")[-1:]
    found = _NEIGHBOURS.get(character)
    return _letter(character) if found is None else found


def right_kind(character: str) -> int:
    """What follows a mark; "" at the end of the text."""
    found = _RIGHT.get(character)
    return _letter(character) if found is None else found
