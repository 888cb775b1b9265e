"""Streaming through slots: whatever is acquired shows its file's bytes, within the budget, and failures reach who waits."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import threading
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
from edge_rt.core.weights import streaming
from edge_rt.core.weights.streaming import WeightStreamer, divide
from edge_rt.core.weights.units import Span, Unit
from edge_rt.errors import Cancelled, ModelFileError, OptionError, OutOfMemory
from edge_rt.hooks import EngineOptions
from edge_rt.native import memory

PAGE = memory.PAGE
MB = 1 << 20


class Store:
    """A mapped file of random bytes, divided into units of one to three spans with gaps between them."""

    def __init__(self, path: Path, sizes: list[list[int]], gap: int = 0) -> None:
        total = sum(size + gap for spans in sizes for size in spans)
        self.data = random.Random(total).randbytes(-(-total // PAGE) * PAGE)
        path.write_bytes(self.data)
        self.fd = os.open(path, os.O_RDONLY)
        os.fsync(self.fd)
        self.address = memory.map_file(self.fd, len(self.data))
        self.units, offset = [], 0
        for i, spans in enumerate(sizes):
            parts = []
            for size in spans:
                parts.append(Span(self.address + offset, size, self.fd, offset))
                offset += size + gap
            self.units.append(Unit(f"u{i}", tuple(parts)))

    @property
    def size(self) -> int:
        return sum(unit.size for unit in self.units)

    def shows(self, unit: Unit) -> bool:
        """Whether a unit's addresses show its bytes of the file."""
        return all(ctypes.string_at(s.address, s.size) == self.data[s.offset : s.offset + s.size] for s in unit.spans)

    def close(self) -> None:
        memory.unmap(self.address, len(self.data))
        os.close(self.fd)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "w", [[40 * PAGE]] * 7)) as found:
        yield found


def settle(condition: Callable[[], bool]) -> bool:
    """Wait up to five seconds for a thread to bring something about."""
    end = time.monotonic() + 5
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


@contextmanager
def paged(store: Store, budget: int) -> Iterator[WeightStreamer]:
    with closing(WeightStreamer(store.units, budget)) as pager:
        assert pager.streams
        yield pager


def least_budget(units: list[Unit]) -> int:
    """The smallest budget that ``divide`` takes."""
    low, high = 0, sum(unit.size for unit in units)
    while low < high:
        middle = (low + high) // 2
        try:
            divide(units, middle)
            high = middle
        except OptionError:
            low = middle + 1
    return low


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_what_is_acquired_shows_its_bytes(seed: int, direct: bool, moves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any units, budget and number of slots; in forward order, with units skipped, repeated or out of order."""
    chance = random.Random(seed)
    monkeypatch.setattr(streaming, "SLOTS", chance.choice([2, 2, 3]))
    if not direct:
        monkeypatch.setattr(streaming, "_open_direct", lambda fd: None)
    if not moves:
        monkeypatch.setattr(memory, "can_move", lambda: False)
    sizes = [[chance.randint(1, 60 * PAGE) for _ in range(chance.randint(1, 3))] for _ in range(chance.randint(5, 12))]
    with closing(Store(tmp_path / "w", sizes, chance.choice([0, 100, 3 * PAGE]))) as store:
        budget = chance.randint(least := least_budget(store.units), (least + store.size) // 2)
        edges = 2 * PAGE * sum(len(unit.spans) for unit in store.units)  # pages that spans share with their neighbours
        with closing(WeightStreamer(store.units, budget)) as pager:
            for _ in range(4):
                for unit in store.units:
                    used = chance.choice(store.units) if chance.random() < 0.1 else unit
                    if chance.random() < 0.1:
                        continue
                    pager.acquire(used.name)
                    assert store.shows(used)
                    # Units are looked at one after another, and slots move meanwhile: the sum holds as soon as they rest.
                    assert settle(lambda: sum(u.resident() or 0 for u in store.units) <= budget + edges)
                    assert used.resident() == used.size
                    assert store.shows(used), "read ahead over what was in use"
                    pager.done(used.name)
        assert all(map(store.shows, store.units)), "closing gives the file's own pages back"


def test_a_round_reads_what_is_streamed_once(store: Store) -> None:
    """An odd number of units in two slots: reading ahead over the end of a round must neither stop nor read twice."""
    with paged(store, store.size // 2) as pager:
        for _ in range(10):
            for unit in store.units:
                pager.acquire(unit.name)
                pager.done(unit.name)
        kept = sum(span.size for share in pager.shares for span in share.kept)
        assert pager.read <= kept + 10 * pager.streamed_bytes + 2 * 40 * PAGE


def test_units_that_overlap_are_not_streamed(tmp_path: Path) -> None:
    """A small tensor of one unit in a gap of another must not be covered by the other's slot."""
    with closing(Store(tmp_path / "w", [[40 * PAGE]] * 7)) as store:
        inside = Unit("inside", (store.units[3].spans[0]._replace(address=store.units[3].spans[0].address + 30 * PAGE, size=64),))
        shares = {share.unit.name: share for share in divide([*store.units, inside], store.size * 3 // 4)}
        assert not shares["u3"].streamed
        assert not shares["inside"].streamed
        assert shares["u2"].streamed
        assert shares["u4"].streamed


def test_a_file_system_without_direct_reads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = os.open

    def refuses(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads here")
        return opening(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuses)
    with closing(streaming.Source(store.fd)) as source:
        assert not source.direct
        target = bytearray(3 * PAGE)
        source.read(memoryview(target), PAGE)
        assert target == store.data[PAGE : 4 * PAGE]


def test_a_file_that_ends_early(store: Store) -> None:
    with closing(streaming.Source(store.fd)) as source, pytest.raises(OSError, match="ends early"):
        source.read(memoryview(bytearray(2 * PAGE)), len(store.data))


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    """Let reads at some file offsets fail."""
    read = streaming.Source.read

    def injected(self: streaming.Source, target: memoryview, offset: int) -> None:
        if fails(offset):
            raise OSError(errno.EIO, "Input/output error")
        read(self, target, offset)

    monkeypatch.setattr(streaming.Source, "read", injected)


def test_a_read_error_reaches_who_waits_and_the_next_call_tries_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, bad = threading.Event(), store.units[2].spans[0]
    failing(monkeypatch, lambda offset: broken.is_set() and bad.offset <= offset < bad.offset + bad.size)
    broken.set()
    with paged(store, store.size // 2) as pager:
        for unit in store.units[:2]:
            pager.acquire(unit.name)
            pager.done(unit.name)
        for _ in range(2):
            with pytest.raises(ModelFileError, match=r"cannot be read: Input/output error; check"):
                pager.acquire("u2")
        broken.clear()
        for unit in store.units[2:]:
            pager.acquire(unit.name)
            assert store.shows(unit)
            pager.done(unit.name)


def test_any_other_failure_reaches_who_waits_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: streaming.StreamBuffers, spans: Any, slot: int) -> int:
        raise OutOfMemory("cannot get 1 MB of memory")

    monkeypatch.setattr(streaming.StreamBuffers, "fill", no_memory)
    with paged(store, store.size // 2) as pager, pytest.raises(OutOfMemory):
        pager.acquire("u0")


def test_close_in_the_middle_ends_the_wait(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go = threading.Event(), threading.Event()
    last = store.units[-1].spans[0]

    def slow(offset: int) -> bool:
        if offset >= last.offset:
            asked.set()
            assert go.wait(10)
        return False

    failing(monkeypatch, slow)
    pager, raised = WeightStreamer(store.units, store.size // 2), []

    def wait() -> None:
        try:
            pager.acquire("u6")
        except Cancelled as error:
            raised.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert asked.wait(10)
    closing_ = threading.Thread(target=pager.close)
    closing_.start()
    waiting.join(10)
    assert len(raised) == 1
    go.set()
    closing_.join(10)
    assert not closing_.is_alive()
    assert all(map(store.shows, store.units))


def test_cool_gives_the_slots_back_and_reads_nothing_until_it_is_warm(store: Store) -> None:
    with paged(store, store.size // 2) as pager:
        pager.acquire("u0")
        pager.done("u0")
        pager.cool()
        read = pager.read
        for span in (span for share in pager.shares for span in share.streamed):
            assert memory.resident_bytes(span.address, span.size) == 0
        assert pager.read == read
        pager.acquire("u1")
        assert pager.read > read
        assert store.shows(store.units[1])


# ---- models ----------------------------------------------------------------------------------------------------------


def _model(path: Path, **options: Any) -> Path:
    from edge_rt.testing.random_models import write_random_model

    write_random_model(path, "llama", **{"n_layer": 7, "n_embd": 256, "n_ff": 1024, "n_head": 4, **options})
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path


@contextmanager
def opened(path: Path, budget: int | None) -> Iterator[GgmlEngine]:
    options = EngineOptions(threads=1, context=128, memory=budget)
    with ModelFile.open(path) as file, closing(GgmlEngine(file, options)) as engine:
        yield engine


def _talk(engine: GgmlEngine) -> list[Any]:
    """Logits of a prompt, of decoding, of several rows, of a step after one without logits, and after cooling down."""
    found = []

    def step(sequence: int, tokens: list[int], logits: Any = "last") -> None:
        (rows,) = engine.step([SequenceBatch(sequence, tokens, logits)])
        if rows is not None:
            found.append(np.array(rows))

    sequence = engine.new_sequence()
    step(sequence, list(range(1, 30)))
    for token in (3, 1, 4):
        step(sequence, [token])
    step(sequence, [1, 5, 9], "all")
    step(sequence, [2, 6], "none")
    step(sequence, [5])
    engine.cool()
    step(sequence, [3])
    engine.warm()
    step(sequence, [5])
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("type_", ["F16", "Q4_0"])
def test_the_same_bits_with_and_without_a_budget(tmp_path: Path, type_: str, tied: bool) -> None:
    path = _model(tmp_path / "m.gguf", type=type_, tied=tied)
    with opened(path, None) as free:
        dense = sum(unit.size for unit in free.units() if not unit.sparse)
        expected, rows = _talk(free), free.exact_rows()
    with opened(path, dense * 6 // 10) as engine:
        assert engine.pager is not None
        assert engine.pager.streams
        for ours, theirs in zip(_talk(engine), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert engine.exact_rows() == rows
        sparse = sum(unit.size for unit in engine.units() if unit.sparse)
        assert settle(lambda: 0 < (engine.memory().weights_resident or 0) <= dense * 6 // 10 + sparse + 64 * PAGE)


def test_weights_are_told_apart_from_what_else_uses_their_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at kernels, and at the file for its key, happens outside of steps."""
    from edge_rt.core import autotune

    path = _model(tmp_path / "m.gguf", type="F16", tied=True)
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path / "cache"))  # nothing is remembered
    seen: list[bytes] = []

    def look(matrix: int, backend: Any, most: int) -> int:
        fields = autotune.ggml.fields(matrix)
        seen.append(ctypes.string_at(fields.data, 2 * fields.ne[0] * fields.ne[1]))
        return most

    monkeypatch.setattr(autotune, "_exact_columns", look)
    with ModelFile.open(path) as file, closing(GgmlEngine(file, EngineOptions(threads=1, context=128, memory=5 * MB))) as engine:
        key = file.key()
        engine.step([SequenceBatch(engine.new_sequence(), [1, 2, 3])])
        engine.exact_rows()
        assert file.key() == key
    content = path.read_bytes()
    assert len(seen) >= 4
    assert all(matrix in content for matrix in seen)
