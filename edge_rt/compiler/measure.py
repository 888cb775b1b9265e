"""A row of the table that was timed: an open model, with the prompt and the context that a prediction is about."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from edge_rt.compiler.cost import Memory, Prediction
from edge_rt.core.engine import SequenceBatch
from edge_rt.errors import ContextError

if TYPE_CHECKING:
    from edge_rt.core.engine import Engine

TOKENS = 16
"""Tokens that are decoded, up to the end of the context."""
_ROUNDS, _SETTLED, _LONG = 3, 0.5, 5.0


def measure(engine: Engine, target: str, *, context: int, prompt: int, threads: int) -> Prediction:
    """Time the first token of a prompt, and tokens at the end of a context; the best of a few rounds. Raises ContextError."""
    if max(prompt, context) + 1 > engine.info.max_context:
        raise ContextError(f"the model was opened with a context of {engine.info.max_context} tokens; raise --context")
    first = first_token(engine, prompt)
    sequence = filled(engine, context)
    try:
        tokens = rate(engine, sequence, context)
        held = engine.memory()
    finally:
        engine.free_sequence(sequence)
    memory = Memory(held.weights_resident or held.weights_mapped, held.cache, held.compute, 0)
    return Prediction(
        target=target, threads=threads, prompt=prompt, context=context, first=first, first_bound="", first_cold=None, cold_bound=None,
        rate=tokens, rate_bound="", memory=memory, fits=True, energy=None, measured=True, basis="measured",
    )  # fmt: skip


def filled(engine: Engine, context: int) -> int:
    """A new sequence with so many cells."""
    sequence = engine.new_sequence()
    engine.step([SequenceBatch(sequence, _ids(engine, context))])
    return sequence


def first_token(engine: Engine, prompt: int) -> float:
    """Seconds from a prompt to its logits, in an empty context; the least of a few, or of one that takes long."""
    times: list[float] = []
    while len(times) < _ROUNDS + 1 and sum(times) < _LONG:
        sequence = engine.new_sequence()
        try:
            started = time.perf_counter()
            engine.step([SequenceBatch(sequence, _ids(engine, prompt))])
            times.append(time.perf_counter() - started)
        finally:
            engine.free_sequence(sequence)
    return min(times)


def rate(engine: Engine, sequence: int, context: int) -> float:
    """Tokens a second up to the end of a context, of which the sequence has at least that many cells; the most of a few rounds."""
    tokens = min(TOKENS, max(2, context))
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < _ROUNDS or time.perf_counter() - started < _SETTLED:
        engine.truncate(sequence, max(0, context - tokens))
        engine.step([SequenceBatch(sequence, [1])])  # wakes the threads, and builds the graph
        begun = time.perf_counter()
        for _ in range(tokens - 1):
            engine.step([SequenceBatch(sequence, [1])])
        times.append((time.perf_counter() - begun) / (tokens - 1))
    return 1.0 / min(times)


def _ids(engine: Engine, n: int) -> list[int]:
    """Tokens that differ; what they are does not change how long they take (of experts, nearly)."""
    return [(7 + 13 * i) % engine.info.n_vocab for i in range(n)]
