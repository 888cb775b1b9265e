"""Packed layouts made in NumPy: against bytes that ARM cores packed, the plugin's table, and themselves in other shapes."""

from __future__ import annotations

import base64
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_rt_arm.layouts import packed_layouts
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.core.gguf.reader import GGML_TYPES
from edge_rt.core.weights import interleave as interleaving
from edge_rt.core.weights.interleave import CHOICES, Layout, interleave, layout, packed_types
from edge_rt.deploy import target as targets

ROOT = Path(__file__).parents[3]
_spec = importlib.util.spec_from_file_location("arm_sample", ROOT / "tools/arm/sample.py")
assert _spec is not None
assert _spec.loader is not None
sample = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sample)
RECORDED = json.loads((ROOT / "tests/fixtures/arm_packed.json").read_text(encoding="utf-8"))
TYPES = sorted({choice.type for choice in CHOICES})
SIZES = {name: (elements, nbytes) for name, elements, nbytes in GGML_TYPES.values()}
DOTPROD, I8MM = frozenset({"neon", "dotprod"}), frozenset({"neon", "dotprod", "i8mm"})
SVE = I8MM | {"sve", "sve256"}


def recorded(core: str) -> dict[str, Any]:
    found = RECORDED["cores"][core]
    return {**found, "packed": {name: RECORDED["bytes"][key] for name, key in found["packed"].items()}}


@pytest.mark.parametrize("core", RECORDED["cores"])
def test_bytes_are_those_that_the_core_packed(core: str) -> None:
    assert sample.differing(recorded(core)) == []


def test_what_was_recorded_covers_every_layout_of_arm() -> None:
    """The type and layout of each sample, and none for the core without dot products."""
    covered = set()
    for core in RECORDED["cores"].values():
        for name in core["packed"]:
            type_, shape = name.split()
            covered.add((type_, layout(type_, tuple(map(int, shape.split("x"))), core["features"])))
    wanted = {(choice.type, choice.layout) for choice in CHOICES if "neon" in choice.needs}
    assert wanted <= covered
    assert RECORDED["cores"]["cortex-a72-armv8"]["packed"] == {}


def test_a_wrong_byte_is_found() -> None:
    wrong = recorded("cortex-a76-dotprod")
    data = bytearray(base64.b64decode(wrong["packed"]["Q6_K 256x8"]))
    data[100] ^= 1
    wrong["packed"]["Q6_K 256x8"] = base64.b64encode(data).decode()
    assert sample.differing(wrong) == ["Q6_K 256x8"]


# ---- which layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [{"neon"}, DOTPROD, I8MM, I8MM | {"sve", "sve128"}, SVE, DOTPROD | {"sve", "sve256"}, {"avx2"}, ()])
def test_the_arm_plugins_table_says_the_same(features: frozenset[str]) -> None:
    plugins = packed_layouts(features, 32 if "sve256" in features else 16)
    ours = {type_: str(found) for type_ in TYPES if "neon" in features and (found := layout(type_, (256, 32), features))}
    assert ours == plugins


@pytest.mark.parametrize(
    ("type_", "shape", "features", "expected"),
    [
        ("Q4_0", (64, 8), {"avx2"}, "8x8"),
        ("Q4_0", (64, 12), {"avx2"}, "None"),
        ("Q4_0", (64, 12), SVE, "4x8"),  # rows that do not divide by 8 take the next one
        ("Q4_0", (64, 10), SVE, "None"),
        ("Q4_0", (64, 8, 3), DOTPROD, "4x4"),
        ("Q4_0", (64, 8, 1), DOTPROD, "None"),  # to the library that is no expert's weight, and no matrix
        ("Q4_0", (64,), DOTPROD, "None"),
        ("Q4_0", (64, 8, 2, 2), DOTPROD, "None"),
        ("Q2_K", (256, 8), {"avx2"}, "None"),
        ("Q2_K", (256, 8), {"avx2", "avx512f"}, "8x8"),
        ("Q8_0", (64, 8), {"avx2", "avx512f"}, "None"),
        ("F16", (64, 8), SVE, "None"),
        ("Q4_1", (64, 8), SVE, "None"),
    ],
)
def test_shapes_and_features_choose(type_: str, shape: tuple[int, ...], features: frozenset[str], expected: str) -> None:
    assert str(layout(type_, shape, features)) == expected


def test_types_with_kernels_are_the_targets(tmp_path: Path) -> None:
    arm = {"Q4_0", "Q4_1", "Q8_0", "Q1_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"}
    x86 = {"Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "MXFP4"}
    expected = {"rpi-cm4": set(), "rpi-5": arm, "android-arm64": arm, "x86-avx2": x86, "x86-avx512": x86 | {"Q2_K"}, "a10g": set()}
    for name, types in expected.items():
        found = targets.load(name)
        assert set(found.packed) == types, name
        assert found.profile.kind != "cpu" or set(packed_types(found.features)) == types
    assert {"Q4_1", "Q6_K", "IQ4_XS"} <= set(packed_types({"avx2", "avx512f", "amx_int8"}))
    text = (targets.FOLDER / "rpi-5.toml").read_text(encoding="utf-8")
    (tmp_path / "bare.toml").write_text("packed = []\n" + text, encoding="utf-8")
    assert targets.read(tmp_path / "bare.toml").packed == ()


def test_cores_of_two_kinds_are_packed_for_by_what_both_have(tmp_path: Path) -> None:
    text = (targets.FOLDER / "android-arm64.toml").read_text(encoding="utf-8")
    (tmp_path / "both.toml").write_text(text.replace('"dotprod"]', '"dotprod", "i8mm"]', 1), encoding="utf-8")
    assert targets.read(tmp_path / "both.toml").features == {"neon", "fp16", "dotprod"}


# ---- the bytes -------------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_layout_moves_bytes_and_loses_none(data: st.DataObject) -> None:
    """Groups of rows do not touch each other, however many are taken at once; experts are rows; and different weights stay different."""
    choice = data.draw(st.sampled_from(CHOICES))
    elements, size = SIZES[choice.type]
    blocks, groups, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(2, 3))
    rows, wide = groups * choice.layout.rows, blocks * elements
    given_ = random.Random(data.draw(st.integers(0, 99))).randbytes(rows * experts * blocks * size)
    whole = interleave(given_, choice.type, (wide, rows, experts), choice.layout)
    assert whole.nbytes == len(given_)
    step = choice.layout.rows * blocks * size
    pieces = [given_[at : at + step] for at in range(0, len(given_), step)]
    apart = [interleave(piece, choice.type, (wide, choice.layout.rows), choice.layout) for piece in pieces]
    np.testing.assert_array_equal(whole, np.concatenate(apart))
    changed = bytearray(given_)
    changed[data.draw(st.integers(0, len(given_) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    other = interleave(bytes(changed), choice.type, (wide, rows, experts), choice.layout)
    assert np.unpackbits(whole ^ other).sum() == 1


def test_pieces_are_put_together_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = random.Random(1).randbytes(40 * 4 * 144)
    whole = interleave(given_, "Q4_K", (1024, 40), Layout(8, 4))
    monkeypatch.setattr(interleaving, "_PIECE", 1)
    np.testing.assert_array_equal(whole, interleave(given_, "Q4_K", (1024, 40), Layout(8, 4)))


def test_a_block_of_q4_0_by_hand() -> None:
    """Four rows of one block: scales, then four bytes of each row in turn, the top bit of each half byte flipped."""
    rows = [bytes([16 * row, row]) + bytes(range(16 * row, 16 * row + 16)) for row in range(4)]
    packed = interleave(b"".join(rows), "Q4_0", (32, 4), Layout(4, 4)).tobytes()
    scales = b"".join(row[:2] for row in rows)
    quants = b"".join(rows[i % 4][2 + i // 4 * 4 : 6 + i // 4 * 4] for i in range(16))
    assert packed == scales + bytes(one ^ 0x88 for one in quants)
