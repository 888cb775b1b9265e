"""Writes GGUF files byte by byte, the impossible ones included: for tests of whatever reads model files."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edge_rt.core.gguf.reader import ARRAY, SCALARS, STRING, read_header

NUMBERS = {name: number for number, (name, _) in SCALARS.items()} | {"str": STRING}
"""GGUF's number of a metadata type, by name: u8 i8 u16 i16 u32 i32 u64 i64 f32 f64 bool str."""


def text(value: str | bytes) -> bytes:
    """A string: its length and its bytes."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def metadata(key: str | bytes, kind: str, value: Any) -> bytes:
    """One metadata entry; ``kind`` is a type's name, or ``[name]`` for an array of it."""
    if kind.startswith("["):
        number = NUMBERS[kind[1:-1]]
        return text(key) + struct.pack("<IIQ", ARRAY, number, len(value)) + b"".join(_element(number, item) for item in value)
    return text(key) + struct.pack("<I", NUMBERS[kind]) + _element(NUMBERS[kind], value)


def _element(number: int, value: Any) -> bytes:
    return text(value) if number == STRING else SCALARS[number][1].pack(value)


def tensor(name: str | bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
    """One tensor info: shape in ggml's order, ggml's type number, offset from the start of the data."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def build(
    values: Iterable[bytes],
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A whole file. ``counts`` (of tensors and of metadata entries) can be a lie."""
    values, tensors = list(values), list(tensors)
    n_tensors, n_values = counts or (len(tensors), len(values))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + b"".join([*values, *tensors])
    return head + bytes(-len(head) % alignment) + data


def edit_metadata(raw: bytes, changes: Mapping[str, tuple[str, Any] | None]) -> bytes:
    """A sound file with some metadata set to (kind, value), or removed (None); tensors and their data stay as they are."""
    header = read_header(raw, len(raw))
    entries: dict[str, tuple[str, Any] | None] = {}
    for key in header:
        kind = header.type_of(key) or ""
        entries[key] = (kind, header.raw_strings(key) if kind == "[str]" else header.get(key))
    entries.update(changes)
    values = [metadata(key, *entry) for key, entry in entries.items() if entry is not None]
    tensors = [tensor(info.name, info.shape, info.type, info.offset - header.data_offset) for info in header.tensors.values()]
    return build(values, tensors, raw[header.data_offset :], alignment=header.alignment)
