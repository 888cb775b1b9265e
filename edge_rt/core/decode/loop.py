"""The decode loop: prompt in, events out. Sampling, text and speculation are handed in; this file only orders them.

Exactness of speculation: drafts are fed together with the last token, then sampled strictly in sequence from the rows of that one
step. A draft counts only if the sampler chose it, so tokens, random numbers and text are those of plain decoding, provided the
engine's rows are bit-identical to single steps; ``Engine.exact_rows`` proves how many are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge_rt.core.engine import Engine, Part, Wanted
from edge_rt.errors import Cancelled, OutOfMemory
from edge_rt.types import ContextUse, Delta, Done, Event, FinishReason, Notice, PromptProgress, Timings, TokenLogprob, Usage

if TYPE_CHECKING:
    from edge_rt.core.assemble.writer import Writer
    from edge_rt.core.decode.sampling import Sampler
    from edge_rt.core.decode.speculation import NgramDrafter
    from edge_rt.core.engine import Logits, Row
    from edge_rt.native.llama import Vocab


@dataclass(slots=True)
class Job:
    """One request, ready to run.

    ``fed`` are the tokens in the sequence's cells and is kept true throughout, whatever ends the job; it starts as the reused
    beginning of ``prompt`` (always shorter than it). ``lock`` is held for each step and no longer. ``cancelled`` is asked between steps.
    ``relieve`` is asked for memory when a step finds none, and says whether it could free any.
    """

    engine: Engine
    lock: AbstractContextManager[object]
    vocab: Vocab
    sequence: int
    fed: list[int]
    prompt: Sequence[int]
    sampler: Sampler
    writer: Writer
    max_tokens: int
    drafter: NgramDrafter | None = None
    speculate: int = 0
    logprobs: int = 0
    ignore_eos: bool = False
    policy: str = "refuse"
    cancelled: Callable[[], bool] = lambda: False
    relieve: Callable[[], bool] = lambda: False
    started: float = field(default_factory=time.perf_counter)
    completion: int = 0
    drafted: int = 0
    accepted: int = 0


def generate(job: Job) -> Iterator[Event]:
    """Run a job. The last event is always Done. Raises what the engine, the sampler and post-processors raise."""
    reused, first = len(job.fed), 0.0
    reason: FinishReason | None = None
    prompt_done = job.started
    try:
        rows = yield from _prefill(job)
        prompt_done = time.perf_counter()
        drafts: list[int] = []
        while reason is None:
            base = len(job.fed) - len(drafts)  # cells whose tokens are certain
            for i in range(len(rows)):
                token = job.sampler.sample(rows[i])
                job.sampler.accept(token)
                first = first or time.perf_counter()
                reason, delta = _emit(job, token, rows[i])
                if delta is not None:
                    yield delta
                if reason is not None or i == len(drafts) or token != drafts[i]:
                    break
                base += 1
                job.accepted += 1
            _keep(job, base)
            if reason is None and len(job.fed) >= job.engine.info.max_context:
                reason = "context_full"
            if reason is None:
                drafts = _draft(job, token)
                rows = _rows(job, [token, *drafts])
    except Cancelled:
        reason = "cancelled"
    if rest := job.writer.finish():
        yield Delta(rest)
    for message in job.writer.notices:
        yield Notice(message)
    now = time.perf_counter()
    first = first or now
    yield Done(
        reason=reason,
        usage=Usage(len(job.prompt), job.completion, reused, job.drafted, job.accepted),
        timings=Timings(first - job.started, prompt_done - job.started, now - first),
        context=ContextUse(len(job.fed), job.engine.info.max_context, job.policy),
        seed=job.sampler.seed,
        stop=job.writer.stop,
    )


def _prefill(job: Job) -> Generator[Event, None, Logits]:
    """Feed the prompt chunk by chunk; returns the logits of its last token."""
    total, reused, chunk = len(job.prompt), len(job.fed), job.engine.info.chunk
    while True:
        rest = job.prompt[len(job.fed) : len(job.fed) + chunk]
        last = len(job.fed) + len(rest) == total
        logits = _step(job, rest, "last" if last else "none")
        yield PromptProgress(len(job.fed), total, reused)
        if logits is not None:
            return logits


def _rows(job: Job, tokens: Sequence[int]) -> Logits:
    """One step with logits of every token."""
    rows = _step(job, tokens, "all")
    assert rows is not None, "logits of all tokens were asked for"
    return rows


def _step(job: Job, tokens: Sequence[int], wanted: Wanted) -> Logits | None:
    """One engine step; ``job.fed`` follows it."""
    if job.cancelled():
        raise Cancelled("the request was cancelled")
    with job.lock:
        part = Part(job.sequence, tokens, wanted)
        try:
            (logits,) = job.engine.step([part])
        except OutOfMemory:
            if job.engine.length(job.sequence) != len(job.fed) or not job.relieve():
                raise
            (logits,) = job.engine.step([part])
        # The engine's logits live until its next step, which another session may take as soon as the lock is free.
        kept = None if logits is None else logits.copy()
    job.fed.extend(tokens)
    return kept


def _emit(job: Job, token: int, logits: Row) -> tuple[FinishReason | None, Delta | None]:
    """Count a sampled token and turn it into text; the reason if it was the last."""
    if job.vocab.is_eog(token) and not job.ignore_eos:
        return "end_of_generation", None
    job.completion += 1
    if job.drafter is not None:
        job.drafter.extend([token])
    text = job.writer.feed(token)
    scores: tuple[TokenLogprob, ...] = ()
    if job.logprobs:
        from edge_rt.core.decode.logprobs import token_logprobs

        own, top = token_logprobs(logits, token, job.logprobs)
        scores = (TokenLogprob(token, job.vocab.piece(token).decode(errors="replace"), own, top),)
    delta = Delta(text, (token,), scores)
    if job.writer.stop is not None:
        return "stop_string", delta
    if job.completion >= job.max_tokens:
        return "max_tokens", delta
    return None, delta


def _keep(job: Job, cells: int) -> None:
    """Forget cells of drafts that were not accepted."""
    if cells < len(job.fed):
        with job.lock:
            job.engine.truncate(job.sequence, cells)
        del job.fed[cells:]


def _draft(job: Job, token: int) -> list[int]:
    """Tokens likely to follow, within what the context, the request and the engine's exactness allow."""
    if job.drafter is None:
        return []
    room = job.engine.info.max_context - len(job.fed) - 1
    most = min(job.speculate, room, job.max_tokens - job.completion - 1)
    drafts = job.drafter.draft(most) if most > 0 else []
    job.drafted += len(drafts)
    return drafts
