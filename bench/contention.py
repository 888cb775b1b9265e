"""A busy neighbour: decoding beside a process that keeps one CPU busy, with one thread, with all, and with what the governor chooses."""

from __future__ import annotations

import contextlib
import time

import numpy as np

from bench import models
from bench.contenders import Ours, random_prompt
from bench.processes import busy_loop
from bench.results import Result, Settings


def run(settings: Settings) -> list[Result]:
    """Report only: there is no peer, libllama uses the same threads."""
    choices: dict[str, int | None] = {"1 thread": 1, f"{settings.threads} threads": settings.threads, "threads by the governor": None}
    results = []
    for place in ("alone", "beside a busy loop"):
        with busy_loop() if place != "alone" else contextlib.nullcontext():
            results += [_run(settings, f"decode {place}, {name}", threads) for name, threads in choices.items()]
    return results


def _run(settings: Settings, name: str, threads: int | None) -> Result:
    """Decode for some seconds from a short prompt; the context grows to 1024 cells at most."""
    ours = Ours(models.smollm2(settings, "Q4_0"), 1024, threads)
    try:
        ours.feed(random_prompt(16))
        steps: list[float] = []
        end = time.monotonic() + settings.pick(8.0, 0.5)
        while time.monotonic() < end and len(steps) < 1000:
            started = time.perf_counter()
            ours.feed([5])
            steps.append(time.perf_counter() - started)
    finally:
        ours.close()
    rate, milliseconds = len(steps) / sum(steps), 1e3 * np.array(steps)
    return Result(
        name=name,
        requirement="",
        unit="tokens/s",
        ours=[rate],
        shown=f"{rate:.1f} tokens/s, median {np.median(milliseconds):.1f} ms, 99 % within {np.percentile(milliseconds, 99):.0f} ms",
    )
