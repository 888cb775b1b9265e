"""What the torch engine holds and says that it will hold, and how it keeps to a budget of a device's memory."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import edge_rt_mlu
import numpy as np
import pytest
from edge_rt_mlu import simulated
from edge_rt_mlu.placement import SIZES, place, weight_bytes

import edge_rt
from edge_rt.core.gguf.lora import open_lora
from edge_rt.hooks import EngineOptions, ModelFile, NativeError, OptionError, OutOfMemory, Refusal, SequenceBatch
from edge_rt.testing.engine_helpers import feed, feed_new, tokens_of
from edge_rt.testing.random_models import LINEAR, write_random_adapter

torch = pytest.importorskip("torch", reason="the engine's logic is tested on CPU PyTorch, which is not installed here")

from edge_rt_mlu import adapters, sequences  # noqa: E402
from edge_rt_mlu.engine import TorchEngine  # noqa: E402
from edge_rt_mlu.factory import TorchFactory  # noqa: E402

Make = Callable[..., Path]


class Peak(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
    """The most bytes that results of PyTorch's operations hold at a time, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


MEASURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"n_expert": 6, "n_expert_used": 3},
    "many small experts": {"n_expert": 128, "n_expert_used": 16, "n_ff": 32},
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", [*MEASURES, "adapted"])
def test_no_step_holds_more_than_was_predicted(make: Make, tmp_path: Path, dtype: str, kind: str) -> None:
    measures = {"n_embd": 128, "n_head": 8, "n_head_kv": 2, "n_ff": 512, "context": 2048, "n_layer": 3, **MEASURES.get(kind, {})}
    path = make(tied=kind != "adapted", **measures)
    options = EngineOptions(threads=1, extra={"torch.dtype": dtype})
    with ModelFile.open(path) as file, closing(TorchFactory().open(file, options)) as engine, ExitStack() as stack:
        assert isinstance(engine, TorchEngine)
        sequence = engine.new_sequence()
        if kind == "adapted":
            adapter = write_random_adapter(tmp_path / "a.gguf", file.header, rank=64, target=LINEAR + r"|(output|token_embd)\.weight")
            lora = open_lora(adapter, file.header)
            stack.callback(lora.file.close)
            engine.adapt(sequence, engine.open_adapter(lora))
        before = engine.needed_bytes(sequence, 1500), engine.compute_bytes(1500, 1, 600)
        for tokens, want in ((900, "none"), (600, "all")):
            with Peak() as peak:
                engine.step([SequenceBatch(sequence, tokens_of(engine, tokens), want)])  # type: ignore[arg-type]
            assert 0 < peak.most <= sum(before)
        assert engine.sequence_bytes(sequence) <= engine.needed_bytes(sequence, 1500)
        assert engine.held_bytes() == (engine.sequence_bytes(sequence), 600 * engine.info.n_vocab * 4)
        assert engine.memory().weights_mapped > 0


def test_as_many_queries_are_watched_as_was_predicted() -> None:
    from edge_rt.core.kv.pruning import WATCHED

    assert sequences.WATCHED == WATCHED


@pytest.mark.parametrize("measures", [{}, {"tied": False, "bias": True}, {"architecture": "qwen3moe"}])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_predicted_weights_are_what_is_held(make: Make, measures: dict[str, Any], dtype: str) -> None:
    from edge_rt_mlu.placement import place

    options = EngineOptions(context=64, extra={"torch.dtype": dtype})
    with ModelFile.open(make(**measures)) as file, closing(TorchFactory().open(file, options)) as engine:
        assert engine.memory().weights_mapped == place(file, SIZES[dtype], None).nbytes


def test_removing_cells_gives_memory_back(engine: TorchEngine) -> None:
    sequence = engine.new_sequence()
    feed(engine, sequence, tokens_of(engine, 700), want="last")
    held = engine.memory().cache
    given = engine.remove_cells(sequence, [(10, 600)])
    assert given == held - engine.memory().cache > 0
    assert engine.length(sequence) == 110


# ---- a budget --------------------------------------------------------------------------------------------------------


@pytest.fixture
def deep(make: Make) -> Path:
    """A model of six blocks with a head of its own."""
    return make(n_layer=6, n_embd=128, n_ff=256, tied=False, context=640)


@pytest.fixture
def mlu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two simulated cards, which are not tried in a process of its own: importing PyTorch takes seconds."""
    simulated.install(monkeypatch, tmp_path, "torch_mlu", "mlu")
    monkeypatch.setattr(adapters, "tried", lambda adapter, timeout: 2)


def test_the_first_blocks_stay_and_one_of_the_others_has_room(deep: Path) -> None:
    with ModelFile.open(deep) as file:
        blocks, rest = weight_bytes(file, 2)
        whole, one = rest + sum(blocks), blocks[0]
        assert place(file, 2, None) == place(file, 2, whole) == (6, whole, 0)
        assert place(file, 2, whole - 1) == (4, whole - one, 2 * one)
        assert place(file, 2, rest + one) == (0, rest + one, 6 * one)
        least = -(-(rest + one) // 1_000_000)
        with pytest.raises(OptionError, match=f"--memory is less than the {least} MB that embedding, head and the largest block take"):
            place(file, 2, rest + one - 1)
        assert place(file, 2, whole, whole=True).blocks == 6
        with pytest.raises(OptionError, match="more than --memory allows; raise it, or choose --engine ggml"):
            place(file, 2, whole - 1, whole=True)


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe"])
@pytest.mark.parametrize("blocks", [4, 1, 0])
def test_a_budget_changes_no_bit(make: Make, mlu: None, architecture: str, blocks: int) -> None:
    path = make(architecture, n_layer=6, context=640)
    options = EngineOptions(threads=1, device="mlu:0", context=256)
    with ModelFile.open(path) as file, closing(TorchFactory().open(file, options)) as whole:
        each, rest = weight_bytes(file, 2)
        budget = rest + (blocks + 1) * each[0]
        with closing(TorchFactory().open(file, options._replace(memory=budget))) as engine:
            assert engine.info.offloaded == ("embedding", *(f"blk.{n}" for n in range(blocks)), "norm", "head")
            report = engine.memory()
            assert report.device == budget
            assert report.weights_mapped == report.weights_resident == (6 - blocks) * each[0]
            tokens = tokens_of(engine, 60)
            a, b = whole.new_sequence(), engine.new_sequence()
            for part in (tokens[:40], tokens[40:41], tokens[41:]):
                assert np.array_equal(feed(engine, b, part), feed(whole, a, part))
            assert engine.memory().device == budget + engine.memory().cache


def test_no_more_than_one_block_is_copied_over_at_a_time(deep: Path, mlu: None) -> None:
    with ModelFile.open(deep) as file:
        each, rest = weight_bytes(file, 2)
        most = []
        for memory in (None, rest + each[0]):
            with closing(TorchFactory().open(file, EngineOptions(threads=1, device="mlu:0", context=64, memory=memory))) as engine:
                feed_new(engine, tokens_of(engine, 4))
                sequence = engine.new_sequence()
                with Peak() as peak:
                    engine.step([SequenceBatch(sequence, tokens_of(engine, 4))])
                most.append(peak.most)
        assert each[0] <= most[1] - most[0] < 1.5 * each[0]


def test_an_adapter_changes_blocks_that_are_copied_over_too(deep: Path, mlu: None, tmp_path: Path) -> None:
    options = EngineOptions(threads=1, device="mlu:0", context=128)
    with ModelFile.open(deep) as file, ExitStack() as stack:
        lora = open_lora(write_random_adapter(tmp_path / "a.gguf", file.header), file.header)
        stack.callback(lora.file.close)
        each, rest = weight_bytes(file, 2)
        found = []
        for memory in (None, rest + 2 * each[0]):
            engine = stack.enter_context(closing(TorchFactory().open(file, options._replace(memory=memory))))
            assert isinstance(engine, TorchEngine)
            before, sequence = engine.memory().device, engine.new_sequence()
            engine.adapt(sequence, engine.open_adapter(lora), 0.5)
            assert engine.memory().device > before
            found.append(feed(engine, sequence, tokens_of(engine, 20)))
        assert np.array_equal(*found)


def test_a_budget_that_is_too_small_is_one_sentence(deep: Path, mlu: None) -> None:
    with ModelFile.open(deep) as file:
        options = EngineOptions(device="mlu:0", memory=10_000)
        answer = TorchFactory().supports(file, options)
        assert isinstance(answer, Refusal)
        assert answer.reason.startswith("--memory is less than the 1 MB that")
        assert answer.remedy == "raise it"
        with pytest.raises(OptionError, match="--memory is less than"):
            TorchFactory().open(file, options)


def test_on_the_cpu_the_weights_must_fit_the_budget(tiny: Path) -> None:
    with ModelFile.open(tiny) as file:
        needed = place(file, 4, None).nbytes
    registry = edge_rt.plugin_host.registry.Registry.load(plugins={"mlu": edge_rt_mlu})
    edge_rt.open(tiny, engine="torch", memory=needed, registry=registry).close()
    with pytest.raises(edge_rt.errors.UnsupportedModel, match="more than --memory allows; raise it, or choose --engine ggml"):
        edge_rt.open(tiny, engine="torch", memory=needed - 1, registry=registry)


def held() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    return sum(found.nbytes for found in gc.get_objects() if issubclass(type(found), torch.Tensor))


def test_an_opening_that_fails_gives_everything_back(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while its error is looked at, whose frames hold tensors: another engine may be opened on the device because of it."""
    calls, before = simulated.install(monkeypatch, tmp_path, "torch_mlu", "mlu"), held()
    most: list[int] = []

    def stop(phase: str, done: int, total: int) -> None:
        if done == total:
            most.append(held() - before)
            raise KeyboardInterrupt

    with ModelFile.open(deep) as file:
        with pytest.raises(KeyboardInterrupt) as raised:
            TorchFactory().open(file, EngineOptions(device="mlu:0", context=64, progress=stop))
        assert raised.value.__traceback__ is not None
        assert held() - before < most[-1] // 100
        assert calls == ["empty_cache"]


def test_a_step_that_fails_gives_everything_back(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = simulated.install(monkeypatch, tmp_path, "torch_mlu", "mlu")
    with ModelFile.open(deep) as file, closing(TorchFactory().open(file, EngineOptions(device="mlu:0", context=512))) as engine:
        assert isinstance(engine, TorchEngine)
        sequence, tokens = engine.new_sequence(), tokens_of(engine, 200)
        engine.step([SequenceBatch(sequence, tokens, more=200)])
        before = held()

        def fail() -> None:
            raise RuntimeError("MLU out of memory")

        engine.tell(fail)
        with pytest.raises(OutOfMemory) as raised:
            engine.step([SequenceBatch(sequence, tokens)])
        assert raised.value.__cause__ is not None
        assert held() <= before
        assert calls[-1] == "empty_cache"


def test_a_package_that_fails_beside_others_is_told(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated.install(monkeypatch, tmp_path, "torch_mlu", "mlu")
    monkeypatch.setitem(sys.modules, "torch_mlu", None)  # what Python takes for "cannot be imported"
    monkeypatch.setattr("edge_rt_mlu.adapters.missing", lambda adapter: None)
    with ModelFile.open(deep) as file, pytest.raises(NativeError, match="torch_mlu cannot be imported beside what is loaded here"):
        TorchFactory().open(file, EngineOptions(device="mlu:0", context=64))


def test_a_full_card_is_told_with_the_way_out(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated.install(monkeypatch, tmp_path, "torch_mlu", "mlu", free=1_000_000)
    with ModelFile.open(deep) as file:
        options = EngineOptions(device="mlu:0", context=64)
        with pytest.raises(OutOfMemory, match=r"take 1 MiB as float16 and 0 MiB are free on mlu:0; give a --memory below that"):
            TorchFactory().open(file, options)
        with closing(TorchFactory().open(file, options._replace(memory=900_000))) as engine:
            assert engine.memory().device <= 900_000


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_rt_mlu import engine

    monkeypatch.setattr(engine, "_free_bytes", lambda adapter, device: 1 << 16)
    read: list[int] = []
    with ModelFile.open(tiny) as file, pytest.raises(OutOfMemory, match=r"weights take \d+ MiB as float32 and 0 MiB are free on cpu"):
        TorchFactory().open(file, EngineOptions(progress=lambda phase, done, total: read.append(done)))
    assert read == []
