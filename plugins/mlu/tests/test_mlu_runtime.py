"""The torch engine under edge-rt's runtime: sessions, batches, policies and errors, on CPU PyTorch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import edge_rt_mlu
import numpy as np
import pytest

import edge_rt
from edge_rt.hooks import (
    Compensation,
    EngineOptions,
    Health,
    Limits,
    ModelFile,
    ModelFileError,
    NativeError,
    OptionError,
    OutOfMemory,
    Refusal,
    SequenceBatch,
    SessionFileError,
    UnsupportedModel,
    hookimpl,
)
from edge_rt.plugin_host.registry import Registry
from edge_rt.testing.engine_helpers import feed, feed_new, tokens_of
from edge_rt.types import Delta, Done, Message, Pruning

torch = pytest.importorskip("torch", reason="the engine's logic is tested on CPU PyTorch, which is not installed here")

from edge_rt_mlu import adapters, families, sequences  # noqa: E402
from edge_rt_mlu.device import Mlu  # noqa: E402
from edge_rt_mlu.engine import CHUNK, TorchEngine  # noqa: E402
from edge_rt_mlu.factory import TorchFactory  # noqa: E402

Make = Callable[..., Path]


def opened(path: Path, **options: Any) -> edge_rt.Model:
    registry = Registry.load(plugins={"mlu": edge_rt_mlu})
    return edge_rt.open(path, engine="torch", device="cpu", registry=registry, **options)


# ---- the runtime -----------------------------------------------------------------------------------------------------


def test_it_runs_only_when_asked_for_by_name(tiny: Path) -> None:
    registry = Registry.load(plugins={"mlu": edge_rt_mlu})
    with edge_rt.open(tiny, registry=registry) as model:
        assert model.info.engine == "ggml"
    with opened(tiny) as model:
        assert (model.info.engine, model.info.device) == ("torch", "cpu")


def answer(session: Any, prompt: Any, **options: Any) -> tuple[str, Done]:
    """Text and final event of a greedy answer."""
    events = list(session.generate(prompt, **{"temperature": 0.0, "max_tokens": 12, **options}))
    assert isinstance(events[-1], Done)
    return "".join(event.text for event in events if isinstance(event, Delta)), events[-1]


def test_sessions_are_saved_and_go_on(tiny: Path, tmp_path: Path) -> None:
    with opened(tiny) as model:
        session = model.session()
        first, _ = answer(session, "once upon a time")
        session.save(tmp_path / "session")
        expected, done = answer(session, "once upon a time" + first + " and then")
        assert done.usage.reused_tokens > 0
        restored = model.restore(tmp_path / "session")
        again, done = answer(restored, "once upon a time" + first + " and then")
        assert again == expected
        assert done.usage.reused_tokens > 0
    with edge_rt.open(tiny) as model, pytest.raises(SessionFileError):
        model.restore(tmp_path / "session")  # another engine's cells


def test_requests_of_a_batch_are_answered_as_alone(tiny: Path) -> None:
    """Four at once, through the runtime's own batches; what rounding differs in was seen to decide no token here."""
    from edge_rt.core.generate.scheduler import Scheduler

    prompts = [f"{word} and some more words, number {i}" for i, word in enumerate(("one", "another", "a third", "the last"))]
    with opened(tiny, context=256) as model:
        alone = [answer(model.session(), prompt, max_tokens=20)[0] for prompt in prompts]
        batch, texts, errors = Scheduler(model.engine, model.lock), [""] * len(prompts), list[Any]()
        for i, prompt in enumerate(prompts):
            session = model.session()
            job, steps = session.begin(prompt, temperature=0.0, max_tokens=20)

            def deliver(event: Any, i: int = i) -> bool:
                texts[i] += event.text if isinstance(event, Delta) else ""
                return True

            def ended(error: Any, session: Any = session, job: Any = job) -> None:
                session.end(job)
                errors.append(error)

            batch.add(job, steps, deliver, ended, "normal")
        while batch.step():
            pass
        assert errors == [None] * len(prompts)
        assert texts == alone


def test_what_does_not_fit_the_context_leaves_it_and_cells_are_pruned(tiny: Path) -> None:
    said: list[Message] = [{"role": "system", "content": "Be brief."}]
    for i in range(8):
        said.append({"role": "user", "content": f"Question {i} about pumps and valves?"})
        said.append({"role": "assistant", "content": f"Answer {i}: it is open."})
    said.append({"role": "user", "content": "And now?"})
    with opened(tiny, context=192) as model:
        _, done = answer(model.session(), said)
        assert done.context.evicted_segments > 0
    with opened(tiny, context=1024) as model:
        _, done = answer(model.session(), said, prune=Pruning(96))
        assert done.context.pruned_cells > 0


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (EngineOptions(device="cuda:0"), "does not drive cuda:0"),
        (EngineOptions(device="mlu:x"), "does not drive mlu:x"),
        (EngineOptions(memory=1 << 10), "the weights take 1 MB as PyTorch computes with them, more than --memory allows"),
        (EngineOptions(limits=Limits(Health, power=5.0)), "holds no limits of power"),
        (EngineOptions(key_type="q8_0"), "cannot cache keys as q8_0"),
        (EngineOptions(compensation=Compensation(Mock(), {})), "applies no compensation"),
    ],
)
def test_options_that_it_refuses(tiny: Path, options: EngineOptions, reason: str) -> None:
    with ModelFile.open(tiny) as file:
        answer = TorchFactory().supports(file, options)
        assert isinstance(answer, Refusal)
        assert reason in answer.reason
        assert answer.remedy
        with pytest.raises(OptionError, match=reason):
            TorchFactory().open(file, options)


def test_models_that_it_refuses(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelFile.open(make("gemma")) as file:
        answer = TorchFactory().supports(file, EngineOptions())
        assert isinstance(answer, Refusal)
        assert "and not 'gemma'" in answer.reason
        with pytest.raises(UnsupportedModel, match="and not 'gemma'"):
            TorchFactory().open(file, EngineOptions())
    with ModelFile.open(make()) as file:
        monkeypatch.setattr(families, "TYPES", frozenset({"F16"}))
        answer = TorchFactory().supports(file, EngineOptions())
        assert isinstance(answer, Refusal)
        assert "cannot read the F32 weights" in answer.reason


def test_types_that_gguf_dequantises_are_those_it_reads() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for name in families.TYPES:
        kind = GGMLQuantizationType[name]
        elements, nbytes = GGML_QUANT_SIZES[kind]
        assert dequantize(np.zeros((3, 2 * nbytes), np.uint8), kind).shape == (3, 2 * elements)


def test_opening_tells_how_far_it_is_and_can_be_stopped(tiny: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with ModelFile.open(tiny) as file:
        TorchFactory().open(file, EngineOptions(progress=lambda *step: told.append(step))).close()
        assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
        assert told[-1][1] == told[-1][2] == sum(info.nbytes for info in file.header.tensors.values())

        def stop(phase: str, done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            TorchFactory().open(file, EngineOptions(progress=stop))


def test_files_that_are_damaged(make: Make, tmp_path: Path) -> None:
    from edge_rt.hooks import ModelChanged

    whole = make(context=512, seed=7)
    with ModelFile.open(whole) as file:
        header = file.header
        del header.tensors["blk.1.ffn_up.weight"]
        with pytest.raises(ModelFileError, match=r"lacks the tensor blk.1.ffn_up.weight"):
            TorchFactory().open(file, EngineOptions())
    with ModelFile.open(whole) as file:
        info = file.header.tensors["blk.0.attn_q.weight"]
        file.header.tensors["blk.0.attn_q.weight"] = info._replace(shape=(info.shape[0], info.shape[1] // 2))
        with pytest.raises(ModelFileError, match="has the shape"):
            TorchFactory().open(file, EngineOptions())
    for strange in ("blk.0.strange.weight", "blk.0.ffn_gate.0.weight", "blk.9.attn_q.weight", "blk.0.attn_q_norm.weight", "cls.weight"):
        with ModelFile.open(whole) as file:
            file.header.tensors[strange] = file.header.tensors["blk.0.attn_norm.weight"]
            with pytest.raises(UnsupportedModel, match=f"no use for the tensor {strange}"):
                TorchFactory().open(file, EngineOptions(progress=lambda *step: pytest.fail("it was read before it was refused")))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes())
    with ModelFile.open(cut) as file:
        with cut.open("r+b") as writer:
            writer.truncate(file.header.data_offset + 1000)
        with pytest.raises(ModelChanged):
            TorchFactory().open(file, EngineOptions())


def test_weights_beyond_half_precision_are_no_infinities(make: Make, tmp_path: Path) -> None:
    path = make(context=512, seed=8)
    with ModelFile.open(path) as file:
        at = file.header.tensors["blk.0.ffn_down.weight"].offset
    data = bytearray(path.read_bytes())
    data[at : at + 4] = np.float32(1e6).tobytes()
    large = tmp_path / "large.gguf"
    large.write_bytes(data)
    with ModelFile.open(large) as file:
        with pytest.raises(UnsupportedModel, match=r"ffn_down.* do not fit float16; .*bfloat16"):
            TorchFactory().open(file, EngineOptions(extra={"torch.dtype": "float16"}))
        TorchFactory().open(file, EngineOptions(extra={"torch.dtype": "bfloat16"})).close()
        for wrong in ("int4", 16, None):
            with pytest.raises(OptionError, match="choose from float16"):
                TorchFactory().open(file, EngineOptions(extra={"torch.dtype": wrong}))
        for wrong in ("long", 0, True, -1.0):
            with pytest.raises(OptionError, match="give a number of seconds"):
                TorchFactory().open(file, EngineOptions(extra={"torch.import_timeout": wrong}))


def test_a_package_that_does_not_work_is_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "missing", lambda adapter: None)
    with ModelFile.open(tiny) as file:
        assert TorchFactory().supports(file, EngineOptions(device="mlu:0")) == 10.0
        assert TorchFactory().supports(file, EngineOptions(device="ascend:0")) == 5.0
        monkeypatch.setattr(adapters, "tried", lambda adapter, timeout: Refusal("the driver is broken", "mend it"))
        with pytest.raises(NativeError, match="the driver is broken; mend it"):
            TorchFactory().open(file, EngineOptions(device="mlu:0"))
        monkeypatch.setattr(adapters, "tried", lambda adapter, timeout: 1)
        with pytest.raises(OptionError, match="sees 1 Cambricon devices and no mlu:1"):
            TorchFactory().open(file, EngineOptions(device="mlu:1"))


def test_a_card_is_chosen_before_the_cpu_and_runs_in_half_precision(tiny: Path, card: Mlu) -> None:
    """From the probe to the answer, as on a machine with a card; only the arithmetic is the CPU's."""

    class Plugin:
        EDGE_RT_API = 1
        edge_rt_engines = staticmethod(edge_rt_mlu.edge_rt_engines)

        @hookimpl
        def edge_rt_devices(self) -> list[Mlu]:
            return [card]

    registry = Registry.load(plugins={"mlu": Plugin()})
    with edge_rt.open(tiny, registry=registry) as model:
        assert (model.info.engine, model.info.device) == ("torch", "mlu:0")
        parameters = sum(math.prod(info.shape) for info in model.file.header.tensors.values())
        report = model.engine.memory()
        assert 2 * parameters <= report.device < 2.2 * parameters
        assert report.weights_mapped == report.weights_resident == 0, "nothing of the weights is in the host's memory"
        assert model.info.offloaded == ("embedding", "blk.0", "blk.1", "norm", "head")
        text, done = answer(model.session(), "once upon a time")
        assert done.usage.completion_tokens > 0
    assert sys.modules["torch_mlu"].calls[-1] == "empty_cache"
    with opened(tiny) as model:
        assert answer(model.session(), "once upon a time")[0] == text, "half precision decides no token of this text"


# ---- failures on the way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("MLU out of memory. Tried to allocate 2 GiB"), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), OutOfMemory),
        (MemoryError(), OutOfMemory),
        (RuntimeError("CNRT error: device lost\nmore"), NativeError),
        (RuntimeError(""), NativeError),
    ],
)
def test_what_pytorch_raises(raised: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected), sequences.errors("mlu:0"):
        raise raised


def test_a_step_that_fails_leaves_everything_as_it_was(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, more = tokens_of(engine, 30), tokens_of(engine, CHUNK + 50, seed=2)
    sequence, other = engine.new_sequence(), engine.new_sequence()
    engine.watch(sequence, 8)
    feed(engine, sequence, tokens)
    expected = feed_new(engine, tokens + more[:5])[-5:]
    passes: list[int] = []

    def fail_later() -> None:
        passes.append(1)
        if len(passes) > engine.info.n_layer + 2:  # in the second run, behind its first block
            raise RuntimeError("CNRT error")

    engine.tell(fail_later)
    with pytest.raises(NativeError):
        engine.step([SequenceBatch(sequence, more), SequenceBatch(other, tokens)])
    engine.tell(lambda: None)
    assert (engine.length(sequence), engine.length(other)) == (30, 0)
    assert np.abs(feed(engine, sequence, more[:5]) - expected).max() < 1e-2
    assert engine.prune(sequence, 20, first=2, last=2, queries=4).cells == 15


def test_activations_beyond_half_precision_are_an_error_and_no_noise(make: Make, tmp_path: Path) -> None:
    path = make(context=512, seed=9)
    with ModelFile.open(path) as file:
        info = file.header.tensors["blk.0.ffn_norm.weight"]
    data = bytearray(path.read_bytes())
    weights = np.frombuffer(data, np.float32, info.nbytes // 4, info.offset)
    data[info.offset : info.offset + info.nbytes] = (weights * np.float32(3000)).tobytes()
    loud = tmp_path / "loud.gguf"
    loud.write_bytes(data)
    with ModelFile.open(loud) as file:
        for dtype in ("float32", "bfloat16"):
            with closing(TorchFactory().open(file, EngineOptions(extra={"torch.dtype": dtype}))) as engine:
                assert np.isfinite(feed_new(engine, tokens_of(engine, 8))).all()
        with closing(TorchFactory().open(file, EngineOptions(extra={"torch.dtype": "float16"}))) as engine:
            sequence = engine.new_sequence()
            with pytest.raises(NativeError, match="activations do not fit float16"):
                feed(engine, sequence, tokens_of(engine, 8))
            assert engine.length(sequence) == 0


def test_a_saved_sequence_with_one_bit_flipped_is_refused(engine: TorchEngine) -> None:
    sequence = engine.new_sequence()
    feed(engine, sequence, tokens_of(engine, 10))
    data = bytearray(engine.export_sequence(sequence))
    for at in (45, len(data) // 2, len(data) - 1):
        data[at] ^= 1
        with pytest.raises(SessionFileError):
            engine.import_sequence(bytes(data))
        data[at] ^= 1
    engine.import_sequence(bytes(data))


def test_cells_of_another_type_are_refused(tiny: Path, engine: TorchEngine) -> None:
    sequence = engine.new_sequence()
    feed(engine, sequence, tokens_of(engine, 10))
    data = engine.export_sequence(sequence)
    with ModelFile.open(tiny) as file:
        for dtype, fits in (("float16", True), ("bfloat16", False)):
            with closing(TorchFactory().open(file, EngineOptions(extra={"torch.dtype": dtype}))) as other:
                if fits:
                    assert other.length(other.import_sequence(data)) == 10
                    continue
                with pytest.raises(SessionFileError, match="type"):
                    other.import_sequence(data)
