"""Our graphs against libllama: the same kernels must give the same bits, for every architecture and weight type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import feed, random_tokens, same_bits
from reference import Reference

from edge_rt.core.engine import SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.graph.builder import TILES_FROM
from edge_rt.errors import ContextError, OptionError, SessionFileError
from edge_rt.hooks import EngineOptions

LLAMA3_FACTORS = [1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-f32": ("llama", {"type": "F32"}),
    "llama-f16": ("llama", {"type": "F16"}),
    "llama-q4_1": ("llama", {"type": "Q4_1"}),
    "llama-q4_0-packed": ("llama", {"type": "Q4_0"}),
    "llama-q8_0": ("llama", {"type": "Q8_0"}),
    "llama-q4_k-packed": ("llama", {"type": "Q4_K", "n_embd": 256, "n_ff": 512, "n_head": 4}),
    "llama-untied": ("llama", {"tied": False, "output_type": "Q8_0", "type": "Q4_0"}),
    "llama-bias": ("llama", {"bias": True}),
    "llama-fused": ("llama", {"fused_qkv": True}),
    "llama-fused-bias": ("llama", {"fused_qkv": True, "bias": True}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-yarn": ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_context": 128}}),
    "llama-llama3": ("llama", {"rope_freqs": LLAMA3_FACTORS}),
    "llama-gqa-wide": ("llama", {"n_head": 8, "n_head_kv": 1, "head_dim": 32}),
    "llama-experts": ("llama", {"n_expert": 4, "n_expert_used": 2}),
    "deci": ("deci", {"n_ff": (160, 64)}),
    "deci-packed": ("deci", {"type": "Q4_0", "n_ff": (96, 288), "bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3moe": ("qwen3moe", {}),
    "qwen3moe-packed": ("qwen3moe", {"type": "Q4_0", "n_embd": 128, "n_ff_exp": 64}),
    "qwen3moe-one": ("qwen3moe", {"n_expert": 4, "n_expert_used": 1}),
}


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[GgmlEngine]:
    """An engine on one thread: the models are tiny, and results do not depend on the number. Weights lie as libllama has them."""
    extra = {"ggml.centred": False, **options.pop("extra", {})}
    settings = EngineOptions(**{"threads": 1, "context": 512, "extra": extra, **options})
    with ModelFile.open(path) as file, closing(GgmlEngine(file, settings)) as engine:
        yield engine


def libllama_like(engine: GgmlEngine, path: Path, **options: Any) -> Reference:
    """libllama with the engine's layouts: float weights, which it would put among the packed ones, are never packed here."""
    return Reference(path, layouts=None if any(unit.packed for unit in engine.units()) else (), **options)


@pytest.fixture(params=MODELS, ids=list(MODELS))
def model(request: pytest.FixtureRequest, random_model: Callable[..., Path]) -> Path:
    architecture, measures = MODELS[request.param]
    return random_model(architecture, **measures)


LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["by-cell", "transposed"])


def layout(transposed: bool) -> dict[str, Any]:
    return {"extra": {"ggml.transposed_values": transposed}}


@LAYOUTS
@pytest.mark.parametrize("sizes", [(40, 20), (70, 64)], ids=["pieces", "tiles"])
def test_prefill_is_libllamas_bit_for_bit(model: Path, transposed: bool, sizes: tuple[int, int]) -> None:
    """Its flash attention; over transposed values its plain attention as long as flash attention would take query by query."""
    flash, (first, second) = not transposed or min(sizes) >= TILES_FROM, sizes
    with opened(model, **layout(transposed)) as engine, closing(libllama_like(engine, model, flash=flash)) as libllama:
        tokens, sequence = random_tokens(engine, first + second), engine.new_sequence()
        for part in (tokens[:first], tokens[first:]):  # the second attends over the first
            same_bits(feed(engine, sequence, part), libllama.feed(part))


@LAYOUTS
def test_decode_is_libllamas_bit_for_bit(model: Path, transposed: bool) -> None:
    """Its flash attention over values by cell, its plain attention over transposed ones."""
    with opened(model, **layout(transposed)) as engine, closing(libllama_like(engine, model, flash=not transposed)) as libllama:
        sequence = engine.new_sequence()
        for token in random_tokens(engine, 12):
            same_bits(feed(engine, sequence, [token]), libllama.feed([token]))


@LAYOUTS
def test_q8_0_keys_are_libllamas_bit_for_bit(random_model: Callable[..., Path], transposed: bool) -> None:
    path = random_model("llama", head_dim=32)
    options = {"key_type": "q8_0", **layout(transposed)}
    with opened(path, **options) as engine, closing(libllama_like(engine, path, flash=not transposed, key_type=8)) as libllama:
        sequence, tokens = engine.new_sequence(), random_tokens(engine, 32)
        for part in [[t] for t in tokens[:8]] if transposed else [tokens[:20], *([t] for t in tokens[20:])]:
            same_bits(feed(engine, sequence, part), libllama.feed(part))


def test_unpacked_weights_give_the_plain_kernels_result(random_model: Callable[..., Path]) -> None:
    path = random_model("llama", type="Q4_0")
    with opened(path, pack=False) as plain, opened(path) as packed:
        assert not any(unit.packed for unit in plain.units())
        assert any(unit.packed for unit in packed.units())
        tokens = random_tokens(plain, 30)
        a, b = feed(plain, plain.new_sequence(), tokens), feed(packed, packed.new_sequence(), tokens)
        assert np.abs(a - b).mean() / np.abs(a).mean() < 1e-3


@LAYOUTS
def test_growing_through_many_steps_changes_nothing(random_model: Callable[..., Path], transposed: bool) -> None:
    """600 cells: the cache moves to larger buffers on the way, prefill and decode by turns; libllama has all its cells at once."""
    path = random_model("llama", context=1024)
    options = {"context": 1024, **layout(transposed)}
    with opened(path, **options) as engine, closing(libllama_like(engine, path, flash=not transposed, context=1024)) as libllama:
        tokens, sequence = random_tokens(engine, 600), engine.new_sequence()
        for start in range(0, 600, 50):
            same_bits(feed(engine, sequence, tokens[start : start + 50]), libllama.feed(tokens[start : start + 50]))
        assert engine.length(sequence) == 600


def test_sequences_in_one_step_do_not_touch_each_other(model: Path) -> None:
    with opened(model) as engine:
        tokens = random_tokens(engine, 100)
        alone = [engine.new_sequence() for _ in range(3)]
        together = [engine.new_sequence() for _ in range(3)]
        parts = [tokens[:20], tokens[20:23], tokens[23:60]]
        expected = [feed(engine, s, p) for s, p in zip(alone, parts, strict=True)]
        found = engine.step([SequenceBatch(s, p, "all") for s, p in zip(together, parts, strict=True)])
        for a, b in zip(expected, [np.array(f) for f in found if f is not None], strict=True):
            assert np.abs(a - b).mean() / np.abs(a).mean() < 2e-3  # rows of a larger product may use other kernels
        for s, t in zip(alone, together, strict=True):
            assert engine.length(s) == engine.length(t)


def test_a_refused_step_changes_nothing(random_model: Callable[..., Path]) -> None:
    with opened(random_model("llama"), context=32) as engine:
        sequence, tokens = engine.new_sequence(), random_tokens(engine, 40)
        feed(engine, sequence, tokens[:20])
        for bad, error in (
            ([SequenceBatch(sequence, tokens[20:40])], ContextError),
            ([SequenceBatch(sequence, [engine.info.n_vocab])], OptionError),
            ([SequenceBatch(sequence, [-1])], OptionError),
            ([SequenceBatch(sequence, [1]), SequenceBatch(sequence, [2])], OptionError),
        ):
            with pytest.raises(error):
                engine.step(bad)
        assert engine.length(sequence) == 20
        untouched = engine.new_sequence()
        feed(engine, untouched, tokens[:20])
        same_bits(feed(engine, sequence, tokens[20:32]), feed(engine, untouched, tokens[20:32]))


@LAYOUTS
def test_fork_truncate_and_export_give_the_same_bits(model: Path, transposed: bool) -> None:
    with opened(model, **layout(transposed)) as engine:
        tokens = random_tokens(engine, 40)
        source = engine.new_sequence()
        feed(engine, source, tokens[:30])
        fork = engine.fork_sequence(source, 20)
        feed(engine, source, tokens[30:40])  # must not show in the fork
        copy = engine.import_sequence(engine.export_sequence(fork))
        engine.truncate(source, 20)
        expected = feed(engine, source, tokens[5:8])
        same_bits(feed(engine, fork, tokens[5:8]), expected)
        same_bits(feed(engine, copy, tokens[5:8]), expected)


def test_damaged_exports_are_refused(random_model: Callable[..., Path]) -> None:
    with opened(random_model("llama")) as engine:
        sequence = engine.new_sequence()
        feed(engine, sequence, random_tokens(engine, 10))
        data = engine.export_sequence(sequence)
        for bad in (b"", data[:10], data[:-1], data + b"\0", b"XXXX" + data[4:], data[:4] + b"\xff\xff\xff\x7f" + data[8:]):
            with pytest.raises(SessionFileError):
                engine.import_sequence(bad)


@pytest.mark.parametrize("type_", ["Q4_0", "Q4_1", "Q8_0", "F16"])
def test_exact_rows_holds_for_every_text_and_every_number_up_to_it(random_model: Callable[..., Path], type_: str) -> None:
    """The measures of SmolLM2 in small: rounding hides differences on most texts, so many are tried."""
    path = random_model("llama", type=type_, n_embd=192, n_head=3, n_head_kv=1, n_ff=512, n_layer=4)
    with opened(path) as engine:
        rows = engine.exact_rows()
        assert rows >= (1 if type_ == "F16" else 4)
        for seed in range(12):
            n = 1 + seed % rows
            tokens = random_tokens(engine, 20 + n, seed)
            one, many = engine.new_sequence(), engine.new_sequence()
            feed(engine, one, tokens[:20])
            feed(engine, many, tokens[:20])
            singles = np.concatenate([feed(engine, one, [t]) for t in tokens[20:]])
            same_bits(feed(engine, many, tokens[20:]), singles)
            assert engine.export_sequence(one) == engine.export_sequence(many)
            engine.free_sequence(one)
            engine.free_sequence(many)


def test_sessions_move_between_layouts(random_model: Callable[..., Path]) -> None:
    path = random_model("llama")
    with opened(path, **layout(False)) as by_cell, opened(path, **layout(True)) as transposed:
        tokens, source = random_tokens(by_cell, 30), by_cell.new_sequence()
        feed(by_cell, source, tokens)
        data = by_cell.export_sequence(source)
        moved = transposed.import_sequence(data)
        assert transposed.export_sequence(moved) == data
        a, b = feed(by_cell, source, tokens[:1]), feed(transposed, moved, tokens[:1])
        assert np.abs(a - b).mean() / np.abs(a).mean() < 2e-3


def test_exact_rows_is_remembered_for_other_models_of_the_same_kinds(
    random_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path))
    with opened(random_model("llama", type="Q8_0")) as engine:
        found = engine.exact_rows()
    monkeypatch.setattr("edge_rt.core.autotune._product", None)  # a second probe would fail
    with opened(random_model("llama", type="Q8_0", seed=5)) as engine:
        assert engine.exact_rows() == found
    (tmp_path / "exact-columns.json").write_text('{"damaged": ')
    with opened(random_model("llama", type="Q8_0")) as engine, pytest.raises(TypeError):
        engine.exact_rows()


def test_closing_frees_packed_memory_for_ordinary_use(random_model: Callable[..., Path]) -> None:
    """The packed file is mapped over memory of the allocator: after close that memory must be writable again."""
    path = random_model("llama", type="Q4_0")
    for _ in range(20):
        with opened(path) as engine:
            feed(engine, engine.new_sequence(), random_tokens(engine, 4))
        blocks = [bytearray(200_000) for _ in range(50)]
        for block in blocks:
            block[::4096] = b"x" * len(block[::4096])
