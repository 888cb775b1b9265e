"""Sizes in bytes as people write and read them. K, M, G and T are powers of 1024."""

from __future__ import annotations

from edge_rt.errors import OptionError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse(text: str, what: str) -> int:
    """Bytes of ``500M``, ``1.5G``, ``64 MiB`` or a plain number. ``what``: whose size it is, for the error. Raises OptionError."""
    number = text.strip().upper().removesuffix("B").removesuffix("I").rstrip()
    unit = number[-1:] if number[-1:] in _UNITS else ""
    try:
        size = float(number.removesuffix(unit)) * _UNITS[unit]
        if not 1 <= size < 1 << 60:
            raise ValueError
    except (ValueError, OverflowError):
        raise OptionError(f"{what} takes a size as 500M or 1.5G and not {text!r}") from None
    return int(size)


def shown(size: float) -> str:
    """Bytes for a person: ``93M``, ``1.5G``."""
    if size < 10 << 30:
        return f"{round(size / (1 << 20)):,}M"
    return f"{size / (1 << 30):.1f}G"
