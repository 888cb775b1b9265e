"""What a request will take is never less than what it takes: the caches, their moves, and the steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_host import Host

from edge_rt.core import sequences
from edge_rt.core.engine import PredictsMemory, SequenceBatch
from edge_rt.core.ggml_engine import CHUNK, GgmlEngine
from edge_rt.core.gguf.lora import open_lora
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.graph import step
from edge_rt.core.kv import cache
from edge_rt.hooks import EngineOptions
from edge_rt.native import memory
from edge_rt.testing.random_models import LINEAR, write_random_adapter

CONTEXT = 1500
PARTS = 6


@pytest.fixture(scope="module", params=[True, False], ids=["transposed", "by cell"])
def engine(request: pytest.FixtureRequest, random_model: Callable[..., Path]) -> Iterator[GgmlEngine]:
    options = EngineOptions(threads=1, context=CONTEXT, extra={"ggml.transposed_values": request.param})
    with pytest.MonkeyPatch.context() as patch:
        for module in (step, sequences):
            patch.setattr(module, "GRAPH_BYTES", 1 << 20)  # so that graphs leave
        with ModelFile.open(random_model("llama")) as file, closing(GgmlEngine(file, options)) as opened:
            yield opened


@pytest.fixture(scope="module")
def adapters(engine: GgmlEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """Two that change other weights than each other, one of them all that there are."""
    folder, header = tmp_path_factory.mktemp("adapters"), engine._file.header
    targets = (LINEAR, r"blk\.\d+\.ffn_(up|gate)\.weight")
    files = [write_random_adapter(folder / f"{i}.gguf", header, rank=64, target=target) for i, target in enumerate(targets)]
    found = [open_lora(file, header) for file in files]
    yield [engine.open_adapter(one) for one in found]
    engine.close()
    for one in found:
        one.file.close()


def free_all(engine: GgmlEngine) -> None:
    for sequence in list(engine._sequences):
        engine.free_sequence(sequence)


def test_the_engines_that_predict(engine: GgmlEngine) -> None:
    assert isinstance(engine, PredictsMemory)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_random_batches_hold_no_more_than_was_said(engine: GgmlEngine, data: st.DataObject) -> None:
    hold_no_more(engine, data, [None])


def hold_no_more(engine: GgmlEngine, data: st.DataObject, adapters: Sequence[int | None]) -> None:
    rows = data.draw(st.sampled_from([PARTS, 60]))
    asked = data.draw(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=PARTS))
    said = {}
    for cells in asked:
        said[sequence := engine.new_sequence()] = (cells, engine.needed_bytes(None, cells))
        engine.adapt(sequence, data.draw(st.sampled_from(adapters)), 0.3)
    compute = engine.compute_bytes(max(asked), len(asked), rows)
    try:
        for _ in range(data.draw(st.integers(1, 6))):
            room, left, parts = CHUNK, rows, []
            for sequence, (cells, _) in said.items():
                most = min(room, cells - engine.length(sequence))
                if most > 0 and data.draw(st.booleans()):
                    n = data.draw(st.sampled_from([1, 2, 9, 100, most]).filter(lambda n: n <= most))  # noqa: B023
                    wanted = "all" if n <= left and n < 9 else "last" if left else "none"
                    left -= min(left, n if wanted == "all" else 1)
                    parts.append(SequenceBatch(sequence, [1] * n, wanted))  # type: ignore[arg-type]
                    room -= n
            if parts:
                engine.step(parts)
            for sequence, (_, bytes_said) in said.items():
                assert engine._sequences[sequence].nbytes <= engine.sequence_bytes(sequence) <= bytes_said
            assert engine.memory().compute <= compute
            assert engine.memory().cache <= sum(bytes_said for _, bytes_said in said.values())
    finally:
        free_all(engine)


@pytest.mark.parametrize("sizes", [[1] * CONTEXT, [100] * 15, [CONTEXT], [300, 1, 700, 499]])
def test_on_the_way_there_too(engine: GgmlEngine, monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    """Pages that are really in memory, whenever one layer has moved to a larger cache; and where pruning moves them to a smaller."""
    held: dict[int, int] = {}
    peaks = [0]

    def look() -> None:
        peaks.append(sum(memory.resident_bytes(base, size) or 0 for base, size in held.items()))

    class Watched:
        PAGE, inner_page_span = memory.PAGE, staticmethod(memory.inner_page_span)

        @staticmethod
        def take(size: int) -> int:
            base = memory.take(size)
            held[base] = size
            return base

        @staticmethod
        def give(base: int, size: int) -> None:
            del held[base]
            memory.give(base, size)

        @staticmethod
        def advise(*given: Any) -> bool:
            look()
            return memory.advise(*given)

    monkeypatch.setattr(cache, "memory", Watched)
    sequence = engine.new_sequence()
    try:
        said = engine.needed_bytes(sequence, CONTEXT)
        for n in sizes:
            engine.step([SequenceBatch(sequence, [1] * n, "none")])
        look()
        assert len(peaks) > 2 or sizes == [CONTEXT]  # which has room from the start
        assert max(peaks) <= said
        engine.truncate(sequence, CONTEXT - 20)
        said = engine.needed_bytes(sequence, CONTEXT, pruned=True)
        engine.watch(sequence, 64)
        engine.step([SequenceBatch(sequence, [1] * 20, "none")])
        peaks.clear()
        engine.prune(sequence, 200, first=4, last=8)
        look()
        assert max(peaks) + engine._sequences[sequence].beside <= said
        assert engine.sequence_bytes(sequence) < said / 2
    finally:
        free_all(engine)


def test_a_request_without_room_to_grow_needs_what_is_there(engine: GgmlEngine) -> None:
    sequence = engine.new_sequence()
    engine.step([SequenceBatch(sequence, [1] * 600, "none")])
    assert engine.needed_bytes(sequence, 100) == engine.needed_bytes(sequence, 700) == engine.sequence_bytes(sequence)
    assert engine.needed_bytes(sequence, 769) > engine.sequence_bytes(sequence)
    assert engine.needed_bytes(None, 10**9) == engine.needed_bytes(None, CONTEXT)
    free_all(engine)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_batches_through_adapters_hold_no_more_either(engine: GgmlEngine, adapters: list[int], data: st.DataObject) -> None:
    hold_no_more(engine, data, [None, *adapters])


def test_adapters_are_foreseen_as_soon_as_they_are_open(random_model: Callable[..., Path], tmp_path: Path) -> None:
    with ModelFile.open(random_model("llama")) as file:
        adapter = open_lora(write_random_adapter(tmp_path / "a.gguf", file.header), file.header)
        with adapter.file, closing(GgmlEngine(file, EngineOptions(threads=1, context=CONTEXT))) as engine:
            said = engine.compute_bytes(CONTEXT, PARTS, PARTS)
            engine.open_adapter(adapter)
            assert engine.compute_bytes(CONTEXT, PARTS, PARTS) > said


def test_requests_of_all_kinds_hold_no_more_than_they_were_promised(random_model: Callable[..., Path], tmp_path: Path) -> None:
    host, chance = Host(random_model("llama"), 1 << 30, tmp_path, context=CONTEXT, threads=1), random.Random(4)
    account, engine, step = host.budget, host.engine, host.engine.step
    checked = []

    def checked_step(parts: Any) -> Any:
        found = step(parts)
        for reservation in account.reservations:
            assert reservation.session.sequence is not None
            assert engine.sequence_bytes(reservation.session.sequence) <= reservation.bytes
            checked.append(reservation.need.pruned)
        assert engine.held_bytes()[1] <= account.parts()["compute"]
        return found

    engine.step = checked_step
    for name in "xyz":
        host.do("open_session", session=name, owner="o")
    running: list[int] = []
    for turn in range(40):
        busy = {one.name for one in host.worker.requests._active.values()}
        name = chance.choice([None, *(set("xyz") - busy)])
        options = chance.choice(
            [{}, {}, {"speculate": 4}, {"context": 300}, {"prune": {"budget": 100}}, {"prune": {"budget": 0.3, "unit": "share"}}]
        )
        prompt = " ".join(chance.choice("abcdefgh") * chance.randint(1, 6) for _ in range(chance.randint(1, 250)))
        running.append(host.ask(prompt, name, max_tokens=chance.choice([1, 10, 40]), **options))
        if turn % 4 == 3:
            answers = host.until(*running, seconds=120)
            assert all("ok" in answer for answer in answers), answers
    assert {True, False} == set(checked)
    host.worker._opened.close()


def test_a_prompt_in_pieces_moves_once_and_no_further_than_said(engine: GgmlEngine) -> None:
    sequence, tokens = engine.new_sequence(), 900
    said, caches = engine.needed_bytes(None, tokens), set()
    for fed in range(0, tokens, 30):
        engine.step([SequenceBatch(sequence, [1] * 30, "none", tokens - fed - 30)])
        caches.add(id(engine._sequences[sequence]))
        assert engine.sequence_bytes(sequence) <= said
    assert len(caches) == 2, "the first one, and one for all"
    free_all(engine)
