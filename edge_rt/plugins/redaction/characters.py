"""Characters as the detectors see them: full-width forms are ordinary ones, dashes are dashes, invisible characters are passed over.

``plain`` maps one character to one, so that positions in what is seen are positions in the text.
"""

from __future__ import annotations

import unicodedata

SKIP = "\u200b"
"""What every character that is passed over is seen as."""

_MARKS = ("Cf", "Mn", "Me")
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"
_OTHER_DOTS = "•∙⋅‧・･●"
# Full-width forms, small forms, mathematical letters, and letters and digits in circles.
_FORMS = ((0xFF00, 0xFF5F), (0xFE50, 0xFE70), (0x1D400, 0x1D800), (0x2460, 0x2469), (0x24B6, 0x24EA))
_OTHER_DASHES = "\u2212\u02d7\u2043\u207b\u208b"


def plain(char: str) -> str:
    """One character as it is seen: SKIP for those that show nothing or only mark another (zero width, soft hyphen, accents, keycaps)."""
    code = ord(char)
    if code < 0xA0:
        return char
    category = unicodedata.category(char)
    if category in _MARKS or char in _BLANK_LETTERS:
        return SKIP
    if category == "Zs":
        return " "
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category == "Pd" or char in _OTHER_DASHES:
        return "-"
    if char in _OTHER_DOTS:
        return "·"
    if any(low <= code < high for low, high in _FORMS):
        wide = unicodedata.normalize("NFKC", char)
        return wide if len(wide) == 1 else char
    return char


def folded(char: str) -> str:
    """A plain character without case and accent."""
    if char.isascii():
        return char.lower()
    low = unicodedata.normalize("NFD", char)[0].lower()
    return low if len(low) == 1 else char


class _Table(dict[int, str]):
    """For ``str.translate``; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        if len(self) > 20_000:  # a text of all of Unicode must not fill the memory
            self.clear()
        self[code] = seen = plain(chr(code))
        return seen


_PLAIN = _Table()
_LETTERS_AND_DIGITS = str.maketrans("", "", " \t\r\n-·()" + SKIP)


def view(text: str) -> str:
    """A text as the detectors see it, of the same length."""
    return text if text.isascii() else text.translate(_PLAIN)


def significant(text: str) -> str:
    """What is left of a text without what may separate the parts of a secret."""
    return view(text).translate(_LETTERS_AND_DIGITS)
