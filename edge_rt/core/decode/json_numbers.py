"""GBNF for JSON numbers between bounds. Every number written satisfies the bounds; not every one that does can be written."""

from __future__ import annotations

from decimal import Decimal

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
