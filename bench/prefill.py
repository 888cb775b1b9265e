"""Prefill: a prompt of 1024 tokens."""

from __future__ import annotations

import time
from functools import partial

from bench import models
from bench.contenders import Contender, random_prompt
from bench.peers import BEST, line_up
from bench.results import Bound, Result, Settings, compare
from bench.timing import interleave


def run(settings: Settings) -> list[Result]:
    """Q4_0, Q4_1 and Q8_0."""
    return [_run(settings, kind) for kind in ("Q4_0", "Q4_1", "Q8_0")]


def _run(settings: Settings, kind: str) -> Result:
    prompt = random_prompt(settings.pick(1024, 64))

    def seconds(contender: Contender) -> float:
        contender.truncate(0)
        started = time.perf_counter()
        contender.feed(prompt)
        return time.perf_counter() - started

    def rate(contender: Contender) -> float:
        return len(prompt) / seconds(contender)

    path, rounds = models.smollm2(settings, kind), settings.pick(7, 2)
    with line_up(path, settings, prompt[:16], len(prompt) + 256, seconds) as line:
        contenders = {name: partial(rate, contender) for name, contender in line.contenders.items()}
        samples = interleave(contenders, rounds=rounds, most=settings.pick(3 * rounds, rounds), deadline=settings.deadline)
    bounds = (Bound(BEST, "at least", 0.97),)
    return compare(f"prefill of {len(prompt)} tokens, {kind}", "tokens/s", samples, bounds, line.notes)
