"""A busy neighbour: decoding alone, beside a plain busy loop and beside a second OpenMP program; and how soon the governor reacts.

A second OpenMP program can leave its CPUs again and again, as one that decodes does where its threads meet, or hardly ever.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from bench import models
from bench.contenders import Contender, Ours, Peer, PeerSetting, decode_seconds, random_prompt
from bench.peers import BEST, DEFAULT, line_up
from bench.processes import busy_loop, openmp_program, waiting_loop
from bench.results import OURS, Bound, Result, Settings, compare
from bench.timing import interleave, spread

REACTION = 10
"""Tokens within which the governor is to notice."""
ONE = "one thread"
"""libllama with one thread: what it would have to be told beside a neighbour."""
PROMPT, CONTEXT = 16, 1024


def run(settings: Settings) -> list[Result]:
    """Alone against the best peer, beside neighbours against the default one, and the reaction."""
    path = models.smollm2(settings, "Q4_0")
    results = [
        _alone(path, settings),
        *_beside(path, settings, "a busy loop", busy_loop(), Bound(DEFAULT, "at least", 1.3), Bound(DEFAULT, "at most", 0.3)),
        *_beside(path, settings, "libllama that decodes", openmp_program(path, settings.threads, 1), None, None),
        *_beside(path, settings, "libllama at prompts", openmp_program(path, settings.threads, 256), Bound(DEFAULT, "at least", 20), None),
    ]
    return [*results, _reaction(settings)] if settings.threads > 1 else results


def _alone(path: Path, settings: Settings) -> Result:
    measure = partial(decode_seconds, start=PROMPT, tokens=settings.pick(48, 4))
    with line_up(path, settings, random_prompt(PROMPT), CONTEXT, measure) as line:
        samples, _ = _turns(line.contenders, settings)
    return compare("decode alone, Q4_0", "tokens/s", samples, (Bound(BEST, "at least", 1.0),), line.notes)


def _beside(
    path: Path, settings: Settings, what: str, neighbour: contextlib.AbstractContextManager[None], faster: Bound | None,
    steadier: Bound | None,
) -> Iterator[Result]:  # fmt: skip
    """Decode beside a neighbour, and the time from token to token."""
    with contextlib.ExitStack() as stack:
        contenders: dict[str, Contender] = {OURS: Ours(path, CONTEXT)}
        for name, threads in ((DEFAULT, settings.threads), (ONE, 1)):
            contenders[name] = Peer(path, PeerSetting(threads), CONTEXT)
        for contender in contenders.values():
            stack.callback(contender.close)
            contender.feed(random_prompt(PROMPT))
        with neighbour:
            samples, steps = _turns(contenders, settings)
    yield compare(f"decode beside {what}, Q4_0", "tokens/s", samples, () if faster is None else (faster,))
    slowest = {name: float(np.percentile(seconds, 99)) for name, seconds in steps.items()}
    shown = ", ".join(f"{name} median {1e3 * np.median(steps[name]):.1f}, 99 % within {1e3 * slowest[name]:.1f} ms" for name in steps)
    ratios = {name: slowest[OURS] / slowest[name] for name in slowest if name != OURS}
    yield Result(
        name=f"from token to token beside {what}, the 99th percentile",
        requirement=str(steadier or ""),
        unit="s",
        ours=[slowest[OURS]],
        peers={name: [slowest[name]] for name in ratios},
        ratios={name: spread([ratio]) for name, ratio in ratios.items()},
        ok=None if settings.quick or steadier is None else steadier.holds(ratios[steadier.peer]),
        shown=shown,
    )


def _turns(contenders: dict[str, Contender], settings: Settings) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(tokens a second of each turn, seconds of each step) of contenders that take turns of some seconds."""
    steps: dict[str, list[float]] = {name: [] for name in contenders}

    def turn(name: str) -> float:
        contender, taken = contenders[name], list[float]()
        contender.truncate(PROMPT)
        end = time.monotonic() + settings.pick(3.0, 0.2)
        while time.monotonic() < end and len(taken) < CONTEXT - PROMPT - 1:
            started = time.perf_counter()
            contender.feed([5])
            taken.append(time.perf_counter() - started)
        steps[name] += taken
        return len(taken) / sum(taken)

    rounds = settings.pick(7, 1)
    measures = {name: partial(turn, name) for name in contenders}
    return interleave(measures, rounds=rounds, most=settings.pick(2 * rounds, 1), deadline=settings.deadline), steps


# ---- reaction --------------------------------------------------------------------------------------------------------


def _reaction(settings: Settings) -> Result:
    """Tokens from the moment a neighbour comes, or goes, to the first step with another number of threads."""
    ours = Ours(models.smollm2(settings, "Q4_0"), CONTEXT)
    found: dict[str, list[float]] = {"comes": [], "goes": []}
    try:
        ours.feed(random_prompt(PROMPT))
        for _ in range(settings.pick(20, 1)):
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
    if ours.length > CONTEXT - 100:
        ours.truncate(PROMPT)
    ours.feed([5])


def _tokens_until(ours: Ours, reached: Callable[[], bool], most: int = 300) -> int:
    """Steps taken until something is the case; ``most`` if it never is."""
    for count in range(most):
        if reached():
            return count
        _token(ours)
    return most
