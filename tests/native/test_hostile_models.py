"""Two thousand damaged or hostile models: each gives a typed error or a correct run, never a crash or a hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_rt.testing.random_models import write_random_model

MUTANTS = 2000
PATIENCE = 20.0
"""Seconds one mutant may take."""

BASES = (
    {"architecture": "llama", "type": "Q8_0"},
    {"architecture": "llama", "vocabulary": "spm", "bias": True},
    {"architecture": "qwen2", "type": "Q4_0"},
    {"architecture": "qwen3", "type": "F16", "rope_scaling": {"type": "yarn", "factor": 2, "original_context": 64}},
    {"architecture": "qwen3moe", "type": "Q4_0"},
    {"architecture": "deci", "type": "Q4_0"},
    {"architecture": "gemma"},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for i, options in enumerate(BASES):
        write_random_model(folder / f"base{i}.gguf", n_layer=1, n_embd=32, n_head=2, n_head_kv=1, n_ff=64, seed=i, **options)  # type: ignore[arg-type]
    return folder


def outcomes(folder: Path, first: int, last: int) -> Iterator[tuple[int, str]]:
    """(number, outcome) for each mutant; a worker that dies or hangs is replaced and its mutant's outcome says so."""
    while first < last:
        worker = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("hostile_worker.py")), str(folder), str(first), str(last)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "EDGE_RT_CACHE": str(folder / "cache"), "GGML_NO_BACKTRACE": "1"},
        )
        errors: list[str] = []
        assert worker.stdout is not None
        assert worker.stderr is not None
        reader = threading.Thread(target=errors.extend, args=(worker.stderr,))
        reader.start()
        alarm = threading.Timer(PATIENCE, worker.kill)
        alarm.start()
        for line in worker.stdout:
            alarm.cancel()
            word, _, rest = line.rstrip().partition(" ")
            if word == "end":
                yield first, rest
                first += 1
            alarm = threading.Timer(PATIENCE, worker.kill)
            alarm.start()
        alarm.cancel()
        code = worker.wait()
        reader.join()
        if first < last:
            yield first, f"DIED with {code}: {' '.join(errors)[-600:]}"
            first += 1


def test_no_mutant_kills_the_process(folder: Path) -> None:
    found: list[tuple[int, str]] = []
    half = MUTANTS // 2
    other = threading.Thread(target=lambda: found.extend(outcomes(folder, half, MUTANTS)))
    other.start()
    found.extend(outcomes(folder, 0, half))
    other.join()
    assert sorted(number for number, _ in found) == list(range(MUTANTS))
    kinds = Counter(outcome.split()[0] for _, outcome in found)
    dead = [(number, outcome) for number, outcome in found if outcome.startswith("DIED")]
    assert not dead, f"{len(dead)} of {MUTANTS} mutants killed the worker: {dead[:3]}"
    assert set(kinds) <= {"ran", "ModelFileError", "UnsupportedModel", "OptionError", "ContextError"}, kinds
    # The mutants are worth something only if many get past the door.
    assert kinds["ran"] > MUTANTS // 20, kinds
    assert kinds["ModelFileError"] > MUTANTS // 4, kinds
