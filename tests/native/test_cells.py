"""Cells that leave the middle of a sequence: as in libllama, and their memory goes back to the system."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import Reference

from edge_rt.core.engine import SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.kv.positions import Positions, Run
from edge_rt.hooks import EngineOptions
from edge_rt.native import ggml, memory

ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "yarn": ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_context": 128}}),
    "llama3": ("llama", {"rope_freqs": [1.0, 2.0, 4.0, 8.0] * 2}),
}
TOKENS = [(7 * i) % 60 + 1 for i in range(100)]


def relative_error(a: Any, b: Any) -> float:
    return float(np.abs(a - b).mean() / np.abs(b).mean())


# libllama scales the keys it moves once more under YaRN (0.3.36); the conformance suite holds that ours are right.
@pytest.mark.parametrize(("rope", "close_gap"), [(rope, gap) for rope in ROPES for gap in (False, True) if (rope, gap) != ("yarn", True)])
def test_as_in_libllama(random_model: Callable[..., Path], rope: str, *, close_gap: bool) -> None:
    architecture, measures = ROPES[rope]
    path = random_model(architecture, type="F32", **measures)
    with ModelFile.open(path) as file, closing(GgmlEngine(file, EngineOptions(threads=1, context=256))) as engine:
        reference = Reference(path, flash=True)
        try:
            sequence = engine.new_sequence()
            before = engine.step([SequenceBatch(sequence, TOKENS)])[0]
            assert before is not None
            expected = reference.feed(TOKENS)[-1]
            assert relative_error(np.asarray(before)[0], expected) < 1e-3
            engine.remove_cells(sequence, [(30, 70)])
            reference.remove(30, 70, close_gap=close_gap)
            if close_gap:
                engine.renumber(sequence)
            assert engine.next_position(sequence) == (60 if close_gap else 100)
            for token in (5, 6, 7):
                (logits,) = engine.step([SequenceBatch(sequence, [token])])
                got, expected = np.asarray(logits)[0], reference.feed([token])[0]
                assert relative_error(got, expected) < 5e-3, "attention adds up in another order and keys are rounded, no more"
        finally:
            reference.close()


def test_a_gap_matters(random_model: Callable[..., Path]) -> None:
    """The comparison above would notice: the same cells at other positions give other logits."""
    with ModelFile.open(random_model("llama", type="F32")) as file, closing(GgmlEngine(file, EngineOptions(context=256))) as engine:
        outputs = []
        for renumber in (False, True):
            sequence = engine.new_sequence()
            engine.step([SequenceBatch(sequence, TOKENS)])
            engine.remove_cells(sequence, [(30, 70)])
            if renumber:
                engine.renumber(sequence)
            outputs.append(np.array(engine.step([SequenceBatch(sequence, [5])])[0]))
        assert relative_error(*outputs) > 2e-2


@pytest.mark.parametrize(("transposed", "share"), [(False, 0.8), (True, 0.4)])
def test_their_memory_goes_back(random_model: Callable[..., Path], transposed: bool, share: float) -> None:
    """Whole pages of each head, so not quite nine tenths; of transposed values none, whose rows are shorter than a page here."""
    path = random_model("llama", head_dim=64, n_head=4, n_head_kv=2)
    options = EngineOptions(context=4096, threads=1, extra={"ggml.transposed_values": transposed})
    with ModelFile.open(path) as file, closing(GgmlEngine(file, options)) as engine:
        sequence = engine.new_sequence()
        engine.step([SequenceBatch(sequence, TOKENS * 20, "none")])
        held = engine.memory().cache
        cache = engine._sequences[sequence].view
        places = [(ggml.data_address(t), ggml.fields(t).nb[3]) for t in (*cache.keys, *cache.values)]

        def resident() -> int:
            return sum(memory.resident_bytes(*memory.page_span(*place)) or 0 for place in places)

        before = resident()
        given_back = engine.remove_cells(sequence, [(100, 1900)])
        assert engine.memory().cache == held // 10
        assert given_back > share * held
        assert before - resident() == given_back
        engine.step([SequenceBatch(sequence, TOKENS, "none")])
        assert engine.length(sequence) == 300


# ---- positions -------------------------------------------------------------------------------------------------------


@given(st.data())
def test_positions_are_those_of_a_list(data: st.DataObject) -> None:
    """Any mixture of appending, removing, truncating, cutting out and putting back does what it does to a list of positions."""
    positions, plain, following = Positions(), list[int](), 0
    for _ in range(data.draw(st.integers(1, 8))):
        n = len(plain)
        kind = data.draw(st.sampled_from(["append", "remove", "truncate", "return", "renumber"]))
        if kind == "append":
            more = data.draw(st.integers(0, 6))
            positions.append(more)
            plain += range(following, following + more)
            following += more
        elif kind == "truncate" and n:
            length = data.draw(st.integers(0, n - 1))
            following = plain[length]
            positions.truncate(length)
            del plain[length:]
        elif kind == "renumber":
            positions.renumbered()
            plain, following = list(range(n)), n
        elif n:
            start = data.draw(st.integers(0, n))
            end = data.draw(st.integers(start, n))
            runs = positions.part(start, end)
            positions.remove([(start, end)])
            if kind == "return":
                positions.insert(start, runs)
            else:
                del plain[start:end]
        assert [positions.of(i) for i in range(len(plain))] == plain
        assert (positions.length, positions.next) == (len(plain), following)
        assert [cell for run in positions for cell in range(run.cell, run.cell + run.n)] == list(range(len(plain)))


def test_cells_go_between_their_neighbours() -> None:
    positions = Positions([Run(0, 0, 10)])
    positions.remove([(3, 6)])
    assert positions.insert(3, [Run(0, 4, 1)]) == []
    assert list(positions) == [Run(0, 0, 3), Run(3, 4, 1), Run(4, 6, 4)]


def test_positions_move_where_there_is_no_gap() -> None:
    positions = Positions([Run(0, 0, 10)])
    positions.remove([(3, 6)])
    positions.renumbered()  # 0 to 6
    assert positions.insert(3, [Run(0, 3, 2), Run(2, 9, 1)]) == [(3, 5, 0), (5, 6, -4), (6, 10, 3)]
    assert list(positions) == [Run(0, 0, 10)]
    assert positions.next == 10
    assert positions.insert(10, [Run(0, 2, 2)]) == [(10, 12, 8), (12, 12, 2)]
    assert positions.next == 12
