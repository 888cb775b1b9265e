"""Adapters: libllama's results bit for bit, each sequence its own in any company, and nothing computed with one used with another."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from bits import feed, random_tokens, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Reference

from edge_rt.core.engine import AppliesAdapters, SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.lora import LoraFile, open_lora
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.errors import ContextError, ModelChanged, UnsupportedModel
from edge_rt.hooks import EngineOptions
from edge_rt.testing.random_models import LINEAR, write_random_adapter

WITH_ENDS = LINEAR + r"|output\.weight|token_embd\.weight"
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "joined": ("llama", {}, {}),
    "f16": ("llama", {"type": "F16"}, {"type": "F16"}),
    "q8_0": ("llama", {"type": "Q8_0"}, {"type": "Q8_0", "rank": 32}),
    "packed": ("llama", {"type": "Q4_0", "n_embd": 128}, {"type": "F16"}),
    "bias": ("llama", {"bias": True}, {"alpha": None}),
    "fused": ("llama", {"fused_qkv": True, "bias": True}, {}),
    "some-weights": ("llama", {}, {"target": r"blk\.1\.(attn_k|attn_v|ffn_up)\.weight"}),
    "ends": ("llama", {"tied": False}, {"target": WITH_ENDS}),
    "deci": ("deci", {"n_ff": (96, 160)}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 32}, {"rank": 3, "alpha": 5.0}),
    "experts": ("qwen3moe", {}, {}),
}
SCALE = 0.7


class WithAdapter(Reference):
    """libllama with an adapter, and with weights packed as ours are or not at all."""

    def __init__(self, path: Path, adapter: Path, scale: float, *, pack: bool) -> None:
        super().__init__(path, flash=True, layouts=None if pack else ())
        found = llama.llama_adapter_lora_init(self._model, str(adapter).encode())
        assert found, "libllama refuses the adapter"
        adapters, scales = (llama.llama_adapter_lora_p_ctypes * 1)(found), (ctypes.c_float * 1)(scale)
        assert llama.llama_set_adapters_lora(self._context, adapters, 1, scales) == 0


@contextmanager
def opened(path: Path, *adapters: Path, **options: Any) -> Iterator[tuple[GgmlEngine, list[int]]]:
    """An engine, and the numbers of the adapters."""
    files: list[LoraFile] = []
    given = EngineOptions(**{"threads": 1, "context": 512, "extra": {"ggml.transposed_values": False}, **options})
    with ModelFile.open(path) as file, closing(GgmlEngine(file, given)) as engine:
        try:
            files += [open_lora(one, file.header) for one in adapters]
            yield engine, [engine.open_adapter(one) for one in files]
        finally:
            engine.close()
            for one in files:
                one.file.close()


def adapter_for(model: Path, folder: Path, seed: int = 0, **measures: Any) -> Path:
    with ModelFile.open(model) as file:
        return write_random_adapter(folder / f"adapter-{seed}.gguf", file.header, seed=seed, **measures)


def adapted(engine: GgmlEngine, adapter: int | None, scale: float = 1.0) -> int:
    sequence = engine.new_sequence()
    engine.adapt(sequence, adapter, scale)
    return sequence


# ---- one adapter -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_prefill_and_decode_are_libllamas_bit_for_bit(kind: str, random_model: Callable[..., Path], tmp_path: Path) -> None:
    architecture, measures, of_adapter = MODELS[kind]
    path = random_model(architecture, **measures)
    adapter = adapter_for(path, tmp_path, **of_adapter)
    with opened(path, adapter) as (engine, (number,)), closing(WithAdapter(path, adapter, SCALE, pack=kind == "packed")) as libllama:
        assert isinstance(engine, AppliesAdapters)
        tokens, sequence, plain = random_tokens(engine, 56), adapted(engine, number, SCALE), engine.new_sequence()
        for part in (tokens[:30], tokens[30:50], *([token] for token in tokens[50:])):
            found = feed(engine, sequence, part)
            same_bits(found, libllama.feed(part))
            assert np.abs(found - feed(engine, plain, part)).max() > 1e-2, "the adapter changes next to nothing"


def test_an_adapter_of_zeros_and_one_that_is_applied_no_times_change_no_bit(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("llama")
    with opened(path, adapter_for(path, tmp_path, gain=0), adapter_for(path, tmp_path, 1)) as (engine, (zeros, other)):
        tokens = random_tokens(engine, 30)
        expected = [feed(engine, plain := engine.new_sequence(), tokens[:20]), feed(engine, plain, tokens[20:21])]
        for sequence in (adapted(engine, zeros), adapted(engine, other, 0.0), adapted(engine, None)):
            same_bits(feed(engine, sequence, tokens[:20]), expected[0])
            same_bits(feed(engine, sequence, tokens[20:21]), expected[1])


def test_a_few_tokens_together_are_each_as_if_alone(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """What ``exact_rows`` promises holds under an adapter, so drafts change nothing."""
    path = random_model("llama", type="Q8_0", n_embd=128)
    with opened(path, adapter_for(path, tmp_path, type="F16", rank=16)) as (engine, (number,)):
        n, tokens = engine.exact_rows(), random_tokens(engine, 40)
        assert n == 8, "the base products are exact here, or this test shows nothing"
        one, many = adapted(engine, number), adapted(engine, number)
        for sequence in (one, many):
            feed(engine, sequence, tokens[:20])
        same_bits(feed(engine, many, tokens[20 : 20 + n]), np.concatenate([feed(engine, one, [t]) for t in tokens[20 : 20 + n]]))


def test_a_memory_budget_changes_no_bit(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("llama", n_layer=6, n_embd=128, n_ff=512, tied=False, alignment=4096)
    adapter = adapter_for(path, tmp_path, target=WITH_ENDS)
    with ModelFile.open(path) as file:
        budget = int(file.header.file_size * 0.8)
    with opened(path, adapter) as (whole, (a,)), opened(path, adapter, memory=budget, pack=False) as (split, (b,)):
        assert split.pager is not None
        assert split.pager.streams
        tokens, one, other = random_tokens(whole, 30), adapted(whole, a), adapted(split, b)
        for part in (tokens[:20], tokens[20:21], tokens[21:]):
            same_bits(feed(split, other, part), feed(whole, one, part))


# ---- several in one step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["joined", "fused", "ends", "qwen3", "experts"])
def test_none_and_several_adapters_in_one_step_equal_each_alone(kind: str, random_model: Callable[..., Path], tmp_path: Path) -> None:
    architecture, measures, of_adapter = MODELS[kind]
    path = random_model(architecture, **measures)
    files = [adapter_for(path, tmp_path, seed, **of_adapter) for seed in (1, 2)]
    with opened(path, *files) as (engine, (a, b)):
        bindings = [(a, 1.0), (None, 1.0), (b, 1.0), (a, 1.0), (a, 0.5), (None, 1.0), (b, 1.0)]
        texts = [random_tokens(engine, n, seed=n) for n in (21, 30, 4, 3, 12, 1, 11)]
        alone = [feed(engine, adapted(engine, *binding), text) for binding, text in zip(bindings, texts, strict=True)]
        for want in ("all", "last"):
            parts = [SequenceBatch(adapted(engine, *binding), text, want) for binding, text in zip(bindings, texts, strict=True)]
            for expected, found in zip(alone, engine.step(parts), strict=True):
                close(np.array(found), expected if want == "all" else expected[-1:])


def close(a: Any, b: Any) -> None:
    """Rows of a larger base product may use other kernels; another adapter would be ten times as far off."""
    assert np.abs(a - b).mean() / np.abs(b).mean() < 4e-3


@pytest.fixture(scope="module")
def exact(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GgmlEngine, list[int]]]:
    """An engine whose base products do not depend on how many columns there are, up to 8, and three adapters."""
    path, folder = random_model("llama", type="Q8_0", n_embd=128), tmp_path_factory.mktemp("exact")
    files = [adapter_for(path, folder, seed, type=kind, rank=rank) for seed, kind, rank in ((1, "F32", 4), (2, "F16", 16), (3, "F32", 5))]
    with opened(path, *files) as (engine, numbers):
        assert engine.exact_rows() == 8
        yield engine, numbers


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_interleaving_gives_the_bits_of_each_alone(exact: tuple[GgmlEngine, list[int]], data: st.DataObject) -> None:
    """Up to six sequences of any adapters, scales and none, a few tokens of some of them a step, in any order and with forks."""
    engine, numbers = exact
    bindings = data.draw(
        st.lists(st.tuples(st.sampled_from([None, *numbers]), st.sampled_from([1.0, 0.5, 0.3])), min_size=1, max_size=6), label="bindings"
    )
    chance = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    texts = [random_tokens(engine, int(chance.integers(2, 14)), seed=int(chance.integers(1 << 30))) for _ in bindings]
    alone = []
    for binding, text in zip(bindings, texts, strict=True):
        sequence = adapted(engine, *binding)
        alone.append(np.concatenate([feed(engine, sequence, [token]) for token in text]))
        engine.free_sequence(sequence)
    live = [adapted(engine, *binding) for binding in bindings]
    done, found = [0] * len(live), [list[Any]() for _ in live]
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        waiting = [i for i in range(len(live)) if done[i] < len(texts[i])]
        chosen, room, parts = chance.permutation(waiting)[: int(chance.integers(1, len(waiting) + 1))], 8, []
        for i in chosen:
            n = min(int(chance.integers(1, 4)), len(texts[i]) - done[i], room)
            if n:
                parts.append((i, texts[i][done[i] : done[i] + n]))
                room -= n
        for (i, tokens), logits in zip(parts, engine.step([SequenceBatch(live[i], tokens, "all") for i, tokens in parts]), strict=True):
            found[i].append(np.array(logits))
            done[i] += len(tokens)
        if chance.random() < 0.2:  # a fork goes on as its source would
            i = int(chance.integers(len(live)))
            fork = engine.fork_sequence(live[i], engine.length(live[i]))
            engine.free_sequence(live[i])
            live[i] = fork
    for sequence in live:
        engine.free_sequence(sequence)
    for rows, expected in zip(found, alone, strict=True):
        same_bits(np.concatenate(rows), expected)


# ---- sequences -------------------------------------------------------------------------------------------------------


def test_an_adapter_is_bound_to_an_empty_sequence_alone(exact: tuple[GgmlEngine, list[int]]) -> None:
    engine, (a, b, _) = exact
    tokens = random_tokens(engine, 20)
    expected = [feed(engine, adapted(engine, number), tokens) for number in (a, b, None)]
    sequence = engine.new_sequence()
    feed(engine, sequence, tokens[:1])
    for other in (a, None):
        with pytest.raises(ContextError):
            engine.adapt(sequence, other)
    for number, rows in zip((a, b, None), expected, strict=True):
        engine.truncate(sequence, 0)
        engine.adapt(sequence, number)
        same_bits(feed(engine, sequence, tokens), rows)
    with pytest.raises(LookupError):
        engine.adapt(engine.new_sequence(), 99)


def test_decoding_goes_on_with_the_right_adapter_after_a_switch(exact: tuple[GgmlEngine, list[int]]) -> None:
    """The step that repeats the last one must not outlive the binding."""
    engine, (a, b, _) = exact
    tokens = random_tokens(engine, 4)

    def decode(sequence: int) -> Any:
        return np.concatenate([np.array(engine.step([SequenceBatch(sequence, [token], "last")])[0]) for token in tokens])

    expected = {number: decode(adapted(engine, number)) for number in (a, b, None)}
    sequence = engine.new_sequence()
    for number in (a, None, b, a):
        engine.truncate(sequence, 0)
        engine.adapt(sequence, number)
        same_bits(decode(sequence), expected[number])


def test_an_exported_sequence_is_bound_again_when_it_comes_back(exact: tuple[GgmlEngine, list[int]]) -> None:
    engine, (a, _, _) = exact
    tokens = random_tokens(engine, 24)
    sequence = adapted(engine, a, 0.5)
    feed(engine, sequence, tokens[:20])
    copy = engine.import_sequence(engine.export_sequence(sequence))
    with pytest.raises(ContextError):
        engine.adapt(copy, a, 0.5)
    engine.adapt(copy, a, 0.5, imported=True)
    same_bits(feed(engine, copy, tokens[20:]), feed(engine, sequence, tokens[20:]))


def test_its_memory_is_counted_and_given_back(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("llama")
    adapter = adapter_for(path, tmp_path, rank=64)
    with opened(path) as (plain, _), opened(path, adapter) as (engine, (number,)):
        more = engine.memory().weights_mapped - plain.memory().weights_mapped
        assert 0 < more <= adapter.stat().st_size
        tokens = random_tokens(engine, 20)
        expected = feed(engine, adapted(engine, number), tokens)
        engine.cool()
        same_bits(feed(engine, adapted(engine, number), tokens), expected)


def test_a_file_that_changes_under_us_is_an_error(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("llama")
    adapter = adapter_for(path, tmp_path)
    with opened(path, adapter) as (engine, (number,)):
        sequence, plain = adapted(engine, number), engine.new_sequence()
        for one in (sequence, plain):
            engine.step([SequenceBatch(one, [1])])
        with adapter.open("r+b") as file:
            file.truncate(100)
        for tokens in ([2], [2, 3]):
            with pytest.raises(ModelChanged, match="adapter-0"):
                engine.step([SequenceBatch(sequence, tokens)])
        assert engine.length(sequence) == 1
        engine.step([SequenceBatch(plain, [2])])


def test_what_no_graph_here_changes_is_refused(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("qwen3moe")
    for target in (r"blk\.0\.ffn_gate_inp\.weight", r"blk\.\d+\.ffn_up_exps\.weight"):
        with pytest.raises(UnsupportedModel, match="--engine llama_cpp"), opened(path, adapter_for(path, tmp_path, target=target)):
            pass
