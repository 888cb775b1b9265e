"""GBNF for JSON numbers between bounds and JSON strings of a format or pattern."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import NoReturn

from edge_rt.structured.grammar import MAX_REPETITIONS, Terminal, complement

# GBNF for JSON numbers between bounds. Every number written satisfies the bounds; not every one that does can be written.

DIGITS = 16  # before and after the point; more a double cannot hold
INTEGER = f'"-"? ("0" | [1-9] [0-9]{{0,{DIGITS - 1}}})'
NUMBER = f'{INTEGER} ("." [0-9]{{1,{DIGITS}}})? ([eE] [-+]? [0-9] [0-9]?)?'
MAX_DIGITS = 40  # of a bound
_TOP = 10**DIGITS - 1


def integer(low: int | None, high: int | None) -> str | None:
    """Integers in [low, high], None: no bound; None if there is none."""
    if low is None and high is None:
        return INTEGER
    low = min(-_TOP, high or 0) if low is None else low
    high = max(_TOP, low) if high is None else high
    parts = []
    if low < 0:
        below = _whole(max(1, -high), -low)
        parts += [f'"-" ({below})'] if below else []
    if high >= 0:
        parts.append(_whole(max(0, low), high))
    return " | ".join(part for part in parts if part) or None


def number(low: Decimal | None, high: Decimal | None) -> str | None:
    """Decimal fractions in [low, high], None: no bound; None if there is none. No exponent unless both bounds are missing."""
    if low is None and high is None:
        return NUMBER
    low = min(Decimal(-_TOP), high or Decimal(0)) if low is None else low
    high = max(Decimal(_TOP), low) if high is None else high
    parts = []
    if low < 0:
        below = _magnitude(max(Decimal(0), -high), -low)
        parts += [f'"-" ({below})'] if below else []
    if high >= 0:
        parts.append(_magnitude(max(Decimal(0), low), high))
    return " | ".join(part for part in parts if part) or None


def _span(low: str, high: str) -> str:
    """One digit between two."""
    return f'"{low}"' if low == high else f"[{low}-{high}]"


def _any(n: int) -> str:
    """``n`` digits."""
    return f" [0-9]{{{n}}}" if n else ""


def _whole(low: int, high: int) -> str:
    """Integers in [low, high], both >= 0, without leading zeros; empty if there is none."""
    if low > high:
        return ""
    parts, full = [], []  # full: lengths of which every number is wanted
    for length in range(len(str(low)), len(str(high)) + 1):
        least, most = (10 ** (length - 1) if length > 1 else 0), 10**length - 1
        if length > 1 and low <= least and most <= high:
            full.append(length - 1)
        else:
            parts += _same_length(str(max(low, least)), str(min(high, most)))
    if full:
        parts.append(f"[1-9] [0-9]{{{full[0]},{full[-1]}}}")
    return " | ".join(parts)


def _same_length(low: str, high: str) -> list[str]:
    """Digit strings between two of the same length."""
    if not low:
        return [""]
    rest = len(low) - 1
    if low[1:] == "0" * rest and high[1:] == "9" * rest:
        return [_span(low[0], high[0]) + _any(rest)]
    if low[0] == high[0]:
        return [f'"{low[0]}" {tail}'.strip() for tail in _same_length(low[1:], high[1:])]
    first, last = int(low[0]) + 1, int(high[0]) - 1
    parts = [f'"{low[0]}" {tail}'.strip() for tail in _same_length(low[1:], "9" * rest)]
    if first <= last:
        parts.append(_span(str(first), str(last)) + _any(rest))
    return parts + [f'"{high[0]}" {tail}'.strip() for tail in _same_length("0" * rest, high[1:])]


def _magnitude(low: Decimal, high: Decimal) -> str:
    """Fractions in [low, high], both >= 0; empty if there is none."""
    if low > high:
        return ""
    (low_whole, low_rest), (high_whole, high_rest) = _split(low), _split(high)
    if low_whole == high_whole:
        return _with_fraction(f'"{low_whole}"', low_rest, high_rest)
    parts = [_with_fraction(f'"{low_whole}"', low_rest, None)]
    if between := _whole(low_whole + 1, high_whole - 1):
        parts.append(_with_fraction(f"({between})", "", None))
    parts.append(_with_fraction(f'"{high_whole}"', "", high_rest))
    return " | ".join(parts)


def _split(value: Decimal) -> tuple[int, str]:
    """The whole part and the digits after the point, without zeros at the end."""
    whole, _, rest = format(value, "f").partition(".")
    return int(whole), rest.rstrip("0")


def _with_fraction(whole: str, low: str, high: str | None) -> str:
    """A whole part, then a fraction between 0.low and 0.high (None: up to the next whole number)."""
    digits = _fraction(low, high)
    return f'{whole} ("." ({digits}))?' if not low else f'{whole} "." ({digits})'


def _fraction(low: str, high: str | None) -> str:
    """One or more digits d with 0.low <= 0.d <= 0.high. What may end before more digits has low == "" left."""
    if not low and high is None:
        return f"[0-9]{{1,{DIGITS}}}"
    if not low and not high:
        return f'"0"{{1,{DIGITS}}}'
    first = low[:1] or "0"
    if high is None:
        parts = [_more(first, low[1:], None)]
        if first < "9":
            parts.append(f"{_span(chr(ord(first) + 1), '9')} [0-9]{{0,{DIGITS}}}")
        return " | ".join(parts)
    last = high[:1] or "0"
    if first == last:
        return _more(first, low[1:], high[1:])
    parts = [_more(first, low[1:], None), _more(last, "", high[1:])]
    if ord(last) - ord(first) > 1:
        parts.append(f"{_span(chr(ord(first) + 1), chr(ord(last) - 1))} [0-9]{{0,{DIGITS}}}")
    return " | ".join(parts)


def _more(digit: str, low: str, high: str | None) -> str:
    """A digit and what may follow it."""
    return f'"{digit}" ({_fraction(low, high)}){"" if low else "?"}'


# GBNF for JSON strings: sets of characters as JSON writes them, formats, and regular expressions (the common part of ECMA 262).

_HEX = "[0-9a-fA-F]"
# One character. Halves of surrogate pairs cannot be written as \u escapes: they would count as characters of their own.
CHAR = rf'[^"\\\x00-\x1f\x7f] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-CefEF] {_HEX}{{3}} | [dD] [0-7] {_HEX}{{2}}))'

_DAY = '"-" ("0" [1-9] | [1-2] [0-9] | "3" '
_DATE = (
    f'[1-2] [0-9]{{3}} "-" (("0" [13578] | "1" [02]) {_DAY}[0-1]) | ("0" [469] | "11") {_DAY}"0")'
    ' | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8]))'
)
_HOUR = '("0" [0-9] | "1" [0-9] | "2" [0-3])'
_TIME = f'{_HOUR} ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{{1,6}})? ("Z" | [-+] {_HOUR} ":" [0-5] [0-9])'
FORMATS = {  # grammar between the quotes, shortest and longest text
    "date": (_DATE, 10, 10),
    "time": (_TIME, 9, 21),
    "date-time": (f'{_DATE} "T" {_TIME}', 20, 32),
    "uuid": (' "-" '.join(f"{_HEX}{{{n}}}" for n in (8, 4, 4, 4, 12)), 36, 36),
}

_ESCAPED = {0x22: '\\"', 0x5C: "\\\\", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t", 0x08: "\\b", 0x0C: "\\f"}  # as JSON writes them
_NOT_RAW: Terminal = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), (0xD800, 0xDFFF))


def literal(text: str) -> str:
    """A GBNF literal for exactly this text."""
    for c, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(c, escape)
    return f'"{text}"'


def characters(ranges: Terminal) -> str:
    """One character of a set, as it is written inside a JSON string; empty if none can be."""
    allowed = complement([*complement(ranges), *_NOT_RAW])
    inside = "".join(_code(low) if low == high else f"{_code(low)}-{_code(high)}" for low, high in allowed)
    parts = [f"[{inside}]"] if inside else []
    for code, escape in _ESCAPED.items():
        if any(low <= code <= high for low, high in ranges):
            parts.append(literal(escape))
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})" if parts else ""


def _code(code: int) -> str:
    c = chr(code)
    return c if c.isascii() and c.isalnum() else f"\\U{code:08X}" if code > 0xFFFF else f"\\u{code:04X}"


# ---- regular expressions ---------------------------------------------------------------------------------------------

_DIGIT: Terminal = ((0x30, 0x39),)
_WORD: Terminal = (*_DIGIT, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Terminal = ((0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
                    (0x205F, 0x205F), (0x3000, 0x3000))  # fmt: skip  # not U+FEFF, a space to ECMA 262 only
_NO_SPACE = complement([*_SPACE, (0x1C, 0x1F), (0x85, 0x85), (0xFEFF, 0xFEFF)])  # in no dialect
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE, "D": complement(_DIGIT), "W": complement(_WORD), "S": _NO_SPACE}
_DOT = complement([(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)])
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_DEEPEST = 50


class Pattern:
    """A regular expression, translated. JSON Schema looks for it anywhere in the text unless ``^`` and ``$`` tie it down."""

    def __init__(self, pattern: str, fail: Callable[[str], NoReturn], char: str) -> None:
        """``fail`` raises the error; ``char`` names the rule for any one character."""
        self._text, self._fail, self._char = pattern, fail, char
        self._at = self._depth = 0

    def grammar(self) -> str:
        """The GBNF between the quotes."""
        result = self._alternatives(top=True)
        if self._at < len(self._text):
            self._wrong("a ) without its (")
        return result

    def _wrong(self, what: str) -> NoReturn:
        self._fail(f"pattern {self._text!r} has {what} at character {self._at + 1}")

    def _take(self, *options: str) -> str:
        """Take the first of some texts that comes next; empty if none does."""
        found = next((option for option in options if self._text.startswith(option, self._at)), "")
        self._at += len(found)
        return found

    def _alternatives(self, top: bool = False) -> str:
        parts = [self._sequence(top)]
        while self._take("|"):
            parts.append(self._sequence(top))
        return parts[0] if len(parts) == 1 else " | ".join(parts)

    def _sequence(self, top: bool) -> str:
        before, after = ("" if self._take("^") else f"{self._char}*", f"{self._char}*") if top else ("", "")
        parts = [before]
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            if top and self._take("$"):
                after = ""
                if self._at < len(self._text) and self._text[self._at] != "|":
                    self._wrong("text after $")
                break
            parts.append(self._quantified(self._atom()))
        return " ".join(part for part in (*parts, after) if part) or '""'

    def _atom(self) -> str:
        if self._take("("):
            return self._group()
        if self._take("["):
            ranges = self._class()
        elif self._take("."):
            ranges = _DOT
        elif (c := self._text[self._at]) in "^$*+?{":
            self._wrong(f"{c!r} where it cannot be enforced")
        elif self._take("\\"):
            ranges = self._escape()
        else:
            self._at += 1
            ranges = ((ord(c), ord(c)),)
        return characters(ranges) or self._wrong("a character that JSON text cannot hold")

    def _group(self) -> str:
        if self._take("?") and not self._take(":"):
            if self._text[self._at : self._at + 1] != "<" or self._text[self._at + 1 : self._at + 2] in ("=", "!"):
                self._wrong("a look-ahead or look-behind, which cannot be enforced,")
            self._at = self._text.find(">", self._at) + 1 or self._wrong("a group name that does not end")
        self._depth += 1
        if self._depth > _DEEPEST:
            self._wrong(f"more than {_DEEPEST} nested groups")
        inside = self._alternatives()
        if not self._take(")"):
            self._wrong("a ( without its )")
        self._depth -= 1
        return f"({inside})"

    def _class(self) -> Terminal:
        negated = bool(self._take("^"))
        ranges: list[tuple[int, int]] = []
        while not self._take("]"):
            low = self._class_atom()
            if self._text[self._at : self._at + 1] == "-" and not self._text.startswith("-]", self._at):
                self._at += 1
                high = self._class_atom()
                (first, same), (also, last) = low[0], high[0]
                if len(low) > 1 or len(high) > 1 or first != same or also != last or last < first:
                    self._wrong("a range that is none")
                low = ((first, last),)
            ranges.extend(low)
        return complement(ranges) if negated else tuple(ranges)

    def _class_atom(self) -> Terminal:
        if self._at >= len(self._text):
            self._wrong("a [ without its ]")
        if self._take("\\"):
            return ((8, 8),) if self._take("b") else self._escape()
        c = self._text[self._at]
        self._at += 1
        return ((ord(c), ord(c)),)

    def _escape(self) -> Terminal:
        """What a backslash stands for."""
        c = self._text[self._at : self._at + 1] or self._wrong("a single \\")
        if c in "bBpPkc" or c in "123456789":
            self._wrong(f"\\{c}, which cannot be enforced,")
        self._at += 1
        if c in _CLASSES:
            return _CLASSES[c]
        code = _CONTROLS.get(c, ord(c))
        if c in "xu":
            digits = self._text[self._at : self._at + (2 if c == "x" else 4)]
            if len(digits) != (2 if c == "x" else 4) or not all(d in "0123456789abcdefABCDEF" for d in digits):
                self._wrong(f"an incomplete \\{c}")
            self._at += len(digits)
            code = int(digits, 16)
        return ((code, code),)

    def _quantified(self, atom: str) -> str:
        c = self._take("*", "+", "?", "{")
        if c == "{":
            end = self._text.find("}", self._at)
            low, comma, high = self._text[self._at : end].partition(",") if end >= 0 else ("", "", "")
            if not (low.isascii() and low.isdigit() and (not high or (high.isascii() and high.isdigit()))):
                self._wrong("an incomplete number of repetitions")
            if max(int(low), int(high or 0)) > MAX_REPETITIONS:
                self._wrong(f"more than {MAX_REPETITIONS} repetitions")
            if high and int(high) < int(low):
                self._wrong("fewer repetitions at most than at least")
            self._at = end + 1
            c = f"{{{low}{comma}{high}}}"
        if c:
            self._take("?")  # lazy: which match is found is all the same here
            if self._text[self._at : self._at + 1] in ("*", "+", "?", "{"):
                self._wrong("a repetition of a repetition")
        return atom + c


def strings(values: Iterable[object]) -> str:
    """Exactly these JSON values."""
    return " | ".join(literal(json.dumps(value, ensure_ascii=False)) for value in values)
