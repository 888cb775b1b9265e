"""Blocks on an accelerator, simulated (sim/sim_backend.cpp): to the bit what the CPU gives, however many of them are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import feed, random_tokens, same_bits

from edge_rt.core.engine import SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.graph import builder
from edge_rt.core.graph.builder import AttentionSupport
from edge_rt.core.kv.pruning import WATCHED
from edge_rt.core.weights.gpu_offload import Accelerator
from edge_rt.errors import Cancelled, NativeError, OptionError, OutOfMemory, UnsupportedModel
from edge_rt.hooks import EngineOptions
from edge_rt.native import devices

LAYERS = 4
ENOUGH = 1 << 28
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-f16": ("llama", {"type": "F16"}),
    "llama-q4_1": ("llama", {"type": "Q4_1"}),
    "llama-q4_0": ("llama", {"type": "Q4_0"}),
    "llama-untied": ("llama", {"tied": False, "output_type": "Q8_0", "type": "Q4_0"}),
    "llama-bias": ("llama", {"bias": True}),
    "llama-fused-bias": ("llama", {"fused_qkv": True, "bias": True}),
    "llama-llama3": ("llama", {"rope_freqs": [1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]}),
    "llama-experts": ("llama", {"n_expert": 4, "n_expert_used": 2}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3moe": ("qwen3moe", {}),
}
PLACES = pytest.mark.parametrize("blocks", [LAYERS, 2, 0], ids=["all", "half", "head"])
LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["by-cell", "transposed"])


@contextmanager
def opened(path: Path, accelerator: Accelerator | None = None, **options: Any) -> Iterator[GgmlEngine]:
    """An engine on one thread, with weights as they are in the file: a device has no packed ones."""
    chosen = {"threads": 1, "context": 640, "pack": False, "extra": {"ggml.transposed_values": False}, **options}
    with ModelFile.open(path) as file, closing(GgmlEngine(file, EngineOptions(**chosen), accelerator=accelerator)) as engine:
        yield engine


def accelerator_for(path: Path, blocks: int, **options: Any) -> Accelerator:
    """With just the memory for so many blocks and the head."""
    with opened(path, Accelerator("SIM", ENOUGH), **options) as engine:
        assert engine._offloaded is not None
        sizes = engine._offloaded.sizes
    chosen = list(sizes.blocks)[len(sizes.blocks) - blocks :]
    return Accelerator("SIM", sizes.head + sizes.compute + sum(chosen) + blocks * sizes.cache)


@contextmanager
def both(path: Path, blocks: int = 2, **options: Any) -> Iterator[tuple[GgmlEngine, GgmlEngine]]:
    """The same model on the CPU, and with so many of its blocks on the device."""
    found = accelerator_for(path, blocks, **options)
    with opened(path, **options) as cpu, opened(path, found, **options) as engine:
        expected = [f"blk.{i}" for i in range(LAYERS - blocks, LAYERS)]
        assert list(engine.info.offloaded) == [*expected, "norm", "head"]
        yield cpu, engine


@pytest.fixture(params=MODELS, ids=list(MODELS))
def model(request: pytest.FixtureRequest, random_model: Callable[..., Path], simulator: str) -> Path:
    architecture, measures = MODELS[request.param]
    return random_model(architecture, n_layer=LAYERS, **measures)


@pytest.fixture
def llama(random_model: Callable[..., Path], simulator: str) -> Path:
    return random_model("llama", n_layer=LAYERS, n_embd=128, type="Q4_1")


def layout(transposed: bool) -> dict[str, Any]:
    return {"extra": {"ggml.transposed_values": transposed}}


# ---- steps -----------------------------------------------------------------------------------------------------------


@LAYOUTS
@PLACES
def test_prompt_and_answer_are_the_cpus_bit_for_bit(model: Path, blocks: int, transposed: bool) -> None:
    with both(model, blocks, **layout(transposed)) as (cpu, engine):
        tokens = random_tokens(cpu, 120)
        a, b = cpu.new_sequence(), engine.new_sequence()
        for start, end in [(0, 70), (70, 75), (75, 110), *((i, i + 1) for i in range(110, 120))]:
            same_bits(feed(engine, b, tokens[start:end]), feed(cpu, a, tokens[start:end]))


@PLACES
def test_several_sequences_in_one_step(llama: Path, blocks: int) -> None:
    """On the CPU those that decode are one stack; with blocks on a device each goes alone."""
    with both(llama, blocks) as engines:
        texts = [random_tokens(engines[0], n, seed=n) for n in (30, 17, 80, 9)]
        opened = [[one.new_sequence() for _ in texts] for one in engines]
        for start, end in ((0, -4), (-4, -3), (-3, -2), (-2, -1)):
            expected, got = (
                [
                    np.array(rows)
                    for rows in one.step([SequenceBatch(s, text[start:end], "last") for s, text in zip(sequences, texts, strict=True)])
                ]
                for one, sequences in zip(engines, opened, strict=True)
            )
            for mine, theirs in zip(got, expected, strict=True):
                same_bits(mine, theirs)


def test_a_long_prompt_among_others_and_steps_without_logits(llama: Path) -> None:
    with both(llama, context=1024) as (cpu, engine):
        long, short = random_tokens(cpu, 700), random_tokens(cpu, 9)
        found = []
        for one in (cpu, engine):
            a, b = one.new_sequence(), one.new_sequence()
            assert one.step([SequenceBatch(a, long, "none"), SequenceBatch(b, short[:-1], "none")]) == [None, None]
            found.append([np.array(rows) for rows in one.step([SequenceBatch(a, [1], "last"), SequenceBatch(b, short[-1:], "all")])])
        for expected, got in zip(*found, strict=True):
            same_bits(got, expected)


@PLACES
def test_hidden_states(llama: Path, blocks: int) -> None:
    with both(llama, blocks) as (cpu, engine):
        tokens = random_tokens(cpu, 40)
        expected, got = (one.hidden([SequenceBatch(one.new_sequence(), tokens, "all")])[0] for one in (cpu, engine))
        same_bits(got, expected)


def test_head_alone_and_no_logits_at_all(llama: Path) -> None:
    """Nothing crosses over then."""
    with both(llama, 0) as (cpu, engine):
        tokens = random_tokens(cpu, 20)
        a, b = cpu.new_sequence(), engine.new_sequence()
        for one, sequence in ((cpu, a), (engine, b)):
            one.step([SequenceBatch(sequence, tokens, "none")])
        same_bits(feed(engine, b, [3]), feed(cpu, a, [3]))


def test_quantised_keys(random_model: Callable[..., Path], simulator: str) -> None:
    path = random_model("llama", n_layer=LAYERS, head_dim=32)
    with both(path, key_type="q8_0") as (cpu, engine):
        tokens = random_tokens(cpu, 60)
        a, b = cpu.new_sequence(), engine.new_sequence()
        for part in (tokens[:50], *([token] for token in tokens[50:])):
            same_bits(feed(engine, b, part), feed(cpu, a, part))


@pytest.mark.parametrize("streamed", [False, True])
def test_the_rest_may_be_streamed_and_packed(random_model: Callable[..., Path], simulator: str, streamed: bool) -> None:
    """Blocks on the CPU under a memory limit, from packed weights: other bits than plain ones on the device, so close is enough."""
    path = random_model("llama", n_layer=LAYERS, n_embd=256, n_ff=512, type="Q4_0")
    found = accelerator_for(path, 1)
    with opened(path) as cpu, opened(path, found, pack=True) as whole:
        near = sum(unit.size for unit in whole.units())
        assert whole.info.offloaded[0] == "blk.3"
        assert not {unit.name for unit in whole.units()} & set(whole.info.offloaded) - {"norm"}
        with opened(path, found, pack=True, memory=near * 9 // 10 if streamed else None) as engine:
            assert (engine.pager is not None) is streamed
            tokens = random_tokens(cpu, 40)
            a, b = feed(cpu, cpu.new_sequence(), tokens), feed(engine, engine.new_sequence(), tokens)
            assert np.abs(a - b).mean() / np.abs(a).mean() < 2e-2
            same_bits(b, feed(whole, whole.new_sequence(), tokens))


@pytest.mark.parametrize("blocks", [30, 7])
def test_a_real_model(smollm2: Path, simulator: str, blocks: int) -> None:
    """30 blocks in Q4_1, with flash attention over 64 of a head: a prompt and the tokens that follow."""
    options = {"threads": 2, "context": 512}
    with opened(smollm2, **options) as cpu, opened(smollm2, accelerator_for(smollm2, blocks, **options), **options) as engine:
        assert len(engine.info.offloaded) == blocks + 2
        tokens = random_tokens(cpu, 70)
        a, b = cpu.new_sequence(), engine.new_sequence()
        for part in (tokens[:64], *([token] for token in tokens[64:])):
            same_bits(feed(engine, b, part), feed(cpu, a, part))


# ---- cells -----------------------------------------------------------------------------------------------------------


def contents(engine: GgmlEngine, sequence: int) -> list[Any]:
    """Copies of keys and values in use, layer by layer."""
    cache, found = engine._sequences[sequence], []
    for layer in range(engine.info.n_layer):
        with cache.cells(layer) as (keys, values):
            found += [keys[: cache.length].copy(), values[: cache.length].copy()]
    return found


def same_cells(a: GgmlEngine, first: int, b: GgmlEngine, second: int) -> None:
    for mine, theirs in zip(contents(a, first), contents(b, second), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@LAYOUTS
def test_cells_leave_and_come_back_as_on_the_cpu(llama: Path, transposed: bool) -> None:
    """Growing, forking, truncating, removing, closing gaps, inserting: the same cells and logits after each."""
    with both(llama, 3, **layout(transposed)) as engines:
        tokens = random_tokens(engines[0], 400)
        opened = [one.new_sequence() for one in engines]
        for start in range(0, 400, 50):  # moves to larger memory on the way
            a, b = (feed(one, s, tokens[start : start + 50]) for one, s in zip(engines, opened, strict=True))
            same_bits(b, a)

        def each(act: Callable[[GgmlEngine, int], Any]) -> list[Any]:
            found = [act(one, s) for one, s in zip(engines, opened, strict=True)]
            same_cells(engines[0], opened[0], engines[1], opened[1])
            a, b = (feed(one, s, [7, 8]) for one, s in zip(engines, opened, strict=True))
            same_bits(b, a)
            return found

        each(lambda one, s: one.truncate(s, 300))
        cells = each(lambda one, s: one.export_cells(s, 100, 150))
        assert cells[0] == cells[1]
        each(lambda one, s: one.remove_cells(s, [(100, 150), (200, 210)]))
        each(lambda one, s: one.insert_cells(s, 100, cells[0]))
        each(lambda one, s: one.renumber(s))
        opened = each(lambda one, s: one.fork_sequence(s, 120))
        each(lambda one, s: one.truncate(s, 60))


def test_sessions_move_between_cpu_and_device(llama: Path) -> None:
    with both(llama) as (cpu, engine):
        tokens = random_tokens(cpu, 90)
        a, b = cpu.new_sequence(), engine.new_sequence()
        for one, sequence in ((cpu, a), (engine, b)):
            feed(one, sequence, tokens)
        saved = cpu.export_sequence(a)
        assert engine.export_sequence(b) == saved
        same_bits(feed(engine, engine.import_sequence(saved), [5]), feed(cpu, a, [5]))


@LAYOUTS
@pytest.mark.parametrize("method", ["defensive", "window"])
def test_pruning_keeps_the_same_cells(llama: Path, transposed: bool, method: str) -> None:
    with both(llama, 3, **layout(transposed)) as engines:
        tokens, opened = random_tokens(engines[0], 300), []
        for one in engines:
            opened.append(sequence := one.new_sequence())
            one.watch(sequence, WATCHED)
            feed(one, sequence, tokens)
            assert one.prune(sequence, 120, first=4, last=20, method=method).cells == 180
        same_cells(engines[0], opened[0], engines[1], opened[1])
        for _ in range(2):
            a, b = (feed(one, sequence, tokens[:30]) for one, sequence in zip(engines, opened, strict=True))
            same_bits(b, a)
        for one, sequence in zip(engines, opened, strict=True):
            one.prune(sequence, 60, first=4, last=20, method=method)
            one.renumber(sequence)
        same_cells(engines[0], opened[0], engines[1], opened[1])
        a, b = (feed(one, sequence, [1, 2]) for one, sequence in zip(engines, opened, strict=True))
        same_bits(b, a)


# ---- memory ----------------------------------------------------------------------------------------------------------


def held_by_the_device(engine: GgmlEngine) -> int:
    assert engine._offloaded is not None
    memory = engine._offloaded.device.memory()
    return memory.total - memory.free


def test_units_go_there_at_first_touch_and_progress_is_told(llama: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with opened(llama, Accelerator("SIM", ENOUGH), progress=lambda *step: told.append(step)) as engine:
        uploads = [step for step in told if step[0] == "upload"]
        assert uploads == []
        feed(engine, sequence := engine.new_sequence(), [1, 2])
        uploads = [step for step in told if step[0] == "upload"]
        assert [done for _, done, _ in uploads] == sorted({done for _, done, _ in uploads}), "each unit once, in order"
        assert len(uploads) == len(engine.info.offloaded)
        assert uploads[-1][1] == uploads[-1][2] > 0
        feed(engine, sequence, [3])
        assert len([step for step in told if step[0] == "upload"]) == len(uploads)


def test_an_upload_can_be_stopped_and_goes_on_later(llama: Path) -> None:
    told: list[int] = []

    def stop(phase: str, done: int, total: int) -> None:
        told.append(done)
        if phase == "upload" and len(told) == 2:
            raise Cancelled("enough")

    with opened(llama) as cpu, opened(llama, Accelerator("SIM", ENOUGH)) as engine:
        engine._progress = stop
        sequence = engine.new_sequence()
        with pytest.raises(Cancelled):
            feed(engine, sequence, [1, 2])
        assert engine.length(sequence) == 0
        same_bits(feed(engine, sequence, [1, 2]), feed(cpu, cpu.new_sequence(), [1, 2]))
        assert told == sorted(set(told))


def test_reports_say_what_lies_there_and_closing_gives_it_back(llama: Path) -> None:
    with opened(llama, accelerator_for(llama, 2)) as engine:
        before = engine.memory()
        assert 0 < before.device == held_by_the_device(engine) <= engine._offloaded.memory  # type: ignore[union-attr]
        sequences = [engine.new_sequence() for _ in range(2)]
        engine.step([SequenceBatch(one, random_tokens(engine, 40), "last") for one in sequences])
        engine.watch(sequences[0], 8)
        after = engine.memory()
        assert before.device < after.device == held_by_the_device(engine)
        for one in sequences:
            engine.free_sequence(one)
        assert engine.memory().device == held_by_the_device(engine) < after.device
        device = engine._offloaded.device  # type: ignore[union-attr]
        memory = device.memory
    assert memory().free == memory().total


def test_cooling_frees_the_device_and_sequences_go_on(llama: Path) -> None:
    with both(llama) as (cpu, engine):
        a, b = cpu.new_sequence(), engine.new_sequence()
        same_bits(feed(engine, b, [1, 2, 3]), feed(cpu, a, [1, 2, 3]))
        held = held_by_the_device(engine)
        engine.cool()
        assert held_by_the_device(engine) < held // 2
        assert engine.memory().device == held_by_the_device(engine)
        engine.warm()
        same_bits(feed(engine, b, [4]), feed(cpu, a, [4]))


def test_more_sequences_than_fit_are_refused_and_the_others_go_on(llama: Path) -> None:
    with both(llama) as (cpu, engine):
        tokens, opened = random_tokens(cpu, 30), []
        a, b = cpu.new_sequence(), engine.new_sequence()
        same_bits(feed(engine, b, tokens), feed(cpu, a, tokens))

        def open_many() -> None:
            for _ in range(1000):
                opened.append(engine.new_sequence())

        with pytest.raises(OutOfMemory, match="SIM0"):
            open_many()
        assert held_by_the_device(engine) <= engine._offloaded.memory  # type: ignore[union-attr]
        for one in opened:
            engine.free_sequence(one)
        same_bits(feed(engine, b, tokens[:3]), feed(cpu, a, tokens[:3]))


@LAYOUTS
@PLACES
def test_no_more_is_held_than_was_predicted(llama: Path, blocks: int, transposed: bool) -> None:
    """In the host's memory and the device's together: caches as they grow, are watched and pruned; graphs and compute buffers."""
    found = accelerator_for(llama, blocks, context=1024, **layout(transposed))
    plenty = Accelerator("SIM", 64 << 20) if blocks == LAYERS else Accelerator("SIM", found.memory)
    with opened(llama, plenty, context=1024, **layout(transposed)) as engine:
        tokens, said = random_tokens(engine, 900), {}
        for cells in (900, 300):
            said[sequence := engine.new_sequence()] = engine.needed_bytes(None, cells, pruned=True)
            engine.watch(sequence, WATCHED)
        most = engine.compute_bytes(900, 2, 16)
        for start in range(0, 900, 150):
            engine.step([SequenceBatch(s, tokens[start : start + 150], "last") for i, s in enumerate(said) if start < (900, 300)[i]])
            for sequence, bytes_ in said.items():
                assert engine.sequence_bytes(sequence) <= bytes_
            caches, compute = engine.held_bytes()
            assert caches <= sum(said.values())
            assert compute <= most
        first = next(iter(said))
        engine.prune(first, 200, first=4, last=20)
        assert engine.sequence_bytes(first) <= said[first]
        assert held_by_the_device(engine) == engine.memory().device <= plenty.memory


def test_a_device_with_less_than_it_may_give(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIM_MEMORY", str(100_000))
    with pytest.raises(OutOfMemory, match="SIM0 has no"), opened(llama, Accelerator("SIM", ENOUGH)):
        pass
    monkeypatch.delenv("SIM_MEMORY")
    with opened(llama, Accelerator("SIM", ENOUGH)) as engine:
        assert held_by_the_device(engine) == engine.memory().device, "nothing of the first attempt is left"


def test_the_device_runs_short_in_the_middle_and_recovers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs took its memory: the step fails, nothing has changed, and works when there is room again."""
    with both(llama, LAYERS) as (cpu, engine):
        a, b, tokens = cpu.new_sequence(), engine.new_sequence(), random_tokens(cpu, 500)
        same_bits(feed(engine, b, tokens[:5]), feed(cpu, a, tokens[:5]))
        monkeypatch.setenv("SIM_MEMORY", str(held_by_the_device(engine) + 1000))
        with pytest.raises(OutOfMemory):
            engine.step([SequenceBatch(b, tokens[5:], "last")])
        assert engine.length(b) == 5
        monkeypatch.delenv("SIM_MEMORY")
        same_bits(feed(engine, b, tokens[5:30]), feed(cpu, a, tokens[5:30]))


def test_a_step_that_fails_is_none(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of decoding, where a step repeats the graph of the one before; and with a prompt."""
    with both(llama) as (cpu, engine):
        a, b = cpu.new_sequence(), engine.new_sequence()
        for token in (1, 2, 3, 4):
            same_bits(feed(engine, b, [token]), feed(cpu, a, [token]))
        for tokens in ([5], list(range(40)), [6]):
            monkeypatch.setenv("SIM_FAILS", "1")
            with pytest.raises(NativeError, match="failed to compute a graph on SIM0"):
                feed(engine, b, tokens)
            assert engine.length(b) == cpu.length(a)
            monkeypatch.delenv("SIM_FAILS")
            same_bits(feed(engine, b, tokens), feed(cpu, a, tokens))


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [
        (Accelerator("SIM", 1000), "do not even hold this model's head; give at least"),
        (Accelerator("SIM", ENOUGH, 2), "SIM has no device 2"),
        (Accelerator("SIM", ENOUGH, id="0000:03:00.0"), "SIM has no device at 0000:03:00.0"),
        (Accelerator("NONE", ENOUGH), "has no backend NONE, only CPU, SIM"),
    ],
)
def test_what_cannot_be(llama: Path, accelerator: Accelerator, message: str) -> None:
    with pytest.raises(OptionError, match=message), opened(llama, accelerator):
        pass


def test_devices_are_told_apart(llama: Path) -> None:
    second_one = Accelerator("SIM", ENOUGH, id="0000:02:00.0")
    with opened(llama, Accelerator("SIM", ENOUGH, 0)) as first, opened(llama, second_one) as second:
        tokens = random_tokens(first, 20)
        same_bits(feed(second, second.new_sequence(), tokens), feed(first, first.new_sequence(), tokens))
        assert [one._offloaded.name for one in (first, second)] == ["SIM0", "SIM1"]  # type: ignore[union-attr]


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["RMS_NORM", "SET_ROWS", "ROPE"])
def test_a_device_without_a_kernel_is_refused_when_it_is_opened(llama: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setenv("SIM_WITHOUT", missing)
    with pytest.raises(UnsupportedModel, match=f"SIM0 has no kernel for {missing}"), opened(llama, Accelerator("SIM", ENOUGH)):
        pass
    assert not held(), "nothing is left there"


def held() -> int:
    with_device = devices.open_device("SIM", 0)
    try:
        memory = with_device.memory()
        return memory.total - memory.free
    finally:
        with_device.close()


def test_without_flash_attention_values_are_transposed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA where heads have an odd size: matmuls then serve prompts, too."""
    monkeypatch.setenv("SIM_WITHOUT", "FLASH_ATTN_EXT")
    with opened(llama, **layout(True)) as cpu, opened(llama, accelerator_for(llama, 2, extra={}), extra={}) as engine:
        assert engine.transposed_values
        assert engine._traits == AttentionSupport(False, False)
        tokens = random_tokens(cpu, 130)
        a, b = cpu.new_sequence(), engine.new_sequence()
        for part in (tokens[:40], tokens[40:]):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(builder, "TILES_FROM", 1000)  # 90 tokens would go through flash attention on the CPU
                expected = feed(cpu, a, part)
            same_bits(feed(engine, b, part), expected)


def test_without_masks_for_each_head_tokens_go_together(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA's flash attention has it."""
    monkeypatch.setenv("SIM_WITHOUT", "FLASH_ATTN_EXT:each")
    with opened(llama) as cpu, opened(llama, accelerator_for(llama, 2)) as engine:
        assert engine._traits == AttentionSupport(True, False)
        tokens = random_tokens(cpu, 60)
        a, b = cpu.new_sequence(), engine.new_sequence()
        for part in (tokens[:50], tokens[50:55], tokens[55:56], tokens[56:]):
            expected, got = feed(cpu, a, part), feed(engine, b, part)
            np.testing.assert_allclose(got, expected, atol=5e-3 * np.abs(expected).max())
        assert engine.exact_rows() == 1
