"""The fallback engine on libllama."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Reference

from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.errors import ContextError, ModelChanged, NativeError, OptionError, OutOfMemory, SessionFileError, UnsupportedModel
from edge_rt.hooks import EngineOptions, Refusal, SequenceBatch
from edge_rt.native.llama import Vocab
from edge_rt.plugins.llama_cpp import LlamaCpp
from edge_rt.testing.conformance import EngineConformance

CONTEXT = 128


@pytest.fixture(scope="module")
def tiny(random_model: Callable[..., Path]) -> Iterator[ModelFile]:
    """A tiny llama."""
    with ModelFile.open(random_model("llama")) as model:
        yield model


@pytest.fixture
def engine(tiny: ModelFile) -> Iterator[Any]:
    opened = LlamaCpp().open(tiny, EngineOptions(context=CONTEXT, threads=1, extra={"llama_cpp.sequences": 4}))
    yield opened
    opened.close()


def tokens(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 200, n)]


# ---- the protocol, on several architectures --------------------------------------------------------------------------


class _Conformance(EngineConformance):
    # Parts of 64 tokens and more go through another attention kernel of libllama, with F16 sums.
    tolerance = 5e-3

    @pytest.fixture
    def engine_factory(self) -> LlamaCpp:
        return LlamaCpp()


class TestLlama(_Conformance):
    @pytest.fixture
    def model(self, tiny: ModelFile) -> ModelFile:
        return tiny


class TestQuantisedKeys(_Conformance):
    options = EngineOptions(context=640, threads=1, key_type="q8_0")
    tolerance = 5e-2  # where cells lie decides what is summed first, and rounding to Q8_0 makes steps of it

    @pytest.fixture
    def model(self, random_model: Callable[..., Path]) -> Iterator[ModelFile]:
        with ModelFile.open(random_model("llama", type="Q4_0", n_embd=128)) as model:
            yield model


class TestGemma(_Conformance):
    """An architecture that edge-rt has no graph for."""

    @pytest.fixture
    def model(self, random_model: Callable[..., Path]) -> Iterator[ModelFile]:
        with ModelFile.open(random_model("gemma")) as model:
            yield model


class TestMamba(_Conformance):
    """A state of fixed size: no going back."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Iterator[ModelFile]:
        with ModelFile.open(write_mamba(tmp_path / "mamba.gguf")) as model:
            yield model


def write_mamba(path: Path, n_layer: int = 2, n_embd: int = 32, n_vocab: int = 220) -> Path:
    """A tiny random Mamba; vocabulary without text."""
    import gguf

    rng = np.random.default_rng(0)
    inner, state, rank, kernel = 2 * n_embd, 8, 4, 4
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_vocab_size(n_vocab)
    writer.add_tokenizer_model("none")
    writer.add_context_length(640)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(n_layer)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {
        "attn_norm.weight": (n_embd,), "ssm_in.weight": (2 * inner, n_embd), "ssm_conv1d.weight": (inner, kernel),
        "ssm_conv1d.bias": (inner,), "ssm_x.weight": (rank + 2 * state, inner), "ssm_dt.weight": (inner, rank), "ssm_dt.bias": (inner,),
        "ssm_a": (inner, state), "ssm_d": (inner,), "ssm_out.weight": (n_embd, inner),
    }  # fmt: skip
    tensors = {"token_embd.weight": (n_vocab, n_embd), "output_norm.weight": (n_embd,)}
    tensors |= {f"blk.{layer}.{name}": shape for layer in range(n_layer) for name, shape in shapes.items()}
    for name, shape in tensors.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("ssm_a"):
            values = -np.abs(values)  # the state decays
        writer.add_tensor(name, values if "norm" not in name else np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- what it supports ------------------------------------------------------------------------------------------------


def model_of(architecture: str) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(path=Path("x.gguf"), header=SimpleNamespace(architecture=architecture))


def test_it_is_the_last_choice() -> None:
    assert LlamaCpp().supports(model_of("any-new-thing"), EngineOptions()) == 1


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        ("nomic-bert", EngineOptions(), "do not generate text"),
        ("llama", EngineOptions(device="cuda:0"), "not on cuda:0"),
        ("llama", EngineOptions(memory=1 << 20), "cannot limit the memory"),
    ],
)
def test_what_it_refuses(architecture: str, options: EngineOptions, reason: str) -> None:
    answer = LlamaCpp().supports(model_of(architecture), options)
    assert isinstance(answer, Refusal)
    assert reason in answer.reason
    assert answer.remedy


def test_an_unknown_architecture_is_refused_with_libllamas_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import gguf

    path = tmp_path / "new.gguf"
    writer = gguf.GGUFWriter(path, "nonesuch")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with ModelFile.open(path) as model, pytest.raises(UnsupportedModel, match=r"new.gguf: .*unknown model architecture: 'nonesuch'"):
        LlamaCpp().open(model, EngineOptions())
    assert capfd.readouterr() == ("", "")


def test_opening_is_quiet_and_reports_progress(tiny: ModelFile, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int, int]] = []
    LlamaCpp().open(tiny, EngineOptions(context=CONTEXT, threads=1, progress=lambda *step: seen.append(step))).close()
    assert capfd.readouterr() == ("", "")
    size = tiny.header.file_size
    assert seen[-1] == ("load", size, size)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_progress_stops_the_opening_by_raising(tiny: ModelFile) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LlamaCpp().open(tiny, EngineOptions(context=CONTEXT, progress=stop))


def test_the_context_is_the_models_own_unless_asked(tiny: ModelFile) -> None:
    engine = LlamaCpp().open(tiny, EngineOptions(threads=1))
    assert engine.info.max_context == engine.info.train_context == 512
    engine.close()
    for context in (0, -5):
        with pytest.raises(OptionError, match="at least 1 token"):
            LlamaCpp().open(tiny, EngineOptions(context=context))


def test_a_cache_larger_than_the_free_memory_is_refused_before_it_is_made(tiny: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100_000})())
    LlamaCpp().open(tiny, EngineOptions(context=300, threads=1)).close()  # 300 cells x 2 layers x 32 wide x 4 bytes
    with pytest.raises(OutOfMemory, match=r"400 tokens needs .* pass a smaller --ctx"):
        LlamaCpp().open(tiny, EngineOptions(context=400, threads=1))


def test_key_types(random_model: Callable[..., Path]) -> None:
    with ModelFile.open(random_model("llama")) as narrow, pytest.raises(OptionError, match="use --key-type f16"):
        LlamaCpp().open(narrow, EngineOptions(context=CONTEXT, key_type="q8_0"))


def test_without_llama_cpp_python_it_says_so(tiny: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import llama_cpp

    from edge_rt.plugins.llama_cpp import engine

    engine._library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)
    monkeypatch.delattr(llama_cpp, "llama_cpp")
    with pytest.raises(NativeError, match=r"llama-cpp-python cannot be loaded: .*; reinstall it"):
        LlamaCpp().open(tiny, EngineOptions())


def test_packing_can_be_left_out(random_model: Callable[..., Path]) -> None:
    with ModelFile.open(random_model("llama", type="Q4_0", n_embd=128)) as model:
        for pack in (True, False):
            engine = LlamaCpp().open(model, EngineOptions(context=CONTEXT, threads=1, pack=pack))
            (logits,) = engine.step([SequenceBatch(engine.new_sequence(), tokens(8))])
            assert logits is not None
            assert np.isfinite(logits).all()
            engine.close()


# ---- the model behind it ---------------------------------------------------------------------------------------------


def test_logits_are_libllamas(tiny: ModelFile, engine: Any) -> None:
    text = tokens(40)
    (logits,) = engine.step([SequenceBatch(engine.new_sequence(), text, "all")])
    reference = Reference(tiny.path, flash=True, threads=1, context=CONTEXT)
    expected = reference.feed(text)
    reference.close()
    assert np.array_equal(logits.view(np.uint32), expected.view(np.uint32))


def test_the_vocabulary_can_be_adopted(tiny: ModelFile, engine: Any) -> None:
    adopted, own = Vocab.adopt(engine.llama_model, engine), Vocab.load(tiny.native_path)
    assert adopted.tokenize("hello world") == own.tokenize("hello world")
    adopted.close()
    own.close()


def test_a_model_file_that_changes_is_noticed(tiny: ModelFile, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copy(tiny.path, copy)
    with ModelFile.open(copy) as model:
        engine = LlamaCpp().open(model, EngineOptions(context=CONTEXT, threads=1))
        sequence = engine.new_sequence()
        engine.step([SequenceBatch(sequence, [1, 2])])
        os.utime(copy, (1, 1))
        with pytest.raises(ModelChanged):
            engine.step([SequenceBatch(sequence, [3])])
        assert engine.length(sequence) == 2
        engine.close()


def test_the_memory_report_is_libllamas(tiny: ModelFile, engine: Any) -> None:
    report = engine.memory()
    assert report.weights_mapped == sum(tensor.nbytes for tensor in tiny.header.tensors.values())
    assert report.weights_resident is None
    cells = 256  # 128, rounded up by libllama
    assert report.cache == pytest.approx(cells * 2 * 32 * 2 * 2, rel=0.1)  # layers, width, keys and values, bytes of F16
    assert report.compute > 0


def test_an_engine_nobody_holds_is_freed(tiny: ModelFile) -> None:
    engine: Any = LlamaCpp().open(tiny, EngineOptions(context=CONTEXT, threads=1))
    finalizer, gone = engine._release, weakref.ref(engine)
    assert finalizer.alive
    del engine
    gc.collect()
    assert gone() is None
    assert not finalizer.alive


# ---- the shared cache ------------------------------------------------------------------------------------------------


def test_sequences_run_out_and_come_back(engine: Any) -> None:
    opened = [engine.new_sequence() for _ in range(4)]
    with pytest.raises(OutOfMemory, match="all 4 sequences"):
        engine.new_sequence()
    with pytest.raises(OutOfMemory):
        engine.fork_sequence(opened[0], 0)
    engine.free_sequence(opened[0])
    new = engine.new_sequence()
    assert new not in opened, "a number that was freed is not handed out again"


@pytest.mark.parametrize("number", [0, -1, 100_000])
def test_how_many_sequences_has_limits(tiny: ModelFile, number: int) -> None:
    with pytest.raises(OptionError, match=r"llama_cpp.sequences must be 1 to \d+"):
        LlamaCpp().open(tiny, EngineOptions(context=CONTEXT, extra={"llama_cpp.sequences": number}))


def test_sequences_that_together_outgrow_the_cache_change_nothing(tiny: ModelFile) -> None:
    """libllama rounds 640 cells up to 768. The second part's first chunk of 512 fits beside 250 cells, its second does not."""
    engine = LlamaCpp().open(tiny, EngineOptions(context=640, threads=1))
    first, second, third = (engine.new_sequence() for _ in range(3))
    engine.step([SequenceBatch(first, tokens(250), "none"), SequenceBatch(third, tokens(4), "none")])
    before = engine.export_sequence(first)
    with pytest.raises(OutOfMemory, match="fill the shared cache"):
        engine.step([SequenceBatch(second, tokens(560, 2)), SequenceBatch(third, tokens(1))])
    assert [engine.length(s) for s in (first, second, third)] == [250, 0, 4]
    assert engine.export_sequence(first) == before
    engine.free_sequence(first)
    (after, _) = engine.step([SequenceBatch(second, tokens(560, 2)), SequenceBatch(third, tokens(1))])  # and now there is room
    assert after is not None
    engine.close()


def test_a_fork_costs_no_cells(engine: Any) -> None:
    """120 cells forked three times are 120 cells: with copies, 480 would not fit 256."""
    source = engine.new_sequence()
    engine.step([SequenceBatch(source, tokens(120), "none")])
    forks = [engine.fork_sequence(source, 120) for _ in range(3)]
    results = engine.step([SequenceBatch(s, [7]) for s in (source, *forks)])
    for result in results[1:]:
        assert np.allclose(result, results[0], atol=1e-3)


class _Failing:
    """libllama, but llama_decode fails at the n-th call."""

    def __init__(self, lib: Any, at: int, code: int) -> None:
        self._lib, self._left, self._code = lib, at, code

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def llama_decode(self, context: Any, batch: Any) -> int:
        self._left -= 1
        return self._code if self._left == 0 else self._lib.llama_decode(context, batch)  # type: ignore[no-any-return]


def test_a_step_that_fails_half_way_is_undone(tiny: ModelFile) -> None:
    engine: Any = LlamaCpp().open(tiny, EngineOptions(context=640, threads=1))
    sequence, lib = engine.new_sequence(), engine._lib
    engine.step([SequenceBatch(sequence, tokens(10), "none")])
    before = engine.export_sequence(sequence)
    engine._call._lib = _Failing(lib, 2, -3)
    with pytest.raises(NativeError, match="failed with code -3"):
        engine.step([SequenceBatch(sequence, tokens(600, 2))])
    engine._call._lib = lib
    assert engine.length(sequence) == 10
    assert engine.export_sequence(sequence) == before
    engine.close()


def test_a_state_that_cannot_be_undone_is_dropped(tmp_path: Path) -> None:
    with ModelFile.open(write_mamba(tmp_path / "mamba.gguf")) as model:
        engine: Any = LlamaCpp().open(model, EngineOptions(context=640, threads=1))
        sequence, lib = engine.new_sequence(), engine._lib
        engine.step([SequenceBatch(sequence, tokens(10), "none")])
        engine._call._lib = _Failing(lib, 2, -3)
        with pytest.raises(NativeError, match="lost"):
            engine.step([SequenceBatch(sequence, tokens(600, 2))])
        engine._call._lib = lib
        assert engine.length(sequence) == 0
        engine.step([SequenceBatch(sequence, tokens(10), "none")])
        engine.close()


def test_models_that_cannot_go_back_say_so(tmp_path: Path) -> None:
    with ModelFile.open(write_mamba(tmp_path / "mamba.gguf")) as model:
        engine = LlamaCpp().open(model, EngineOptions(context=CONTEXT, threads=1))
        sequence = engine.new_sequence()
        engine.step([SequenceBatch(sequence, tokens(10), "none")])
        for cut in (engine.truncate, engine.fork_sequence):
            with pytest.raises(ContextError, match="mamba models cannot go back to token 4 of 10; start the session anew"):
                cut(sequence, 4)
        assert engine.length(sequence) == 10
        engine.close()


@pytest.mark.parametrize("length", [-1, 11])
def test_cutting_beyond_what_is_there_is_a_mistake(engine: Any, length: int) -> None:
    sequence = engine.new_sequence()
    engine.step([SequenceBatch(sequence, tokens(10), "none")])
    for cut in (engine.truncate, engine.fork_sequence):
        with pytest.raises(ValueError, match="has 10 cells"):
            cut(sequence, length)


def test_a_sequence_occurs_once_in_a_step(engine: Any) -> None:
    sequence = engine.new_sequence()
    with pytest.raises(OptionError, match="same sequence twice"):
        engine.step([SequenceBatch(sequence, [1]), SequenceBatch(sequence, [2])])
    assert engine.step([SequenceBatch(sequence, [])]) == [None]
    assert engine.length(sequence) == 0


# ---- saved sequences -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(engine: Any) -> bytes:
    sequence = engine.new_sequence()
    engine.step([SequenceBatch(sequence, tokens(20), "none")])
    data: bytes = engine.export_sequence(sequence)
    engine.free_sequence(sequence)
    return data


def test_no_byte_of_a_saved_sequence_may_change(engine: Any, saved: bytes) -> None:
    positions = [*range(80), *(int(i) for i in np.random.default_rng(0).integers(80, len(saved), 200)), len(saved) - 1]
    for position in positions:
        changed = bytearray(saved)
        changed[position] ^= 0x10
        with pytest.raises(SessionFileError):
            engine.import_sequence(bytes(changed))
    engine.free_sequence(engine.import_sequence(saved))


def test_a_saved_sequence_belongs_to_its_model_and_key_type(random_model: Callable[..., Path]) -> None:
    def opened(key_type: Any = "f16", **measures: Any) -> Any:
        model = ModelFile.open(random_model("llama", n_embd=128, **measures))
        return model, LlamaCpp().open(model, EngineOptions(context=CONTEXT, threads=1, key_type=key_type))

    (one_file, one), (same_file, same), (other_file, other), (keys_file, keys) = opened(), opened(), opened(seed=5), opened("q8_0")
    sequence = one.new_sequence()
    one.step([SequenceBatch(sequence, tokens(8), "none")])
    data = one.export_sequence(sequence)
    assert same.length(same.import_sequence(data)) == 8
    for stranger in (other, keys):
        with pytest.raises(SessionFileError, match="another model, key type or version"):
            stranger.import_sequence(data)
    for item in (one, same, other, keys, one_file, same_file, other_file, keys_file):
        item.close()


def test_a_saved_sequence_must_fit(tiny: ModelFile, engine: Any) -> None:
    sequence = engine.new_sequence()
    engine.step([SequenceBatch(sequence, tokens(100), "none")])
    data = engine.export_sequence(sequence)
    small = LlamaCpp().open(tiny, EngineOptions(context=64, threads=1))
    with pytest.raises(SessionFileError, match="has 100 tokens, more than the context of 64; raise --ctx"):
        small.import_sequence(data)
    small.close()
    engine.import_sequence(data)
    with pytest.raises(OutOfMemory, match="no room for 100 more"):
        engine.import_sequence(data)
    assert len(engine._slots) == 2, "the refused sequence is not kept"


# ---- logging ---------------------------------------------------------------------------------------------------------


def test_libllamas_log_goes_to_logging(tiny: ModelFile, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("edge_rt.native")
    with caplog.at_level(logging.INFO, "edge_rt.native"):
        LlamaCpp().open(tiny, EngineOptions(context=CONTEXT, threads=1)).close()
    assert any("KV buffer size" in record.getMessage() for record in caplog.records)
    level, filters = logger.level, list(logger.filters)
    caplog.clear()
    LlamaCpp().open(tiny, EngineOptions(context=CONTEXT, threads=1)).close()
    assert not [record for record in caplog.records if record.levelno < logging.WARNING]
    assert (logger.level, logger.filters) == (level, filters)


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_a_step_with_several_adapters_is_as_many_calls(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """Beyond 512 tokens too; afterwards the context is as if there had never been one."""
    from edge_rt.core.gguf.lora import open_lora
    from edge_rt.testing.random_models import write_random_adapter

    with ModelFile.open(random_model("gemma", context=2048)) as model:
        loras = [open_lora(write_random_adapter(tmp_path / f"{seed}.gguf", model.header, seed=seed), model.header) for seed in (1, 2)]
        opened = LlamaCpp().open(model, EngineOptions(context=4096, threads=1))
        a, b = (opened.open_adapter(lora) for lora in loras)
        bindings, lengths = [(a, 1.0), (None, 1.0), (b, 1.0), (a, 1.0)], (600, 30, 20, 10)
        texts = [tokens(n, seed=n) for n in lengths]

        def bound() -> list[int]:
            found = [opened.new_sequence() for _ in bindings]
            for sequence, binding in zip(found, bindings, strict=True):
                opened.adapt(sequence, *binding)
            return found

        alone = [np.array(opened.step([SequenceBatch(s, text, "last")])[0]) for s, text in zip(bound(), texts, strict=True)]
        together = opened.step([SequenceBatch(s, text, "last") for s, text in zip(bound(), texts, strict=True)])
        for one, other in zip(alone, together, strict=True):
            assert np.abs(np.asarray(other) - one).mean() / np.abs(one).mean() < 2e-2
        plain = np.array(opened.step([SequenceBatch(opened.new_sequence(), texts[0], "last")])[0])
        assert np.abs(plain - alone[0]).mean() > 0.1
        opened.close()
        for lora in loras:
            lora.file.close()
