"""The first token of a process is found without NumPy, and is the one that NumPy would find."""

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_rt.native.ggml import Rows
from edge_rt.native.memory import address_of
from edge_rt.native.samplers import Candidates, likeliest

FIRST_TOKEN = """
import sys
import edge_rt
from edge_rt.core import sequences
from edge_rt.types import Delta
sequences.autotune_v_layout = lambda *_: False  # what the first run on a machine measures, with NumPy
with edge_rt.open(sys.argv[1], threads=1) as model, model.session() as session:
    events = session.generate("one two three", temperature=float(sys.argv[2]), seed=1, max_tokens=9, ignore_eos=True)
    first = next(event for event in events if isinstance(event, Delta))
    print("numpy" in sys.modules, [first.tokens[0], *(event.tokens[0] for event in events if isinstance(event, Delta) and event.tokens)])
"""


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_the_first_token_needs_no_numpy(random_model: Callable[..., Path], temperature: str) -> None:
    def run(before: str) -> str:
        command = [sys.executable, "-c", before + FIRST_TOKEN, str(random_model(type="Q4_0")), temperature]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    without, with_numpy = run(""), run("import numpy")
    assert without.startswith("False [")
    assert with_numpy == without.replace("False", "True")


@pytest.mark.parametrize("change", [{}, {7: 3.0, 9: 3.0}, {5: np.nan, 3: np.nan, 8: np.inf}, {4: np.inf, 6: -np.inf}, {1: -np.inf}])
def test_python_and_numpy_choose_alike(monkeypatch: pytest.MonkeyPatch, change: dict[int, float]) -> None:
    logits = np.random.default_rng(0).uniform(-2, 2, 64).astype(np.float32)
    for token, value in change.items():
        logits[token] = value
    for row in (logits, memoryview(logits), np.full_like(logits, -np.inf)):
        expected = likeliest(row, more=True)
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "numpy")
            assert likeliest(row, more=False) == expected == int(np.asarray(row).argmax())


def test_candidates_are_filled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).uniform(-2, 2, 64).astype(np.float32)
    kind = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

    def content(candidates: Candidates) -> np.ndarray:
        return np.frombuffer((ctypes.c_char * (64 * kind.itemsize)).from_address(candidates.array.data), kind)

    candidates = Candidates(64)
    for without, row in ((True, memoryview(logits)), (True, logits[::-1]), (False, memoryview(logits)), (False, logits[::-1].copy())):
        content(candidates)["id"][:] = 0  # as samplers leave it: in another order
        with monkeypatch.context() as patch:
            if without:
                patch.delitem(sys.modules, "numpy")
            candidates.fill(row)
        assert content(candidates)["id"].tolist() == list(range(64))
        assert content(candidates)["logit"].tolist() == np.asarray(row).tolist()


def test_rows_are_a_matrix() -> None:
    values = np.arange(12, dtype=np.float32)
    rows = Rows(memoryview(values), 4)
    assert len(rows) == 3
    assert rows[1].tolist() == rows[-2].tolist() == [4, 5, 6, 7]
    assert [row[0] for row in rows] == [0, 4, 8]
    for index in (3, -4):
        with pytest.raises(IndexError):
            rows[index]
    assert np.shares_memory(np.asarray(rows), values)
    assert np.asarray(rows, dtype=np.float64).dtype == np.float64
    kept, part = rows.copy(), rows.part(1, 2)
    values[4] = 99
    assert (kept[1][0], part[0][0], np.array(rows)[1, 0]) == (4, 99, 99)
    assert np.array_equal(Rows.joined([part, kept]), np.concatenate([np.asarray(part), np.asarray(kept)]))


def test_the_address_of_a_buffer(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"some bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert ctypes.string_at(address_of(mapped), len(mapped)) == b"some bytes"
    with pytest.raises(TypeError):
        address_of(1)
