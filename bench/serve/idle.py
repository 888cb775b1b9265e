"""`serve-idle`: the first token of a model that has cooled down, against the first token of one that has not."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import edge_rt
from bench import models, pages
from bench.results import OURS, Bound, Result, Settings, compare
from bench.serve.served import NO_RATE, Served, mapped, refused, say, wait_for, worker
from bench.timing import interleave
from edge_rt.model import Model

LIMIT = 1.3
COOL_AFTER = 0.5
"""Seconds that the daemon is told to wait."""
_IDLE = 0.8 * COOL_AFTER
"""And that a warm model is not asked anything."""
COOLED = "first token after cool-down"
_WARM = "warm"
_CONTEXT = 1024
_numbers = itertools.count(10_000)


def run(settings: Settings) -> list[Result]:
    """In this process, with the pages still there and with the pages gone; then through the daemon."""
    model = models.smollm2(settings, "Q4_1")
    return [*_in_process(model, settings), _through_the_daemon(model, settings)]


def _prompt() -> str:
    """Another one each time, from its first token on, so that nothing computed before helps."""
    return f"{next(_numbers)} is a number, and so is the year in which the largest of all rivers was seen for the first time. It was"


def _in_process(path: Path, settings: Settings) -> list[Result]:
    files = [path, *_packed(path)]
    with edge_rt.open(path, context=_CONTEXT) as model:

        def cooled() -> float:
            model.cool()
            return _first_token(model)

        def evicted() -> float:
            model.cool()
            _evict(files)
            return _first_token(model)

        _first_token(model)
        before = mapped(os.getpid())
        model.cool()
        given = f"cooling took {(before - mapped(os.getpid())) / 1e6:.0f} MB of files out of the process"
        results = [_compared(COOLED, model, cooled, settings, [given])]
        name = f"{COOLED}, weights out of memory"
        try:
            evicted()
        except RuntimeError as error:
            return [*results, Result(name, "", "s", [], shown="skipped", notes=[str(error)])]
        size = sum(file.stat().st_size for file in files)
        return [*results, _compared(name, model, evicted, settings, [f"{size / 1e6:.0f} MB of files, read again from disk"], judged=False)]


def _compared(
    name: str, model: Model, cold: Callable[[], float], settings: Settings, notes: Sequence[str], *, judged: bool = True
) -> Result:  # fmt: skip
    """In turn with warm ones. A sample that does not count follows each, so that the next begins warm."""

    def settled(measure: Callable[[], float]) -> float:
        found = measure()
        _first_token(model)
        return found

    samples = interleave(
        {OURS: lambda: settled(cold), _WARM: lambda: settled(lambda: _first_token(model))},
        rounds=settings.pick(15, 3), most=settings.pick(41, 3), deadline=settings.deadline,
    )  # fmt: skip
    return compare(name, "s", samples, [Bound(_WARM, "at most", LIMIT)] if judged else [], notes)


def _first_token(model: Model) -> float:
    """Seconds from the request to the first token."""
    with model.session() as session:
        started = time.perf_counter()
        for _ in session.generate(_prompt(), max_tokens=1, temperature=0):
            pass
        return time.perf_counter() - started


def _packed(model: Path) -> list[Path]:
    try:
        return [models.packed(model)]
    except RuntimeError:  # this CPU has no kernels for it
        return []


def _evict(files: Sequence[Path]) -> None:
    """Let the system take files' pages that nobody has mapped. Raises RuntimeError if a tenth of them stays."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if (left := pages.resident(path)) > 0.1:
            raise RuntimeError(f"{left:.0%} of {path.name} stays in memory; close what uses it")


# ---- the daemon ------------------------------------------------------------------------------------------------------


def _through_the_daemon(model: Path, settings: Settings) -> Result:
    """The daemon cools by itself. That it did is seen from the worker's page table."""
    name, config = f"{COOLED}, through the daemon", f"{NO_RATE}cool_after = {COOL_AFTER}\n"
    if (why := refused(config)) is not None:
        return Result(name, "", "s", [], shown="skipped", notes=[f"this daemon does not cool down: {why}"])
    samples: dict[str, list[float]] = {OURS: [], _WARM: []}
    with Served(model, "-c", str(_CONTEXT), config=config) as daemon, daemon.ready() as client:
        pid = worker(client)["pid"]

        def first_token() -> float:
            started = time.perf_counter()
            return say(client, _prompt(), 1).times[0] - started

        first_token()
        full = mapped(pid)
        for _ in range(settings.pick(15, 3)):
            wait_for(lambda: mapped(pid) < full - 0.5 * model.stat().st_size, 60 * COOL_AFTER, "the model has not cooled down")
            time.sleep(_IDLE)  # the worker tidies up after it has given its pages back
            samples[OURS].append(first_token())
            first_token()
            time.sleep(_IDLE)
            samples[_WARM].append(first_token())
    note = f"after {COOL_AFTER:g} s without a request; warm ones after {_IDLE:g} s without one: caches of a CPU that waits get cold, too"
    return compare(name, "s", samples, [Bound(_WARM, "at most", LIMIT)], [note])
