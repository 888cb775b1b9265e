"""Q4_1 weights that lie as Q4_0 and offsets: the same weights, the same answers, and what cannot lie so stays as it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from bits import feed, random_tokens, same_bits
from hypothesis import given
from hypothesis import strategies as st

from edge_rt import config
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.weights import repack
from edge_rt.core.weights.repack import PackedFile, cache_key
from edge_rt.hooks import EngineOptions
from edge_rt.native import ggml

Q4_0, Q4_1 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1
MEASURES = {"n_embd": 192, "n_head": 3, "n_head_kv": 1, "n_ff": 512, "n_layer": 4}


@pytest.fixture(autouse=True)
def _interleaved_rows_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CPU without AMX, whose tiles hold Q4_1 itself, and a cache for each test."""
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path / "cache"))
    found = ggml.extra_buffer_types()
    if "CPU_REPACK" not in found:
        pytest.skip("this build has no interleaved rows")
    monkeypatch.setattr(repack, "layouts", lambda: {"CPU_REPACK": found["CPU_REPACK"]})


@contextmanager
def opened(path: Path, centre: bool = True, **options: Any) -> Iterator[GgmlEngine]:
    extra = {"ggml.centred": centre, "ggml.transposed_values": False}
    with ModelFile.open(path) as file, closing(GgmlEngine(file, EngineOptions(threads=1, context=256, extra=extra, **options))) as engine:
        yield engine


def packed_types(path: Path) -> dict[str, tuple[int, str]]:
    """Type and layout by name, of the one packed file there is."""
    (pack,) = config.packed_dir().glob("*.pack")
    with pack.open("rb") as file:
        return {entry[0]: (entry[1], entry[5]) for entry in repack._read_body(file.fileno())["entries"]}


@pytest.fixture
def model(random_model: Callable[..., Path]) -> Path:
    path = random_model("llama", type="Q4_1", **MEASURES)
    with opened(path):
        found = packed_types(path)
    if "blk.0.ffn_down.offsets" not in found:
        pytest.skip("this CPU has no packed kernel for Q4_0")
    return path


# ---- the same weights ------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_both_parts_together_are_the_weights(blocks: int, rows: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((rows, blocks * repack.BLOCK)).astype(np.float32)
    data = gguf.quants.quantize(values, Q4_1)
    quants, offsets = repack.quants(memoryview(data.tobytes())), repack.offsets(memoryview(data.tobytes()), (values.shape[1], rows))
    assert offsets.shape == repack.offsets_shape((values.shape[1], rows))[::-1]
    assert not offsets[:, blocks:].any()
    added = np.repeat(offsets[:, :blocks].astype(np.float32), repack.BLOCK, axis=1)
    whole = gguf.quants.dequantize(quants.reshape(rows, -1), Q4_0) + added
    expected = gguf.quants.dequantize(data, Q4_1)
    minimum = np.repeat(data.reshape(rows, blocks, 20)[:, :, 2:4].copy().view(np.float16)[:, :, 0], repack.BLOCK, axis=1)
    scale = np.repeat(data.reshape(rows, blocks, 20)[:, :, :2].copy().view(np.float16)[:, :, 0], repack.BLOCK, axis=1)
    exact = (-16 * scale <= minimum) & (minimum <= -4 * scale)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=2**-11 * np.abs(minimum + 8 * scale).max() + 1e-6)
    np.testing.assert_allclose(whole[exact], expected[exact], rtol=0, atol=1e-6)


def test_answers_are_as_close_to_those_of_exact_arithmetic_as_the_files_own_kernel_gives(
    model: Path, random_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A prompt, and single tokens, against the same weights in F32."""
    exact = tmp_path / "exact.gguf"
    _in_f32(model, exact)
    logits = []
    for path, centre in ((model, True), (model, False), (exact, False)):
        with opened(path, centre) as engine:
            sequence, tokens = engine.new_sequence(), random_tokens(engine, 40)
            logits.append(np.concatenate([feed(engine, sequence, tokens[:32]), *(feed(engine, sequence, [t]) for t in tokens[32:])]))
    ours, plain, reference = logits
    errors = [np.sqrt(np.mean((found - reference) ** 2, axis=1)) / reference.std() for found in (ours, plain)]
    assert 1e-5 < errors[0][:32].mean() < 1.1 * errors[1][:32].mean()
    assert 1e-5 < errors[0][32:].mean() < 1.1 * errors[1][32:].mean()


def _in_f32(source: Path, target: Path) -> None:
    """The same model with all weights in F32."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name not in ("general.architecture", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"):
            kind = field.types[0]
            part = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=part)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.reshape(tuple(int(n) for n in reversed(tensor.shape))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_columns_together_give_the_bits_of_each_alone(model: Path) -> None:
    with opened(model) as engine:
        rows = engine.exact_rows()
        assert rows >= 3
        tokens = random_tokens(engine, 20 + rows)
        one, many = engine.new_sequence(), engine.new_sequence()
        feed(engine, one, tokens[:20])
        feed(engine, many, tokens[:20])
        same_bits(feed(engine, many, tokens[20:]), np.concatenate([feed(engine, one, [t]) for t in tokens[20:]]))


# ---- what lies so, and what does not ---------------------------------------------------------------------------------


def test_a_units_offsets_follow_its_weights_and_are_part_of_it(model: Path) -> None:
    found = packed_types(model)
    assert found["blk.0.attn_q.weight"] == (Q4_0, "CPU_REPACK")
    assert found["blk.0.attn_q.offsets"] == (gguf.GGMLQuantizationType.F16, "")
    with opened(model) as engine:
        assert engine.weights.joined(tuple(f"blk.0.attn_{part}.offsets" for part in "qkv")) is not None
        block = next(unit for unit in engine.units() if unit.name == "blk.0")
        place = engine.weights.span("blk.0.attn_q.offsets").address
        assert any(span.address <= place < span.address + span.size for span in block.spans)


def test_weights_with_offsets_and_without_are_not_joined(random_model: Callable[..., Path], model: Path, tmp_path: Path) -> None:
    with opened(model) as engine:
        plain, apart = "blk.0.attn_norm.weight", "blk.0.attn_q.weight"
        assert engine.weights.joined((apart, plain)) is None


def test_offsets_beyond_f16_leave_the_model_as_it_is(model: Path, tmp_path: Path) -> None:
    """No trained model has them; whoever wrote this one gets what the file's own kernel makes of it."""
    path = tmp_path / "large.gguf"
    shutil.copy(model, path)
    with ModelFile.open(path) as file:
        place = file.header.tensors["blk.1.ffn_up.weight"].offset
    with path.open("r+b") as out:
        out.seek(place)
        out.write(np.array([60000, 1], np.float16).tobytes())
    for pack in config.packed_dir().glob("*.pack"):
        pack.unlink()
    logits = []
    for centre in (True, False):
        with opened(path, centre) as engine:
            assert engine.weights.centred is False
            logits.append(feed(engine, engine.new_sequence(), [1, 2, 3]))
    np.testing.assert_array_equal(*logits)
    assert list(config.packed_dir().glob("*.pack")) == []


def test_a_file_cannot_bring_offsets_of_its_own(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path, data = tmp_path / "own.gguf", random_model("llama", type="F32").read_bytes()
    path.write_bytes(data.replace(b"blk.0.attn_norm.weight", b"blk.0.attn_nor.offsets"))
    with ModelFile.open(path) as file:
        assert "blk.0.attn_nor.offsets" in file.header.tensors
        assert repack.plan_repack(file.header) is None


def test_packed_bytes_are_checked(model: Path) -> None:
    (pack,) = config.packed_dir().glob("*.pack")
    with ModelFile.open(model) as file:
        key = cache_key(file)
        assert key != cache_key(file, centre=False)
    with closing(PackedFile(pack, key)) as sound:
        sound.verify()
