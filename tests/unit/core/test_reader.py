"""The GGUF header parser: what a sound header says, and that no bytes whatever get past it or break it."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.core.gguf.reader import ARRAY, GGML_TYPES, NOT_GGUF, REMOVED_TYPES, STRING, Header, TensorInfo, read_header
from edge_rt.errors import ModelFileError, UnsupportedModel
from edge_rt.testing import gguf_bytes
from edge_rt.testing.gguf_bytes import metadata, tensor, text

ARCHITECTURE = metadata("general.architecture", "str", "llama")
TWO_TENSORS = (tensor("a", (32, 2), 0, 0), tensor("b", (64,), 2, 256))


def build(values: list[bytes] | None = None, tensors: Sequence[bytes] = TWO_TENSORS, data: int = 4096, **options: Any) -> bytes:
    """A GGUF file of ``data`` bytes of tensor data; the architecture is its first entry unless ``values`` are given."""
    return gguf_bytes.build([ARCHITECTURE] if values is None else values, tensors, bytes(data), **options)


def parse(raw: bytes) -> Header:
    return read_header(raw, len(raw))


def refused(raw: bytes, words: str, kind: type[ModelFileError] = ModelFileError) -> None:
    """The file is refused with exactly this kind of error, whose one sentence contains ``words``."""
    with pytest.raises(ModelFileError) as caught:
        parse(raw)
    assert type(caught.value) is kind, caught.value
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- a sound header --------------------------------------------------------------------------------------------------


def test_reads_every_metadata_type() -> None:
    samples: dict[str, Any] = {"u8": 200, "i8": -5, "u16": 60000, "i16": -3000, "u32": 2**32 - 1, "i32": -(2**31), "f32": 0.5}
    samples |= {"bool": True, "u64": 2**64 - 1, "i64": -(2**63), "f64": 0.1}
    values = [ARCHITECTURE, metadata("text", "str", "naïve"), metadata("words", "[str]", ["", "é", "x" * 300])]
    values += [metadata(f"scalar_{kind}", kind, value) for kind, value in samples.items()]
    values += [metadata(f"array_{kind}", f"[{kind}]", [value] * 3) for kind, value in samples.items()]
    header = parse(build(values))
    assert header.architecture == "llama"
    assert header.get("text") == "naïve"
    assert header.get("words") == ["", "é", "x" * 300]
    assert header.raw_strings("words") == [b"", "é".encode(), b"x" * 300]
    for kind, value in samples.items():
        assert header.get(f"scalar_{kind}") == value
        assert type(header.get(f"scalar_{kind}")) is type(value)
        assert header.get(f"array_{kind}") == [value] * 3
    assert list(header)[:3] == ["general.architecture", "text", "words"]
    assert header.type_of("scalar_u32") == "u32"
    assert header.type_of("words") == "[str]"
    assert header.type_of("absent") is None
    assert (header.count("words"), header.count("text"), header.count("absent")) == (3, 1, 0)
    assert "text" in header
    assert "absent" not in header
    assert header.get("absent", 7) == 7


def test_reads_tensors_with_absolute_offsets() -> None:
    raw = build()
    header = parse(raw)
    start = header.data_offset
    assert start % 32 == 0
    assert len(raw) == start + 4096 == header.file_size
    assert header.tensors == {
        "a": TensorInfo("a", (32, 2), 0, "F32", start, 256),
        "b": TensorInfo("b", (64,), 2, "Q4_0", start + 256, 36),
    }
    assert (header.version, header.alignment) == (3, 32)


@pytest.mark.parametrize("alignment", [8, 64, 4096, 65536])
def test_alignment_moves_the_data(alignment: int) -> None:
    values = [ARCHITECTURE, metadata("general.alignment", "u32", alignment)]
    header = parse(build(values, [tensor("a", (2,), 0, 0), tensor("b", (2,), 0, alignment)], 2 * alignment, alignment=alignment))
    assert header.data_offset % alignment == 0
    assert header.tensors["b"].offset == header.data_offset + alignment


def test_version_2_and_a_file_without_tensors() -> None:
    header = parse(build(tensors=[], data=0, version=2))
    assert header.version == 2
    assert header.tensors == {}


def test_typed_access() -> None:
    values = [metadata("n", "u32", 5), metadata("f", "f32", 0.5), metadata("b", "bool", True), metadata("l", "[u32]", [1])]
    header = parse(build([ARCHITECTURE, *values]))
    assert header.require("n", int) == 5
    assert header.require("f", float) == 0.5
    assert header.require("b", bool) is True
    assert header.require("l", list) == [1]
    assert header.optional("absent", int, 9) == 9
    for key, kind in (("n", float), ("n", bool), ("n", str), ("b", int), ("f", int), ("l", int), ("n", list)):
        with pytest.raises(ModelFileError, match=f"{key} has type"):
            header.require(key, kind)
        with pytest.raises(ModelFileError, match=f"{key} has type"):
            header.optional(key, kind, kind())
    with pytest.raises(ModelFileError, match="absent is missing"):
        header.require("absent", int)
    with pytest.raises(ModelFileError, match="not an array of strings"):
        header.raw_strings("n")


def test_crc32_follows_the_header_and_not_the_data() -> None:
    raw = build()
    assert parse(raw).crc32 == parse(raw[:-1] + b"x").crc32
    assert parse(raw).crc32 != parse(build([metadata("general.architecture", "str", "lamma")])).crc32


def test_a_prefix_is_enough_and_arrays_outlive_the_buffer() -> None:
    values = [ARCHITECTURE, metadata("words", "[str]", ["a", "b"])]
    raw = bytearray(build(values))
    view = memoryview(raw)[:400]
    header = read_header(view, len(raw))
    view.release()
    raw[:] = bytes(len(raw))
    assert header.get("words") == ["a", "b"]


def test_types_agree_with_the_gguf_package() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    for kind, (block, size) in GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # an intermediate type: the package has the layout of 2023
            assert GGML_TYPES[kind.value] == (kind.name, block, size)


def test_types_agree_with_libggml() -> None:
    import ctypes

    from edge_rt.native.libs import function

    name = function("ggml_type_name", ctypes.c_char_p, ctypes.c_int)
    block = function("ggml_blck_size", ctypes.c_int64, ctypes.c_int)
    size = function("ggml_type_size", ctypes.c_size_t, ctypes.c_int)
    known = {number: (name(number).decode().upper(), block(number), size(number)) for number in range(43) if block(number)}
    assert known == {number: (title.upper(), *sizes) for number, (title, *sizes) in GGML_TYPES.items()}


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "what"), NOT_GGUF)
def test_says_what_the_file_is_instead(start: bytes, what: str) -> None:
    refused(start + bytes(100), what)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b"GG", "only 2 bytes"),
        (struct.pack("<Q", 40) + b'{"__metadata__":{}}', "safetensors"),
        (b"# How to use this model\n", "text file"),
        ("Größe der Datei".encode(), "text file"),
        (b"\x7fELF\x02\x01\x01\0", "does not start with 'GGUF'"),
        (b"GGUF", "cut short"),
        (b"GGUF" + struct.pack("<I", 3), "cut short"),
    ],
)
def test_files_that_are_not_models(raw: bytes, words: str) -> None:
    refused(raw, words)


@pytest.mark.parametrize(
    ("version", "words"), [(1, "version 1"), (4, "version 4"), (0, "version 0"), (0x03000000, "big-endian"), (0x02000000, "big-endian")]
)
def test_versions(version: int, words: str) -> None:
    refused(build(version=version), words, UnsupportedModel)


@pytest.mark.parametrize("counts", [(2**63, 1), (10**6, 1), (2, 2**63), (2, 10**5), (2, 500), (300, 1)])
def test_impossible_counts(counts: tuple[int, int]) -> None:
    refused(build(counts=counts), "claims")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (ARCHITECTURE, "general.architecture occurs twice"),
        (metadata("", "u32", 1), "metadata key is empty"),
        (metadata(b"a\xff", "u32", 1), "not valid UTF-8"),
        (metadata("a\0b", "u32", 1), "not text"),
        (text("k") + struct.pack("<I", 13) + bytes(64), "k has the unknown type 13"),
        (text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 0), "array of arrays"),
        (text("k") + struct.pack("<IIQ", ARRAY, 77, 0), "unknown type 77"),
        (text("k") + struct.pack("<IIQ", ARRAY, 4, 2**62), "cut short"),
        (text("k") + struct.pack("<IIQ", ARRAY, 4, 10**5), "cut short"),
        (text("k") + struct.pack("<IIQ", ARRAY, STRING, 2**40), "claims"),
        (text("k") + struct.pack("<IIQ", ARRAY, STRING, 10**6), "cut short"),
        (text("k") + struct.pack("<IIQQ", ARRAY, STRING, 2, 2**64 - 1), "cut short"),
        (text("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, 2**64 - 1), "cut short"),
        (text("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, 10**6), "cut short"),
        (text("k") + struct.pack("<IQ", STRING, 2**64 - 1), "cut short"),
        (text("k") + struct.pack("<IQ", STRING, 10**6), "cut short"),
        (struct.pack("<Q", 10**9) + b"k", "cut short"),
        (metadata("general.alignment", "u32", 0), "general.alignment"),
        (metadata("general.alignment", "u32", 4), "general.alignment"),
        (metadata("general.alignment", "u32", 48), "general.alignment"),
        (metadata("general.alignment", "u32", 1 << 17), "general.alignment"),
        (metadata("general.alignment", "u64", 32), "general.alignment"),
        (metadata("general.alignment", "str", "32"), "general.alignment"),
        (metadata("general.alignment", "[u32]", [32]), "general.alignment"),
    ],
)
def test_bad_metadata(value: bytes, words: str) -> None:
    refused(build([ARCHITECTURE, value]), words)


def test_architecture_must_be_there_as_text() -> None:
    refused(build([]), "general.architecture is missing")
    refused(build([metadata("general.architecture", "u32", 3)]), "general.architecture has type u32")
    refused(build([metadata("general.architecture", "[str]", ["a"])]), "general.architecture has type [str]")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([tensor("", (4,), 0, 0)], "tensor name is empty"),
        ([tensor(b"\xc3(", (4,), 0, 0)], "not valid UTF-8"),
        ([tensor("a\0", (4,), 0, 0)], "not text"),
        ([tensor("n" * 64, (4,), 0, 0)], "longer than 63"),
        ([tensor("é" * 32, (4,), 0, 0)], "longer than 63"),
        ([tensor("a", (), 0, 0)], "has 0 dimensions"),
        ([tensor("a", (1, 1, 1, 1, 1), 0, 0)], "has 5 dimensions"),
        ([text("a") + struct.pack("<I", 2**32 - 1) + bytes(99)], "dimensions"),
        ([tensor("a", (4, 0), 0, 0)], "dimension of 0"),
        ([tensor("a", (33,), 2, 0)], "no multiple of the Q4_0 block of 32"),
        ([tensor("a", (128, 2), 12, 0)], "no multiple of the Q4_K block of 256"),
        ([tensor("a", (2**32, 2**31), 24, 0)], "impossible shape"),
        ([tensor("a", (2**60, 2), 0, 0)], "impossible shape"),
        ([tensor("a", (2**63, 2**63, 2**63, 2**63), 0, 0)], "impossible shape"),
        ([tensor("a", (4,), 0, 0), tensor("a", (4,), 0, 32)], "a occurs twice"),
        ([tensor("a", (4,), 0, 8)], "multiple of 32"),
        ([tensor("a", (1025,), 0, 0)], "the tensor a ends at byte"),
        ([tensor("a", (4,), 0, 4096)], "the tensor a ends at byte"),
        ([tensor("a", (4,), 0, 2**64 - 32)], "the tensor a ends at byte"),
        ([tensor("a", (9,), 0, 0), tensor("b", (4,), 0, 32)], "a and b overlap"),
        ([tensor("a", (9,), 0, 32), tensor("b", (32,), 0, 0)], "b and a overlap"),
        ([tensor("a", (4,), 0, 0), tensor("b", (4,), 0, 0)], "overlap"),
    ],
)
def test_bad_tensors(tensors: list[bytes], words: str) -> None:
    refused(build(tensors=tensors), words)


@pytest.mark.parametrize("kind", [*REMOVED_TYPES, 43, 100, 2**31, 2**32 - 1])
def test_unknown_tensor_types_name_tensor_and_id(kind: int) -> None:
    raw = build(tensors=[tensor("blk.0.attn_q.weight", (256,), kind, 0)])
    refused(raw, f"(id {kind})", UnsupportedModel)
    refused(raw, "blk.0.attn_q.weight", UnsupportedModel)


# ---- any bytes whatever ----------------------------------------------------------------------------------------------


def rich_file() -> bytes:
    """Every kind of section, small enough to try each byte of it."""
    values = [ARCHITECTURE, metadata("general.alignment", "u32", 64), metadata("words", "[str]", ["a", "", "bcd"])]
    values += [metadata("ids", "[i32]", [1, 2]), metadata("f", "f32", 1.0), metadata("b", "bool", True)]
    tensors = [tensor("a", (32, 2), 0, 0), tensor("b", (256, 1, 1), 12, 256), tensor("c", (4, 1, 1, 2), 1, 448)]
    return build(values, tensors, 464, alignment=64)


def outcome(raw: bytes) -> Header | None:
    """The header, or None for a typed refusal; anything else fails the test."""
    try:
        header = parse(raw)
    except ModelFileError:
        return None
    assert header.data_offset <= len(raw) or not header.tensors
    for info in header.tensors.values():
        assert header.data_offset <= info.offset
        assert info.offset + info.nbytes <= len(raw)
        assert info.offset % header.alignment == 0
    for key in header:  # lazily decoded values must not fail later
        header.get(key)
    return header


def test_cut_at_every_byte() -> None:
    raw = rich_file()
    assert outcome(raw) is not None
    for length in range(len(raw)):
        assert outcome(raw[:length]) is None, length


def test_every_field_mutated() -> None:
    """Each byte of the header replaced by telling values; four- and eight-byte fields by extreme ones."""
    raw = rich_file()
    size = parse(raw).data_offset
    accepted = 0
    for at in range(size):
        for new in (b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\xff" * 4, b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << 62)):
            accepted += outcome(raw[:at] + new + raw[at + len(new) :]) is not None
    assert accepted > 100  # letters in names and numbers may change


def test_random_mutations() -> None:
    rng = random.Random(7)
    raw = rich_file()
    size = parse(raw).data_offset
    refusals = 0
    for _ in range(2000):
        mutant = bytearray(raw)
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(size)
            action = rng.randrange(4)
            if action == 0:
                mutant[at] = rng.randrange(256)
            elif action == 1:
                mutant[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.randrange(2**20)]))
            elif action == 2:
                del mutant[at : at + rng.randint(1, 16)]
            else:
                mutant[at:at] = rng.randbytes(rng.randint(1, 16))
        refusals += outcome(bytes(mutant)) is None
    assert refusals > 1000


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=12)), min_size=1, max_size=6), st.integers(0, 1200))
def test_hypothesis_mutations(changes: list[tuple[int, bytes]], length: int) -> None:
    mutant = bytearray(rich_file())
    for at, new in changes:
        mutant[at : at + len(new)] = new
    outcome(bytes(mutant[:length]))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_hypothesis_random_bytes(raw: bytes) -> None:
    outcome(b"GGUF" + struct.pack("<I", 3) + raw)
    outcome(raw)
