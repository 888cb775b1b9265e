"""Reads a GGUF header (versions 2 and 3, little-endian) in Python, so that no native code ever sees an unchecked one."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import Any, NamedTuple, TypeVar, cast

from edge_rt.errors import ModelFileError, UnsupportedModel

# Constants of the GGUF format: tensor types, metadata types, and what other files start with.

GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""ggml type id -> (name, elements in a block, bytes of a block). Held against libggml by a test."""

REMOVED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""ggml type ids that files may still carry and no library reads any more."""

STRING, ARRAY = 8, 9
"""GGUF numbers of the two metadata types that are not scalars."""

SCALARS: dict[int, tuple[str, struct.Struct]] = {
    0: ("u8", struct.Struct("<B")),
    1: ("i8", struct.Struct("<b")),
    2: ("u16", struct.Struct("<H")),
    3: ("i16", struct.Struct("<h")),
    4: ("u32", struct.Struct("<I")),
    5: ("i32", struct.Struct("<i")),
    6: ("f32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<?")),
    10: ("u64", struct.Struct("<Q")),
    11: ("i64", struct.Struct("<q")),
    12: ("f64", struct.Struct("<d")),
}
"""GGUF number of a scalar metadata type -> (name, layout)."""

NOT_GGUF: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?); convert it to GGUF first"),
    (b"tjgg", "an old GGML model (GGJT); convert the original model to GGUF"),
    (b"fmgg", "an old GGML model (GGMF); convert the original model to GGUF"),
    (b"lmgg", "an old GGML model; convert the original model to GGUF"),
    (b"algg", "an old GGLA adapter; convert the original model to GGUF"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it first"),
    (b"\x93NUMPY", "a NumPy array, not a model"),
    (b"version https://git-lfs", "a Git LFS pointer, not the model; run `git lfs pull`"),
    (b"<", "a web page, not a model; download it again"),
    (b"{", "a JSON file, not a model"),
)
"""First bytes of a file -> what it is, to end the sentence 'this is not a GGUF model but ...'."""


# Reads a GGUF header (versions 2 and 3, little-endian) in Python, so that no native code ever sees an unchecked file.
#
# Layout: magic, version u32, tensor count u64, metadata count u64, metadata, tensor infos, padding, tensor data.
# A metadata value is a scalar, a string (length u64, bytes) or an array (element type u32, count u64, elements).
#
# Whatever the bytes are, ``read_header`` returns a consistent header or raises ModelFileError.

T = TypeVar("T")
Buffer = bytes | memoryview | mmap

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
FOLDED, SCALED = "edge_rt.folded", "edge_rt.scaled"
"""Metadata that the compiler adds: names of norms whose scales are all one, and those of them that became so as their scales were
multiplied into the weights behind them, so that adapters of the source model do not fit.
"""
MAX_TENSOR_NAME = 63
"""Bytes; ggml keeps names in a 64-byte field."""

# Far above any real model; they bound the time a hostile file can take (a sparse file can be as large as it likes).
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_STRINGS = 1 << 22
_MAX_STRING = 1 << 30

_TYPE_NAMES = {number: name for number, (name, _) in SCALARS.items()} | {STRING: "str"}
_KINDS: dict[type, frozenset[str]] = {
    int: frozenset({"u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"}),
    float: frozenset({"f32", "f64"}),
    bool: frozenset({"bool"}),
    str: frozenset({"str"}),
}


class TensorInfo(NamedTuple):
    """Where a tensor lies. ``shape`` is in ggml's order (fastest first) as the file gives it, 1 to 4 dimensions.

    ``offset`` and ``nbytes`` are bytes; the offset counts from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    type_name: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Array:
    """An array that is decoded when asked for: its elements lie at ``start``:``end`` of the header."""

    type: int
    count: int
    start: int
    end: int


class Header:
    """A checked header: metadata, and tensors by name in file order. It holds no reference to the file it came from."""

    __slots__ = ("_bytes", "_values", "alignment", "architecture", "data_offset", "file_size", "tensors", "version")

    def __init__(
        self,
        *,
        version: int,
        alignment: int,
        data_offset: int,
        file_size: int,
        values: dict[str, tuple[int, Any]],
        tensors: dict[str, TensorInfo],
        header_bytes: bytes,
    ) -> None:
        self.version = version
        self.alignment = alignment
        self.data_offset = data_offset
        self.file_size = file_size
        self.tensors = tensors
        self._values = values
        self._bytes = header_bytes
        self.architecture = self.require("general.architecture", str)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        """The metadata keys, in file order."""
        return iter(self._values)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key: int, float, bool, str, or a list of these; arrays are decoded anew at each call."""
        if key not in self._values:
            return default
        value = self._values[key][1]
        if not isinstance(value, _Array):
            return value
        if value.type == STRING:
            return [text.decode("utf-8", "replace") for text in self.raw_strings(key)]
        layout = SCALARS[value.type][1].format
        return list(struct.unpack_from(f"<{value.count}{layout[1:]}", self._bytes, value.start))

    def require(self, key: str, kind: type[T]) -> T:
        """The value of a key that must be there and be an int, float, bool, str or list. Raises ModelFileError."""
        if key not in self._values:
            raise ModelFileError(f"the metadata key {key} is missing; convert the model again")
        return self._typed(key, kind)

    def optional(self, key: str, kind: type[T], default: T) -> T:
        """Like ``require``, but ``default`` if the key is absent. Raises ModelFileError if it is there with another type."""
        return self._typed(key, kind) if key in self._values else default

    def _typed(self, key: str, kind: type[T]) -> T:
        name = self.type_of(key) or "none"
        if not (name.startswith("[") if kind is list else name in _KINDS[kind]):
            raise ModelFileError(f"the metadata key {key} has type {name} where {kind.__name__} is expected; convert the model again")
        return cast("T", self.get(key))

    def type_of(self, key: str) -> str | None:
        """The type as written, e.g. ``u32`` or ``[str]`` for an array of strings; None if the key is absent."""
        if key not in self._values:
            return None
        number, value = self._values[key]
        return f"[{_TYPE_NAMES[value.type]}]" if isinstance(value, _Array) else _TYPE_NAMES[number]

    def count(self, key: str) -> int:
        """Elements of an array (without decoding it), 1 for any other value, 0 if the key is absent."""
        if key not in self._values:
            return 0
        value = self._values[key][1]
        return value.count if isinstance(value, _Array) else 1

    def raw_strings(self, key: str) -> list[bytes]:
        """The undecoded elements of an array of strings. Raises ModelFileError if it is not one."""
        if self.type_of(key) != "[str]":
            raise ModelFileError(f"the metadata key {key} is not an array of strings; convert the model again")
        array: _Array = self._values[key][1]
        data, position = self._bytes, array.start
        length_at = _U64.unpack_from
        strings = []
        for _ in range(array.count):
            start = position + 8
            position = start + length_at(data, position)[0]
            strings.append(data[start:position])
        return strings

    @property
    def crc32(self) -> int:
        """CRC-32 of the header's bytes."""
        return zlib.crc32(self._bytes)


_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_COUNTS = struct.Struct("<IQQ")
_TENSOR_TAILS = {n: struct.Struct(f"<{n}QIQ") for n in (1, 2, 3, 4)}  # dimensions, type, offset


class _Cursor:
    """A position in the header; every read is checked against the end."""

    __slots__ = ("buffer", "limit", "position")

    def __init__(self, buffer: Buffer, limit: int) -> None:
        self.buffer = buffer
        self.limit = limit
        self.position = 0

    def cut_short(self) -> ModelFileError:
        return ModelFileError(f"the file is cut short or damaged: its header goes on beyond byte {self.limit:,}; download it again")

    def read(self, layout: struct.Struct) -> tuple[Any, ...]:
        position = self.position
        self.position = position + layout.size
        if self.position > self.limit:
            raise self.cut_short()
        return layout.unpack_from(self.buffer, position)

    def string(self) -> bytes:
        """A length and that many bytes."""
        (length,) = self.read(_U64)
        if length > _MAX_STRING or length > self.limit - self.position:
            raise self.cut_short()
        start = self.position
        self.position = start + length
        return bytes(self.buffer[start : self.position])

    def skip_strings(self, count: int) -> None:
        """Step over ``count`` strings. The hot loop of opening a model: a vocabulary has 100,000 of them."""
        buffer, position, length_at = self.buffer, self.position, _U64.unpack_from
        try:
            for _ in range(count):
                position += 8 + length_at(buffer, position)[0]
        except (struct.error, OverflowError):
            raise self.cut_short() from None
        if position > self.limit:
            raise self.cut_short()
        self.position = position


def read_header(buffer: Buffer, file_size: int) -> Header:
    """Parse and check the header at the start of ``buffer``, which may be a prefix of a file of ``file_size`` bytes.

    Raises ModelFileError if it is not a sound GGUF file, UnsupportedModel for a tensor type this version does not know.
    """
    limit = min(len(buffer), file_size)
    if len(buffer) > limit:
        buffer = memoryview(buffer)[:limit]
    _check_magic(bytes(buffer[:64]), file_size)
    cursor = _Cursor(buffer, limit)
    cursor.position = len(MAGIC)
    version, tensor_count, key_count = _read_counts(cursor)
    values = _read_metadata(cursor, key_count)
    alignment = _alignment(values)
    infos = [_read_tensor(cursor) for _ in range(tensor_count)]
    data_offset = -(-cursor.position // alignment) * alignment if infos else cursor.position
    tensors = _place_tensors(infos, data_offset, alignment, file_size)
    return Header(
        version=version,
        alignment=alignment,
        data_offset=data_offset,
        file_size=file_size,
        values=values,
        tensors=tensors,
        header_bytes=bytes(buffer[: cursor.position]),
    )


def gguf_metadata_spans(buffer: Buffer) -> tuple[int, list[tuple[str, int, int]]]:
    """(where metadata begins, (key, start, end) of every entry) in a sound header, for who writes another with the same metadata."""
    cursor = _Cursor(buffer, len(buffer))
    cursor.position = len(MAGIC)
    _, _, count = cursor.read(_COUNTS)
    first, spans = cursor.position, []
    for _ in range(count):
        start = cursor.position
        (key,) = _read_metadata(cursor, 1)
        spans.append((key, start, cursor.position))
    return first, spans


def _check_magic(start: bytes, file_size: int) -> None:
    """Raise a helpful ModelFileError unless the file starts as GGUF does."""
    if file_size == 0:
        raise ModelFileError("the file is empty; download it again")
    if start.startswith(MAGIC):
        return
    if start[8:10] == b'{"':
        raise ModelFileError("this is a safetensors file, not GGUF; convert it to GGUF first")
    for prefix, what in NOT_GGUF:
        if start.startswith(prefix):
            raise ModelFileError(f"this is not a GGUF model but {what}")
    if MAGIC.startswith(start):
        raise ModelFileError(f"the file is cut short: it has only {file_size} bytes; download it again")
    if all(byte in b"\t\n\r\f" or byte >= 0x20 for byte in start):
        raise ModelFileError("this is not a GGUF model but a text file; give the path of a .gguf file")
    raise ModelFileError("this is not a GGUF model: it does not start with 'GGUF'; give the path of a .gguf file")


def _read_counts(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, tensor count and metadata count, each within reason."""
    version, tensor_count, key_count = cursor.read(_COUNTS)
    if version & 0xFFFF == 0 and version:
        raise UnsupportedModel("this GGUF file is big-endian; convert the model again for a little-endian machine")
    if version == 1:
        raise UnsupportedModel("this is a GGUF file of version 1, which is no longer supported; convert the model again")
    if version not in (2, 3):
        raise UnsupportedModel(f"this is a GGUF file of version {version} and edge-rt reads 2 and 3; update edge-rt or convert again")
    for what, count, most, smallest in (("tensors", tensor_count, _MAX_TENSORS, 33), ("metadata keys", key_count, _MAX_KEYS, 14)):
        if count > most or count * smallest > cursor.limit:
            raise ModelFileError(f"the file claims {count:,} {what}, impossible for its size; it is damaged: download it again")
    return version, tensor_count, key_count


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, tuple[int, Any]]:
    """Every key with its GGUF type and its value; arrays stay undecoded."""
    values: dict[str, tuple[int, Any]] = {}
    for _ in range(count):
        key = _name(cursor.string(), "metadata key")
        if key in values:
            raise ModelFileError(f"the metadata key {key} occurs twice; the file is damaged")
        (number,) = cursor.read(_U32)
        if number == ARRAY:
            values[key] = (number, _read_array(cursor, key))
        elif number == STRING:
            values[key] = (number, cursor.string().decode("utf-8", "replace"))
        elif number in SCALARS:
            values[key] = (number, cursor.read(SCALARS[number][1])[0])
        else:
            raise ModelFileError(f"the metadata key {key} has the unknown type {number}; the file is damaged")
    return values


def _read_array(cursor: _Cursor, key: str) -> _Array:
    """Note where an array lies and step over it."""
    (number,) = cursor.read(_U32)
    (count,) = cursor.read(_U64)
    start = cursor.position
    if number == STRING:
        if count > _MAX_STRINGS:
            raise ModelFileError(f"the metadata key {key} claims {count:,} strings; the file is damaged")
        cursor.skip_strings(count)
    elif number in SCALARS:
        cursor.position = start + count * SCALARS[number][1].size
        if cursor.position > cursor.limit:
            raise cursor.cut_short()
    elif number == ARRAY:
        raise ModelFileError(f"the metadata key {key} holds an array of arrays, which GGUF readers do not support; the file is damaged")
    else:
        raise ModelFileError(f"the metadata key {key} is an array of the unknown type {number}; the file is damaged")
    return _Array(number, count, start, cursor.position)


def _name(raw: bytes, what: str) -> str:
    """A key or tensor name: UTF-8, not empty, no NUL (native code would read it as another name)."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ModelFileError(f"a {what} is not valid UTF-8: {raw[:40]!r}; the file is damaged") from None
    if not name or "\0" in name:
        raise ModelFileError(f"a {what} is {'not text' if name else 'empty'}; the file is damaged")
    return name


def _alignment(values: dict[str, tuple[int, Any]]) -> int:
    """The alignment of tensor data in bytes."""
    number, alignment = values.get("general.alignment", (4, DEFAULT_ALIGNMENT))
    if number != 4 or not 8 <= alignment <= 65536 or alignment & (alignment - 1):
        raise ModelFileError("general.alignment must be a u32 power of two from 8 to 65536; the file is damaged")
    return cast("int", alignment)


def _read_tensor(cursor: _Cursor) -> TensorInfo:
    """One tensor info; its offset still counts from the start of the data."""
    name = _name(raw := cursor.string(), "tensor name")
    if len(raw) > MAX_TENSOR_NAME:
        raise ModelFileError(f"the tensor name {name[:40]}... is longer than {MAX_TENSOR_NAME} bytes; the file is damaged")
    (dimensions,) = cursor.read(_U32)
    if dimensions not in _TENSOR_TAILS:
        raise ModelFileError(f"the tensor {name} has {dimensions} dimensions where 1 to 4 are possible; the file is damaged")
    *shape, number, offset = cursor.read(_TENSOR_TAILS[dimensions])
    elements = 1
    for size in shape:
        elements *= size
    if elements == 0:
        raise ModelFileError(f"the tensor {name} has a dimension of 0; the file is damaged")
    if number not in GGML_TYPES:
        known = f"removed type {REMOVED_TYPES[number]}" if number in REMOVED_TYPES else "unknown type"
        raise UnsupportedModel(f"the tensor {name} has the {known} (id {number}); quantise the model again to a current type")
    type_name, block, block_bytes = GGML_TYPES[number]
    if shape[0] % block:
        raise ModelFileError(f"{name}: rows of {shape[0]:,} are no multiple of the {type_name} block of {block}; the file is damaged")
    nbytes = elements // block * block_bytes
    if max(elements, nbytes) >= 1 << 63:
        raise ModelFileError(f"the tensor {name} has the impossible shape {shape}; the file is damaged")
    return TensorInfo(name, tuple(shape), number, type_name, offset, nbytes)


def _place_tensors(infos: list[TensorInfo], data_offset: int, alignment: int, file_size: int) -> dict[str, TensorInfo]:
    """Give tensors absolute offsets; each must be aligned, lie within the file, and overlap no other."""
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in tensors:
            raise ModelFileError(f"the tensor {info.name} occurs twice; the file is damaged")
        if info.offset % alignment:
            raise ModelFileError(f"the tensor {info.name} does not start on a multiple of {alignment} bytes; the file is damaged")
        start = data_offset + info.offset
        if start + info.nbytes > file_size:
            raise ModelFileError(
                f"the file is cut short: the tensor {info.name} ends at byte {start + info.nbytes:,} of {file_size:,}; download it again"
            )
        tensors[info.name] = TensorInfo(info.name, info.shape, info.type, info.type_name, start, info.nbytes)
    end, last = data_offset, ""
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise ModelFileError(f"the tensors {last} and {info.name} overlap; the file is damaged")
        end, last = info.offset + info.nbytes, info.name
    return tensors
