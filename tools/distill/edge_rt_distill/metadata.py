"""Entries of a GGUF's metadata as bytes, for files that take most of theirs from another one as they are."""

from __future__ import annotations

import struct

from edge_rt.hooks import OptionError

Value = str | bool | int | float | list[int]
INT32, FLOAT32, STRING = 5, 6, 8
"""Types of elements that ``array`` is used with."""
_UINT32, _BOOL, _ARRAY = 4, 7, 9


def start(tensors: int, entries: int) -> bytes:
    """What a file begins with."""
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, entries)


def string(text: str | bytes) -> bytes:
    """A text behind its length."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, value: Value) -> bytes:
    """A metadata entry; whole numbers are u32, also in lists, others f32. Raises OptionError for numbers that do not fit."""
    if isinstance(value, str):
        return string(key) + struct.pack("<I", STRING) + string(value)
    if isinstance(value, list):
        return array(key, _UINT32, len(value), struct.pack(f"<{len(value)}I", *value))
    kind, layout = (_BOOL, "<I?") if isinstance(value, bool) else (_UINT32, "<II") if isinstance(value, int) else (FLOAT32, "<If")
    try:
        return string(key) + struct.pack(layout, kind, value)
    except (struct.error, OverflowError):
        raise OptionError(f"{key} cannot be {value} in a GGUF; give a number of 32 bits") from None


def array(key: str, kind: int, count: int, elements: bytes) -> bytes:
    """An entry of so many elements of a type, which are there as bytes."""
    return string(key) + struct.pack("<IIQ", _ARRAY, kind, count) + elements
