"""Pruning 4096 cells to 1024: how much faster steps get, how much memory goes back, and what a pass costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import edge_rt
from bench import models
from bench.contenders import random_prompt
from bench.results import OURS, Bound, Result, Settings, compare
from bench.timing import interleave
from edge_rt.core.engine import SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.kv.pruning import ASKED, WATCHED, plan
from edge_rt.native import ggml, memory

_ALL = "all cells kept"
_STEP = "a step with all cells kept"


def run(settings: Settings) -> list[Result]:
    """Decoding, memory, and the pass itself, on SmolLM2-135M."""
    cells, keep, steps = settings.pick((4096, 1024, 24), (512, 128, 4))
    with _engine(settings, cells + steps + 1) as engine:
        whole = engine.new_sequence()
        engine.step([SequenceBatch(whole, random_prompt(cells - WATCHED), "none")])
        rounds, most = settings.pick((9, 27), (2, 2))
        pruned = _watched(engine, whole, cells)
        engine.step([SequenceBatch(whole, [5] * WATCHED, "none")])
        before = _resident(engine, pruned)
        _prune(engine, pruned, keep, 0)
        memory_result = _memory(cells, keep, before, _resident(engine, pruned))

        def step() -> float:
            return _seconds(engine, whole, steps) / steps

        def one_pass(question: int) -> float:
            fork = _watched(engine, whole, cells)
            took = _prune(engine, fork, keep, question)
            engine.free_sequence(fork)
            return took

        speeds = {OURS: lambda: steps / _seconds(engine, pruned, steps), _ALL: lambda: 1 / step()}
        samples = interleave(speeds, rounds=rounds, most=most, deadline=settings.deadline)
        decode = compare(f"decode, {cells} cells pruned to {keep}", "tokens/s", samples, (Bound(_ALL, "at least", 1.8),))
        costs = []
        for kind, question in (("for a question", ASKED.queries), ("without a question", 0)):
            samples = interleave({OURS: partial(one_pass, question), _STEP: step}, rounds=rounds, most=most, deadline=settings.deadline)
            costs.append(compare(f"a pass from {cells} cells to {keep} {kind}", "s", samples, (Bound(_STEP, "at most", 8.0),)))
    return [decode, memory_result, *costs]


@contextmanager
def _engine(settings: Settings, context: int) -> Iterator[GgmlEngine]:
    """The engine of SmolLM2, Q4_0."""
    with edge_rt.open(models.smollm2(settings, "Q4_0"), context=context, threads=settings.threads) as model:
        assert isinstance(model.engine, GgmlEngine), "nothing else was asked for"
        yield model.engine


def _watched(engine: GgmlEngine, source: int, cells: int) -> int:
    """A copy of a sequence whose last WATCHED tokens were watched."""
    fork = engine.fork_sequence(source, cells - WATCHED)
    engine.watch(fork, WATCHED)
    engine.step([SequenceBatch(fork, [5] * WATCHED, "none")])
    return fork


def _prune(engine: GgmlEngine, sequence: int, keep: int, question: int) -> float:
    """Seconds of a pass."""
    chosen = plan(keep, asked=question > 0, since=question)
    started = time.perf_counter()
    engine.prune(sequence, **chosen._asdict())
    return time.perf_counter() - started


def _seconds(engine: GgmlEngine, sequence: int, steps: int) -> float:
    """Seconds of some steps at the end of a sequence, which then is as it was."""
    length = engine.length(sequence)
    engine.step([SequenceBatch(sequence, [5])])  # whatever this shape needs is built
    started = time.perf_counter()
    for _ in range(steps):
        engine.step([SequenceBatch(sequence, [5])])
    took = time.perf_counter() - started
    engine.truncate(sequence, length)
    return took


def _resident(engine: GgmlEngine, sequence: int) -> int:
    """Bytes of a sequence's cache that are in memory, as the system counts them."""
    view = engine._sequences[sequence].view
    places = [(ggml.data_address(tensor), ggml.fields(tensor).nb[3]) for tensor in (*view.keys, *view.values)]
    return sum(memory.resident_bytes(*memory.page_span(*place)) or 0 for place in places)


def _memory(cells: int, keep: int, before: int, after: int) -> Result:
    share = after / before
    return Result(
        name=f"memory of the cache, {cells} cells pruned to {keep}",
        requirement="≤ 30 %",
        unit="of what it was",
        ours=[share],
        ok=share <= 0.30,
        shown=f"{before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after: {share:.1%}, resident as the system counts it",
    )
