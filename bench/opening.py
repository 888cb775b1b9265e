"""Opening a model of more than a gigabyte whose pages are in memory, and the private memory it takes.

"Opening" ends when the engine takes tokens. libllama has read the vocabulary by then; edge-rt still reads it if an earlier opening found
the file sound, as the first run here does, which does not count. So there is a second row, "until text can be tokenised", which ends
when a text has been turned into tokens: with libllama that is the same moment. Private memory is taken then, vocabulary included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import models, pages
from bench.peers import DEFAULT
from bench.processes import run_program
from bench.results import OURS, Bound, Result, Settings, compare
from bench.timing import interleave, spread

_PROMPT, _NEW = 32, 16


def run(settings: Settings) -> list[Result]:
    """Time to open, private memory then and after 16 tokens; each sample a fresh process."""
    path = models.large(settings)
    pack = models.packed(path)
    pages.warm(path, pack)
    seen: dict[str, list[dict[str, Any]]] = {OURS: [], DEFAULT: []}

    def ours() -> float:
        return _remember(seen[OURS], run_program("ours.py", path, _PROMPT, _NEW))

    def theirs() -> float:
        return _remember(seen[DEFAULT], run_program("peer.py", path, _PROMPT, _NEW, settings.threads, "default"))

    rounds = settings.pick(5, 2)
    samples = interleave({OURS: ours, DEFAULT: theirs}, rounds=rounds, most=settings.pick(9, 2), deadline=settings.deadline)
    size = f"{path.stat().st_size / 1e9:.2f} GB of random Q4_0 weights"
    opening = compare(
        "opening with warm pages", "s", samples, [Bound(DEFAULT, "at most", 0.05)], [size, *_parts(path), *seen[OURS][0]["notices"]]
    )
    text = compare("opening with warm pages until text can be tokenised", "s", _column(seen, "text", 1.0), [])
    memory = [
        compare(f"private memory (RssAnon) {when}", "MB", _column(seen, key, 1e6), [Bound(DEFAULT, "at most", 0.15)])
        for when, key in (("after opening", "private_open"), (f"after {_NEW} tokens", "private_end"))
    ]
    return [opening, text, *memory]


def _remember(seen: list[dict[str, Any]], found: dict[str, Any]) -> float:
    seen.append({"text": found["open"], **found})
    return float(found["open"])


def _column(seen: dict[str, list[dict[str, Any]]], key: str, unit: float) -> dict[str, list[float]]:
    """One figure of every run but the first of each contender, which did not count."""
    return {name: [found[key] / unit for found in runs[1:]] for name, runs in seen.items()}


def _parts(path: Path) -> list[str]:
    """What opening consists of, each part measured alone in this process. The vocabulary loads beside the others, on a thread."""
    from edge_rt.core.gguf.model_file import ModelFile
    from edge_rt.core.gguf.validate import check_hyperparameters, check_vocabulary
    from edge_rt.core.graph.config import read_config
    from edge_rt.core.weights.repack import open_packed
    from edge_rt.core.weights.store import WeightStore
    from edge_rt.native.llama import Vocab

    def header() -> None:
        ModelFile.open(path).close()

    with ModelFile.open(path) as file:

        def checks() -> None:
            check_vocabulary(file.header)
            check_hyperparameters(file.header)

        def packed_map() -> None:
            WeightStore(file, read_config(file.header), open_packed(file)[0]).close()

        def vocabulary() -> None:
            Vocab.load(file.native_path).close()

        parts = {"header": header, "checks": checks, "packed map": packed_map, "vocabulary": vocabulary}
        return ["; ".join(f"{name} {1e3 * _median(part):.0f} ms" for name, part in parts.items())]


def _median(part: Callable[[], None]) -> float:
    """Median seconds of five calls after one that does not count."""
    times = []
    for _ in range(6):
        started = time.perf_counter()
        part()
        times.append(time.perf_counter() - started)
    return spread(times[1:]).median
