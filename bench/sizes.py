"""Speed on a model that caches hold and on one that they do not, against llama.cpp and ik_llama.cpp in each of their settings.

Each contender is a process that keeps its model open (bench/programs/contender.py); they take turns at the same work. ik_llama.cpp takes
part with ``--ik-python PROGRAM``, a Python that has the package ik-llama-cpp-python, which cannot be loaded beside llama-cpp-python.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from bench import models
from bench.results import OURS, Result, Settings, compare
from bench.timing import interleave

_CONTEXT = 1024
_WORK = {"prefill of 512 tokens": ("prefill", 0, 512), "decode at 128 cells": ("decode", 128, 48), "step of 4 rows": ("rows", 128, 4)}
"""What is measured: name -> work, cells before it, tokens."""
_LLAMA: dict[str, Sequence[str]] = {"llama.cpp": (), "llama.cpp fa=0": ("fa=0",), "llama.cpp not repacked": ("repack=0",)}
_IK: dict[str, Sequence[str]] = {"ik_llama": (), "ik_llama repacked": ("rtr=1",)}
_ROOT = Path(__file__).parents[1]


def small(settings: Settings) -> list[Result]:
    """SmolLM2-135M-Instruct in Q4_0 and Q8_0."""
    return [row for kind in ("Q4_0", "Q8_0") for row in _rows(settings, f"135M {kind}", models.smollm2(settings, kind))]


def large(settings: Settings) -> list[Result]:
    """2.3 billion random weights in Q4_0 and Q4_K_M."""
    source = models.large(settings)
    files = {"Q4_0": source, "Q4_K_M": models.quantised(source, "Q4_K_M", settings.threads)}
    return [row for kind, path in files.items() for row in _rows(settings, f"2.3B {kind}", path)]


def _rows(settings: Settings, name: str, path: Path) -> Iterator[Result]:
    """A result for each work, in tokens a second of each contender."""
    with contextlib.ExitStack() as stack:
        ask = {OURS: stack.enter_context(_contender(settings, sys.executable, "edge-rt", path, ()))}
        for title, chosen in _LLAMA.items():
            ask[title] = stack.enter_context(_contender(settings, sys.executable, "llama.cpp", path, chosen))
        for title, chosen in _IK.items() if settings.ik_python else ():
            ask[title] = stack.enter_context(_contender(settings, str(settings.ik_python), "ik_llama", path, chosen))
        for title, (work, cells, tokens) in _WORK.items():
            count = settings.pick(tokens, min(tokens, 8))
            rows = 1 if work == "decode" else count
            contenders = {who: partial(_rate, one, (work, cells, count), rows) for who, one in ask.items()}
            rounds = settings.pick(7, 2)
            samples = interleave(contenders, rounds=rounds, most=settings.pick(2 * rounds, rounds), deadline=settings.deadline)
            yield compare(f"{title}, {name}", "tokens/s", samples)


def _rate(ask: Callable[[Sequence[object]], float], work: Sequence[object], tokens: int) -> float:
    return tokens / ask(work)


@contextlib.contextmanager
def _contender(
    settings: Settings, python: str, runtime: str, path: Path, chosen: Sequence[str]
) -> Iterator[Callable[[Sequence[object]], float]]:
    """A process with the model open; what is yielded asks it for the seconds of some work. Raises RuntimeError where it ends instead."""
    command = [python, "-m", "bench.programs.contender", runtime, str(path), str(_CONTEXT), str(settings.threads), *chosen]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=_ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None and process.stdout is not None, "both are pipes"  # noqa: PT018
        requests, answers = process.stdin, process.stdout

        def read() -> str:
            if not (line := answers.readline()):
                raise RuntimeError(f"{' '.join(command)} ended; run it by hand to see why")
            return line

        def ask(work: Sequence[object]) -> float:
            requests.write(json.dumps(list(work)) + "\n")
            requests.flush()
            return float(json.loads(read()))

        read()
        yield ask
        requests.close()
