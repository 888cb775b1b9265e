"""Sizes in bytes as people write and read them. Written, K, M, G and T are powers of 1024; shown, kB, MB, GB and TB are powers of 1000."""

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
    """Bytes for a person: 98.4 MB. All that edge-rt writes has this form; its page in a browser, too."""
    if abs(size) < 1000:
        return f"{size:.0f} B"
    for unit in "kMGT":
        size /= 1000
        if abs(size) < 999.95 or unit == "T":
            break
    return f"{size:.1f} {unit}B"
