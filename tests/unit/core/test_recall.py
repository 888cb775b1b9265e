"""Which segments a question is about, and what is kept of them on disk."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt import config
from edge_rt.core.context.recall import RELEVANT, Passage, Recall, Summaries, embedded, relevances, same_tokens
from edge_rt.core.kv.swap import KVSwap
from edge_rt.testing.null_device import NullEngine

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


# ---- summary vectors -------------------------------------------------------------------------------------------------


def by_letter(asked: list[str]) -> Callable[[Sequence[str]], Any]:
    """An embedder that looks at the first letter; ``asked`` gets the texts."""

    def embed(texts: Sequence[str]) -> Any:
        asked.extend(texts)
        return np.eye(26, dtype=np.float32)[[ord(text[0]) - ord("a") for text in texts]]

    return embed


def test_a_segment_is_summarised_once() -> None:
    asked: list[str] = []
    summaries = Summaries(by_letter(asked), 0.5)
    assert summaries.relevances("apple?", ["apples", "pears", "apples"]) == pytest.approx([1, 0, 1], abs=0.5)
    assert asked == ["apple?", "apples", "pears"]
    summaries.relevances("pear?", ["pears", "plums"])
    assert asked[3:] == ["pear?", "plums"]


def test_what_was_not_needed_for_longest_is_forgotten() -> None:
    asked: list[str] = []
    summaries = Summaries(by_letter(asked), 0.5, limit=4)
    summaries.relevances("a", ["b", "c", "d"])
    summaries.relevances("a", ["b"])
    summaries.relevances("e", ["f"])
    del asked[:]
    assert len(summaries.relevances("a", ["b", "c", "d"])) == 3
    assert asked == ["c", "d"]
    del asked[:]
    everything = [chr(ord("a") + i) for i in range(26)]
    assert np.argmax(summaries.relevances("q", everything)) == 16, "more at once than are remembered"


def test_a_cosine_counts_from_what_the_embedder_calls_relevant() -> None:
    def embed(texts: Sequence[str]) -> Any:
        angles = np.array([np.arccos(float(text)) for text in texts], np.float32)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    cosines = ["-1", "0.2", "0.3", "0.4", "1"]
    for relevant in (0.3, 0.9):
        found = Summaries(embed, relevant).relevances("1", cosines)
        assert found == sorted(found)
        assert [found[0], found[-1]] == pytest.approx([-1, 1], abs=1e-5)
        assert [one > RELEVANT + 1e-5 for one in found] == [float(c) > relevant for c in cosines]
    assert Summaries(embed, 0.3).relevances("1", cosines)[2] == pytest.approx(RELEVANT)


def test_an_embedder_does_not_hold_up_other_sessions() -> None:
    lock = threading.Lock()

    def embed(texts: Sequence[str]) -> Any:
        assert not lock.locked()
        return np.ones((len(texts), 2), np.float32)

    engine = NullEngine()
    recall = Recall(engine, lock, Summaries(embed, 0.5))
    assert recall.relevances(Passage([1], "a"), [Passage([2], "b")]) == pytest.approx([1])
    assert Recall(engine, lock).relevances(Passage([1], "a"), [Passage([2], "b"), Passage([1], "c")])[1] == pytest.approx(1)
    assert recall.relevances(Passage([], ""), [Passage([2], "b")]) == [0.0], "a text without a question"


# ---- cells on disk ---------------------------------------------------------------------------------------------------


def test_cells_are_private_and_go_with_the_session() -> None:
    store = KVSwap()
    assert store.put(3, [1, 2], b"cells")
    (folder,) = (config.cache_dir() / "evicted").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert store.take(3, [1, 2]) == b"cells"
    assert store.take(3, [1, 2]) is None, "taken once"
    store.put(3, [1, 2], b"cells")
    store.close()
    assert not folder.exists()


def test_other_tokens_or_another_place_are_other_cells() -> None:
    store = KVSwap()
    store.put(3, [1, 2], b"cells")
    assert store.take(4, [1, 2]) is None
    assert store.take(3, [1, 3]) is None
    assert store.take(3, [1, 2]) == b"cells"
    store.close()


def test_the_oldest_go_first() -> None:
    store = KVSwap(limit=10)
    assert not store.put(0, [0], b"x" * 11)
    for i in range(4):
        assert store.put(i, [i], bytes([i]) * 4)
    assert [store.take(i, [i]) for i in range(4)] == [None, None, b"\2" * 4, b"\3" * 4]
    store.close()


def test_a_disk_that_refuses_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    monkeypatch.setenv("EDGE_RT_CACHE", str(blocked))
    store = KVSwap()
    assert not store.put(0, [1], b"cells")
    assert store.take(0, [1]) is None


def test_what_a_killed_process_left_is_removed() -> None:
    code = "import os; from edge_rt.core.kv.swap import KVSwap; s = KVSwap(); s.put(0, [1], b'x'); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    parent = config.cache_dir() / "evicted"
    (left,) = parent.iterdir()
    store = KVSwap()
    store.put(0, [1], b"x")
    assert not left.exists()
    store.close()
