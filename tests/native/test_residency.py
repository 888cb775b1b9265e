"""What of the weights is in memory: lazily, read ahead, under a budget, cooled and warmed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_rt.core.engine import SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.weights.streaming import divide
from edge_rt.core.weights.units import DecayingCounter, Prefetcher, Span, Unit
from edge_rt.errors import OptionError
from edge_rt.hooks import EngineOptions

MB = 1 << 20


def on_disk(path: Path) -> Path:
    """Pages not yet written cannot leave memory."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path


def evict(path: Path) -> None:
    """Let the system take what nobody has mapped, as it does when memory is short."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def mapped_bytes() -> int:
    """Of files, in this process's page table."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 12 MB in eight blocks: large enough that pages and units are told apart."""
    from edge_rt.testing.random_models import write_random_model

    path = tmp_path_factory.mktemp("model") / "m.gguf"
    return on_disk(write_random_model(path, "llama", n_layer=8, n_embd=256, n_ff=1024, n_head=4, type="F16", tied=False))


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[GgmlEngine]:
    with ModelFile.open(path) as file, closing(GgmlEngine(file, EngineOptions(**{"threads": 1, "context": 128, **options}))) as engine:
        yield engine


def logits(engine: GgmlEngine, tokens: list[int]) -> Any:
    (found,) = engine.step([SequenceBatch(engine.new_sequence(), tokens, "all")])
    return np.array(found)


def settle(condition: Callable[[], bool]) -> bool:
    """Wait up to five seconds for a thread to bring something about."""
    end = time.monotonic() + 5
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_units_cover_every_tensor_once(model: Path) -> None:
    with opened(model) as engine, ModelFile.open(model) as file:
        names = [unit.name for unit in engine.units()]
        assert names == ["embedding", *(f"blk.{i}" for i in range(8)), "norm", "head"]
        total = sum(info.nbytes for info in file.header.tensors.values())
        assert total <= sum(unit.size for unit in engine.units()) <= total + 4096 * 64


def test_cooled_weights_are_free_to_take_and_are_there_while_nobody_does(model: Path) -> None:
    with opened(model) as engine:
        dense = sum(unit.size for unit in engine.units() if not unit.sparse)
        before = logits(engine, [1, 2, 3])
        assert settle(lambda: (engine.memory().weights_resident or 0) >= dense * 0.95)
        mapped = mapped_bytes()
        engine.cool()
        assert mapped - mapped_bytes() > dense * 0.9
        assert (engine.memory().weights_resident or 0) >= dense * 0.95
        np.testing.assert_array_equal(before, logits(engine, [1, 2, 3]))


def test_cooled_weights_that_the_system_took_come_back_with_the_same_result(model: Path) -> None:
    with opened(model) as engine:
        before = logits(engine, [1, 2, 3])
        engine.cool()
        evict(model)
        resident = engine.memory().weights_resident
        assert resident is not None
        assert resident < engine.weights.size // 4
        np.testing.assert_array_equal(before, logits(engine, [1, 2, 3]))
        engine.cool()
        evict(model)
        engine.warm()
        dense = sum(unit.size for unit in engine.units() if not unit.sparse)
        assert settle(lambda: (engine.memory().weights_resident or 0) >= dense * 0.95)


def test_the_embedding_is_not_read_ahead(model: Path) -> None:
    with ModelFile.open(model) as file:
        file.map.madvise(4)  # MADV_DONTNEED
    with opened(model) as engine:
        engine.cool()
        evict(model)
        engine.warm()
        embedding = engine.units()[0]
        assert embedding.sparse
        assert settle(lambda: all((u.resident() or 0) >= u.size * 0.9 for u in engine.units() if not u.sparse))
        assert (embedding.resident() or 0) < embedding.size


@pytest.mark.parametrize("fraction", [0.35, 0.5, 0.8])
def test_a_budget_gives_the_same_bits_and_is_kept(model: Path, fraction: float) -> None:
    with opened(model) as free:
        expected = logits(free, [1, 2, 3])
        dense = sum(unit.size for unit in free.units() if not unit.sparse)
        free.cool()
    evict(model)
    budget = int(dense * fraction)
    with opened(model, memory=budget) as engine:
        pager = engine.pager
        assert pager is not None
        assert pager.streams
        for _ in range(3):
            np.testing.assert_array_equal(expected, logits(engine, [1, 2, 3]))
        resident = sum((u.resident() or 0) for u in engine.units() if not u.sparse)
        assert resident <= budget + 64 * 4096
        kept = sum(span.size for share in pager.shares for span in share.kept)
        assert kept >= budget - 3 * max(u.size for u in engine.units())


def test_decoding_under_a_budget_streams_what_is_not_kept(model: Path) -> None:
    with opened(model, memory=6 * MB) as engine:
        sequence = engine.new_sequence()
        engine.step([SequenceBatch(sequence, [1, 2, 3])])
        pager = engine.pager
        assert pager is not None
        before = pager.read
        for token in range(10):
            engine.step([SequenceBatch(sequence, [token])])
        assert pager.read - before >= 8 * pager.streamed_bytes


def test_a_step_that_streams_says_that_it_goes_on_unit_by_unit(model: Path) -> None:
    with opened(model, memory=6 * MB) as engine:
        moved: list[int] = []
        engine.tell(lambda: moved.append(1))
        engine.step([SequenceBatch(engine.new_sequence(), [1])])
        assert len(moved) >= 8  # blocks


def test_a_prompt_without_logits_then_another_step(model: Path) -> None:
    """The head is not used by every step: skipped units must not stop the pager."""
    with opened(model, memory=6 * MB) as engine, opened(model) as free:
        for e in (engine, free):
            e.step([SequenceBatch(e.new_sequence(), list(range(40)), "none")])
        np.testing.assert_array_equal(logits(engine, [5, 6]), logits(free, [5, 6]))


def test_a_budget_below_the_window_is_refused_with_the_least_that_works(model: Path) -> None:
    with pytest.raises(OptionError, match=r"at least \d+M"), opened(model, memory=MB):
        pass


def test_blocks_of_different_widths_are_streamed(tmp_path: Path) -> None:
    from edge_rt.testing.random_models import write_random_model

    path = write_random_model(tmp_path / "widths.gguf", "deci", n_layer=6, n_embd=256, n_ff=(256, 1024, 512, 256, 2048, 768), type="F16")
    on_disk(path)
    with opened(path) as free:
        expected = logits(free, list(range(20)))
        free.cool()
    evict(path)
    with opened(path, memory=8 * MB) as engine:
        assert engine.pager is not None
        np.testing.assert_array_equal(expected, logits(engine, list(range(20))))


def test_experts_stay_within_their_budget(tmp_path: Path) -> None:
    from edge_rt.testing.random_models import write_random_model

    path = write_random_model(
        tmp_path / "moe.gguf", "qwen3moe", n_layer=4, n_embd=256, head_dim=64, n_ff_exp=256, n_expert=16, n_expert_used=2, type="F16"
    )
    on_disk(path)
    with opened(path) as free:
        expected = logits(free, list(range(20)))
        sizes = {unit.name: unit.size for unit in free.units()}
        free.cool()
    evict(path)
    dense = sum(size for name, size in sizes.items() if name != "embedding" and not name.endswith(".experts"))
    with opened(path, memory=dense + 8 * MB) as engine:
        np.testing.assert_array_equal(expected, logits(engine, list(range(20))))
        sequence = engine.new_sequence()
        for token in range(30):
            engine.step([SequenceBatch(sequence, [token * 7 % 200])])
        experts = sum((u.resident() or 0) for u in engine.units() if u.name.endswith(".experts"))
        assert experts <= 8 * MB + 2 * 4 * 3 * 256 * 256 * 2


# ---- without a model -------------------------------------------------------------------------------------------------


def test_shares_fit_the_budget_for_any_budget() -> None:
    units = [Unit(f"u{i}", (Span((i + 1) << 20, size * 4096, -1, 0),)) for i, size in enumerate((50, 80, 80, 20, 3))]
    least = (2 * 50 + 30 + 30) * 4096  # the two largest beside slots of the third's size
    with pytest.raises(OptionError, match="at least 1M"):
        divide(units, least - 1)
    for budget in range(least, sum(u.size for u in units), 4096 * 7):
        shares = divide(units, budget)
        kept = sum(span.size for share in shares for span in share.kept)
        streamed = sorted(share.streamed_bytes for share in shares)
        assert kept + sum(streamed[-2:]) <= budget
        for share in shares:
            assert sum(s.size for s in share.kept) + share.streamed_bytes == share.unit.size
    assert not any(share.streamed for share in divide(units, sum(u.size for u in units)))


def test_heat_halves_with_every_half_life() -> None:
    heat = DecayingCounter(half_life=4)
    heat.touch("a", 8.0)
    for _ in range(4):
        heat.tick()
    assert heat.value("a") == pytest.approx(4.0)
    heat.touch("b")
    assert heat.coldest(["a", "b", "never"]) == ["never", "b", "a"]


def test_prefetch_stops_when_memory_is_short(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(model) as engine:
        engine.cool()
        evict(model)
        monkeypatch.setattr("edge_rt.core.weights.units.available_memory", lambda: 10 * MB)
        prefetcher = Prefetcher(engine.units())
        prefetcher.start()
        assert prefetcher.wait(5)
        assert prefetcher.done == 0
