"""Memory that runs out while a sequence is read: what can be freed is, and the work is tried once more."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from edge_rt.core.engine import Engine, SequenceBatch, Wanted
from edge_rt.errors import Cancelled, ContextOverflow, OutOfMemory
from edge_rt.types import Delta, Done, Event, FinishReason, Notice, PromptProgress, Timings, TokenLogprob, Usage

if TYPE_CHECKING:
    from edge_rt.core.context.history import SequenceState
    from edge_rt.core.context.manager import ContextManager
    from edge_rt.core.engine import Logits, Row
    from edge_rt.core.generate.output import OutputStream
    from edge_rt.core.generate.sampler import Sampler
    from edge_rt.core.generate.speculative import NgramDrafter
    from edge_rt.native.llama import Vocab

_T = TypeVar("_T")
FreeMemory = Callable[[], bool]
"""Frees memory, if it can; whether it did."""


def retry_after_freeing(relieve: FreeMemory, work: Callable[[], _T], untouched: Callable[[], bool] = lambda: True) -> _T:
    """What ``work`` gives, tried again where memory could be freed and the first attempt has left nothing behind (``untouched``)."""
    try:
        return work()
    except OutOfMemory:
        if not untouched() or not relieve():
            raise
        return work()


# The decode loop: prompt in, events out. Sampling, text and speculation are handed in; this file only orders them.
#
# The loop takes no steps itself: it says which it needs (``steps``), and whoever drives it takes them, for one request (``alone``) or for
# many at once (batch.py).
#
# Exactness of speculation: drafts are fed together with the last token, then sampled strictly in sequence from the rows of that one
# step. A draft counts only if the sampler chose it, so tokens, random numbers and text are those of plain decoding, provided the
# engine's rows are bit-identical to single steps; ``Engine.exact_rows`` proves how many are.


@dataclass(slots=True)
class Request:
    """One request, ready to run.

    ``window`` was made to fit; its history says what is in the sequence's cells and is kept true throughout, whatever ends the job.
    It starts with the whole prompt, of which at least one token is still to be fed. ``max_tokens`` None: as many as the window has
    cells. ``lock`` is held for each step and no longer. ``cancelled`` is asked between steps.
    ``relieve`` is asked for memory when a step finds none, and says whether it could free any. ``news``: what is to be said of the engine.
    """

    engine: Engine
    lock: AbstractContextManager[object]
    vocab: Vocab
    window: ContextManager
    sampler: Sampler
    writer: OutputStream
    max_tokens: int | None
    drafter: NgramDrafter | None = None
    speculate: int = 0
    logprobs: int = 0
    ignore_eos: bool = False
    cancelled: Callable[[], bool] = lambda: False
    relieve: Callable[[], bool] = lambda: False
    news: Callable[[], Sequence[str]] = tuple
    started: float = field(default_factory=time.perf_counter)
    completion: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def history(self) -> SequenceState:
        """What was said, and what of it is in the cells."""
        return self.window.history


GenerationSteps = Generator["Event | SequenceBatch", "Logits | None", "_T"]
"""Gives events and parts of steps; for a part it is sent the logits asked for, which it is done with when it gives the next."""


def run_single(job: Request, running: GenerationSteps[None]) -> Generator[Event, None, None]:
    """Take a job's steps for it alone: its events. Raises what the engine and ``running`` raise."""
    go_on: Callable[[], Event | SequenceBatch] = partial(next, running)
    while True:
        try:
            made = go_on()
        except StopIteration:
            return
        if not isinstance(made, SequenceBatch):
            yield made
            go_on = partial(next, running)
            continue
        try:
            go_on = partial(running.send, _step(job, made))
        except Exception as error:  # it is the loop's affair, as if it had taken the step
            go_on = partial(running.throw, error)


def generate_steps(job: Request) -> GenerationSteps[None]:
    """A job step by step. The last event is always Done. Raises what the sampler, the policy and post-processors raise."""
    history, reused, first = job.history, job.history.kept(job.history.fed), 0.0
    computed = history.kept(len(history.tokens)) - reused
    reason: FinishReason | None = None
    prompt_done = job.started
    try:
        rows = yield from _prefill(job)
        prompt_done = time.perf_counter()
        drafts: list[int] = []
        while reason is None:
            certain = len(history.tokens) - len(drafts)
            for i in range(len(rows)):
                token = job.sampler.sample(rows[i])
                job.sampler.accept(token)
                first = first or time.perf_counter()
                reason, delta = _emit(job, token, rows[i])
                if delta is not None:
                    yield delta
                if reason is not None or i == len(drafts) or token != drafts[i]:
                    break
                certain += 1
                job.accepted += 1
            _keep(job, certain)
            if reason is None and history.cells >= job.window.allowed and not job.window.make_room():
                reason = "context_full"
            if reason is None:
                drafts = _draft(job, token)
                try:
                    rows = yield from _rows(job, [token, *drafts])
                except ContextOverflow:  # no position is left, and nothing can leave
                    reason = "context_full"
        job.window.ready(0, job.completion)  # nor does a short answer leave more cells than pruning allows
    except Cancelled:
        reason = "cancelled"
    history.truncate(history.fed)
    if rest := job.writer.finish(whole=reason == "end_of_generation"):
        yield Delta(rest)
    pipeline = job.writer.pipeline
    for message in (*pipeline.notices, job.window.notice(quote=not pipeline.conceals), *job.news()):
        if message:
            yield Notice(message)
    now = time.perf_counter()
    first = first or now
    yield Done(
        reason=reason,
        usage=Usage(job.window.prompt, job.completion, reused, job.drafted, job.accepted, computed),
        timings=Timings(first - job.started, prompt_done - job.started, now - first),
        context=job.window.use(),
        seed=job.sampler.seed,
        stop=job.writer.stop,
        post=pipeline.use(),
        rules=pipeline.rules,
        answer=pipeline.text,
    )


def _prefill(job: Request) -> GenerationSteps[Logits]:
    """Feed the prompt chunk by chunk; returns the logits of its last token."""
    total, reused = job.history.kept(len(job.history.tokens)), job.history.kept(job.history.fed)
    while True:
        logits = yield from _chunk(job, "last")
        yield PromptProgress(total - _coming(job.history), total, reused)
        if logits is not None:
            return logits


def _chunk(job: Request, wanted: Wanted) -> GenerationSteps[Logits | None]:
    """Feed the next tokens of the history that are not in cells; logits as wanted if they are the last."""
    history = job.history
    coming = job.window.ready(min(job.engine.info.chunk, _coming(history)))
    job.window.settle(coming)  # it may want more to be fed than before
    tokens, end = history.pending(coming)
    more = min(_coming(history), job.window.held - history.cells) - len(tokens)
    logits = yield _part(job, tokens, wanted if end == len(history.tokens) else "none", max(0, more))
    history.advance(end)
    return logits


def _coming(history: SequenceState) -> int:
    """Tokens that are still to be fed."""
    return history.kept(len(history.tokens)) - history.kept(history.fed)


def _rows(job: Request, tokens: Sequence[int]) -> GenerationSteps[Logits]:
    """One step with logits of every token, after what eviction made the engine forget has been fed again."""
    job.window.ready(len(tokens), job.completion)
    job.window.settle(len(tokens))
    while job.history.fed < len(job.history.tokens):
        yield from _chunk(job, "none")
    started = time.perf_counter()
    rows = yield _part(job, tokens, "all")
    if job.drafter is not None:
        job.drafter.took(len(tokens), time.perf_counter() - started)
    job.history.append(tokens)
    assert rows is not None, "logits of all tokens were asked for"
    return rows


def _part(job: Request, tokens: Sequence[int], wanted: Wanted, more: int = 0) -> SequenceBatch:
    """What a step is to feed; the history is to follow it. Raises Cancelled."""
    if job.cancelled():
        raise Cancelled("the request was cancelled")
    return SequenceBatch(job.window.sequence, tokens, wanted, more)


def _step(job: Request, part: SequenceBatch) -> Logits | None:
    """One engine step for this job alone."""
    with job.lock:
        try:
            (logits,) = job.engine.step([part])
        except OutOfMemory:
            if job.engine.length(job.window.sequence) != job.history.cells or not job.relieve():
                raise
            (logits,) = job.engine.step([part])
        # The engine's logits live until its next step, which another session may take as soon as the lock is free.
        return None if logits is None else logits.copy()


def _emit(job: Request, token: int, logits: Row) -> tuple[FinishReason | None, Delta | None]:
    """Count a sampled token and turn it into text; the reason if it was the last."""
    if job.vocab.is_eog(token) and not job.ignore_eos:
        return "end_of_generation", None
    job.completion += 1
    if job.drafter is not None:
        job.drafter.extend([token])
    text = job.writer.feed(token)
    scores: tuple[TokenLogprob, ...] = ()
    if job.logprobs:
        from edge_rt.core.generate.scoring import token_logprobs

        own, top = token_logprobs(logits, token, job.logprobs)
        scores = (TokenLogprob(token, job.vocab.piece(token).decode(errors="replace"), own, top),)
    delta = Delta(text, (), scores, 1) if job.writer.pipeline.conceals else Delta(text, (token,), scores)
    if job.writer.stop is not None:
        return "stop_string", delta
    if job.max_tokens is not None and job.completion >= job.max_tokens:
        return "max_tokens", delta
    if job.completion >= job.window.allowed and job.max_tokens is None:
        return "context_full", delta
    return None, delta


def _keep(job: Request, certain: int) -> None:
    """Forget drafts that were not accepted: all tokens but the first ``certain``."""
    if certain < len(job.history.tokens):
        job.window.forget(certain)


def _draft(job: Request, token: int) -> list[int]:
    """Tokens likely to follow, within what the context, the request and the engine's exactness allow."""
    if job.drafter is None:
        return []
    room = job.window.room() - 1
    most = min(job.speculate, room, (job.max_tokens or job.window.allowed) - job.completion - 1)
    drafts = job.drafter.draft(most) if most > 0 else []
    job.drafted += len(drafts)
    return drafts
