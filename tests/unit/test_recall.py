"""Which segments a question is about, and what is kept of them on disk."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt import config
from edge_rt.core.context.cell_store import CellStore
from edge_rt.core.context.recall import embedded, relevances, same_tokens

# ---- relevance -------------------------------------------------------------------------------------------------------


def test_rare_tokens_decide() -> None:
    the, of, code, door, dog, weather = range(6)
    segments = [[the, code, of, the, door], [the, dog], [the, weather, of, the, dog], [of, the, the, the]]
    found = relevances([the, code, of, door], segments, same_tokens)
    assert max(range(4), key=found.__getitem__) == 0
    assert found[0] == pytest.approx(1)
    assert found[3] < 0.5, "common words alone are not what a question is about"


def test_similar_tokens_count_by_their_vectors() -> None:
    vectors = np.eye(6, dtype=np.float32)
    vectors[5] = 0.9 * vectors[0] + 0.1 * vectors[1]  # a synonym of token 0
    near = relevances([0], [[5], [2], [3]], embedded(lambda tokens: vectors[list(tokens)]))
    assert near[0] > 0.8 > near[1]


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=8), st.lists(st.integers(0, 30), max_size=8))
def test_relevance_is_a_share(segments: list[list[int]], question: list[int]) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((31, 8)).astype(np.float32)
    for similarity in (same_tokens, embedded(lambda tokens: vectors[list(tokens)])):
        found = relevances(question, segments, similarity)
        assert len(found) == len(segments)
        assert all(-1 - 1e-5 <= one <= 1 + 1e-5 for one in found)
    assert relevances([1, 2], [[1, 2, 3]], same_tokens) == pytest.approx([1])


# ---- cells on disk ---------------------------------------------------------------------------------------------------


def test_cells_are_private_and_go_with_the_session() -> None:
    store = CellStore()
    assert store.put(3, [1, 2], b"cells")
    (folder,) = (config.cache_dir() / "evicted").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert store.take(3, [1, 2]) == b"cells"
    assert store.take(3, [1, 2]) is None, "taken once"
    store.put(3, [1, 2], b"cells")
    store.close()
    assert not folder.exists()


def test_other_tokens_or_another_place_are_other_cells() -> None:
    store = CellStore()
    store.put(3, [1, 2], b"cells")
    assert store.take(4, [1, 2]) is None
    assert store.take(3, [1, 3]) is None
    assert store.take(3, [1, 2]) == b"cells"
    store.close()


def test_the_oldest_go_first() -> None:
    store = CellStore(limit=10)
    assert not store.put(0, [0], b"x" * 11)
    for i in range(4):
        assert store.put(i, [i], bytes([i]) * 4)
    assert [store.take(i, [i]) for i in range(4)] == [None, None, b"\2" * 4, b"\3" * 4]
    store.close()


def test_a_disk_that_refuses_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    monkeypatch.setenv("EDGE_RT_CACHE", str(blocked))
    store = CellStore()
    assert not store.put(0, [1], b"cells")
    assert store.take(0, [1]) is None


def test_what_a_killed_process_left_is_removed() -> None:
    code = "import os; from edge_rt.core.context.cell_store import CellStore; s = CellStore(); s.put(0, [1], b'x'); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    parent = config.cache_dir() / "evicted"
    (left,) = parent.iterdir()
    store = CellStore()
    store.put(0, [1], b"x")
    assert not left.exists()
    store.close()
