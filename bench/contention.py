"""A busy neighbour: decoding beside a process that keeps one CPU busy, with one thread, with all, and with what the governor chooses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import numpy as np

from bench import models
from bench.contenders import Ours, random_prompt
from bench.processes import busy_loop, waiting_loop
from bench.results import Result, Settings

REACTION = 10
"""Tokens within which the governor is to notice."""


def run(settings: Settings) -> list[Result]:
    """Report only: there is no peer, libllama uses the same threads."""
    choices: dict[str, int | None] = {"1 thread": 1, f"{settings.threads} threads": settings.threads, "threads by the governor": None}
    results = []
    for place in ("alone", "beside a busy loop"):
        with busy_loop() if place != "alone" else contextlib.nullcontext():
            results += [_run(settings, f"decode {place}, {name}", threads) for name, threads in choices.items()]
    return [*results, _reaction(settings)] if settings.threads > 1 else results


def _reaction(settings: Settings) -> Result:
    """Tokens from the moment a neighbour comes, or goes, to the first step with another number of threads."""
    ours = Ours(models.smollm2(settings, "Q4_0"), 1024)
    found: dict[str, list[float]] = {"comes": [], "goes": []}
    try:
        ours.feed(random_prompt(16))
        for _ in range(settings.pick(10, 1)):
            _tokens_until(ours, lambda: ours.threads == settings.threads)
            with waiting_loop() as start:
                for _ in range(20):
                    _token(ours)
                start()
                found["comes"].append(_tokens_until(ours, lambda: ours.threads < settings.threads))
                for _ in range(20):
                    _token(ours)
            found["goes"].append(_tokens_until(ours, lambda: ours.threads == settings.threads))
    finally:
        ours.close()
    shown = ", ".join(f"when one {what} {np.median(counts):.0f} tokens, at most {max(counts):.0f}" for what, counts in found.items())
    worst = [max(pair) for pair in zip(*found.values(), strict=True)]
    ok = None if settings.quick else max(worst) <= REACTION
    return Result(name="reaction to a busy loop", requirement=f"≤ {REACTION} tokens", unit="tokens", ours=worst, ok=ok, shown=shown)


def _token(ours: Ours) -> None:
    """One step; the context stays short."""
    if ours.length > 900:
        ours.truncate(16)
    ours.feed([5])


def _tokens_until(ours: Ours, reached: Callable[[], bool], most: int = 300) -> int:
    """Steps taken until something is the case; ``most`` if it never is."""
    for count in range(most):
        if reached():
            return count
        _token(ours)
    return most


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
