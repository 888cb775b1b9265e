"""Continuous batching: many requests on one engine, each step carrying the next tokens of as many as have some.

Who decodes gives one token a step (or a few, with drafts), who reads a prompt many. So that nobody waits long for another's prompt, the
prompt tokens of a step are limited while anyone decodes: to as many as make the step ``STRETCH`` times as long as one in which all who are
there decode. How long that is, is measured all the time. Turns are given by stride scheduling (Waldspurger and Weihl 1995): each request
has a clock that its tokens advance, the slower the more weight it has, and the ones furthest behind go first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from edge_rt.core.engine import SequenceBatch
from edge_rt.errors import Cancelled, OutOfMemory
from edge_rt.native.ggml import Rows
from edge_rt.types import PRIORITIES, Event

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from edge_rt.core.engine import Engine, Logits
    from edge_rt.core.generate.loop import GenerationSteps, Request

MAX_PARTS = 16
"""Requests in one step; the others wait a turn."""
STRETCH = 2.25
"""How much longer than with all decoding a step with prompt tokens may take while anyone decodes."""
WEIGHTS_COST = 3
"""Reading all weights takes a step about as long as the tokens of so many requests."""
LEAST = 4
"""Prompt tokens in a step, or tokens of other work between two, where ``STRETCH`` allows fewer: kernels take so many columns at once.
More come in multiples of it. Behind 2,000 cells eight are half as much again as ``STRETCH`` allows (135M, two threads).
"""
UTMOST = 2.75
"""Where even ``LEAST`` make a step this much longer, half as many come: waits of 4 times the usual are noticed, and steps scatter."""

Deliver = Callable[[Event], bool]
"""Takes an event of a request; whether it may go on at once. If not, it waits for ``Scheduler.resume``, unless it was cancelled: the few
events with which it ends are taken all the same."""


@dataclass(eq=False)
class Running:
    """A request under way. ``part`` is the step that it waits for, None while it is paused before that. ``logits``: its last ones."""

    job: Request
    steps: GenerationSteps[None]
    deliver: Deliver
    ended: Callable[[Exception | None], None]
    weight: float
    clock: float = 0.0
    part: SequenceBatch | None = None
    fed: int = 0
    paused: bool = False
    logits: Logits | None = None


class Scheduler:
    """All requests of one engine. Not thread-safe: one thread adds, steps and resumes."""

    def __init__(self, engine: Engine, lock: AbstractContextManager[object]) -> None:
        self._engine, self._lock = engine, lock
        self._running: list[Running] = []
        self._decoding: dict[int, float] = {}  # seconds of a step without prompt tokens, lately, by how many take part
        self._a_prompt_token = 0.0  # seconds that one adds
        self.expected: float | None = None
        """Seconds that the step under way should take, after those before it; None while there is none, or nothing to go by."""
        self._ahead = 0.0  # seconds that other work has had beyond its share

    def __len__(self) -> int:
        return len(self._running)

    def add(
        self,
        job: Request,
        steps: GenerationSteps[None],
        deliver: Deliver,
        ended: Callable[[Exception | None], None],
        priority: str = "normal",
    ) -> Running:  # fmt: skip
        """Take up a request, which ``Session.begin`` prepared. ``ended`` is called once, after the last event: with what went wrong, if
        anything did.
        """
        clock = min((one.clock for one in self._running), default=0.0)  # those who come later have nothing to make up for
        one = Running(job, steps, deliver, ended, PRIORITIES[priority], clock)
        self._running.append(one)
        self._advance(one, partial(next, steps))
        return one

    def resume(self, one: Running) -> None:
        """Its events can be taken again, or it was cancelled while they could not."""
        if one.paused and one in self._running:
            one.paused = False
            self._advance(one, partial(next, one.steps))

    def drop(self, one: Running) -> None:
        """End a request whose events nobody wants; nothing more is delivered."""
        if one in self._running:
            one.steps.close()
            self._over(one, None)

    def step(self) -> bool:
        """One step of the engine with the tokens of those who have some; False if nobody has."""
        self._stop_cancelled()
        chosen = self._choose()
        if not chosen:
            return False
        started = time.perf_counter()
        try:
            with self._lock:
                self.expected = self._expect(chosen)
                results = self._feed(chosen)
        except Exception:
            self.expected = None
            for one, part in chosen:
                self._alone(one, part)
            return True
        self.expected = None
        self._learn(chosen, time.perf_counter() - started)
        for (one, part), logits in zip(chosen, results, strict=True):
            self._took(one, part, logits)
        return True

    # ---- who is next -------------------------------------------------------------------------------------------------

    def _choose(self) -> list[tuple[Running, SequenceBatch]]:
        """Whose tokens the next step carries: the furthest behind first."""
        waiting = sorted((one for one in self._running if one.part is not None), key=lambda one: one.clock)
        decoding = [one for one in waiting if not _reads(one)]
        room = self._prompt_tokens() if decoding else self._engine.info.chunk
        chosen: list[tuple[Running, SequenceBatch]] = []
        for one in waiting:
            if len(chosen) == MAX_PARTS:
                break
            assert one.part is not None, "those who wait have one"
            rest = one.part.tokens[one.fed :]
            if _reads(one):
                if not room:
                    continue
                rest = rest[:room]
                room -= len(rest)
            left = len(one.part.tokens) - one.fed - len(rest)
            chosen.append((one, SequenceBatch(one.part.sequence, rest, "none" if left else one.part.logits, one.part.more + left)))
        # In the same order every time: an engine may keep what it built for a step of these sequences.
        return sorted(chosen, key=lambda entry: entry[1].sequence)

    def _prompt_tokens(self) -> int:
        """How many prompt tokens a step may carry while somebody decodes."""
        if not self._decoding or not self._a_prompt_token:
            return LEAST
        waiting = [one for one in self._running if one.part is not None]
        decoding = self._seconds(sum(not _reads(one) for one in waiting))
        most = min(self._engine.info.chunk, max(0, int((STRETCH * self._seconds(len(waiting)) - decoding) / self._a_prompt_token)))
        if decoding + LEAST * self._a_prompt_token > UTMOST * decoding:
            return LEAST // 2
        # Few different numbers: what the engine builds for a step then serves those after it.
        return max(LEAST, most - most % max(LEAST, 1 << max(0, most.bit_length() - 3)))

    def room(self) -> int:
        """Tokens that other work may feed to the engine now: while somebody decodes, about as many as a step may carry of prompts, and none
        as long as that work has taken more time than the steps.
        """
        if not self._somebody_decodes:
            return self._engine.info.chunk
        return 0 if self._ahead > 0 else max(LEAST, self._prompt_tokens())

    def waited(self, seconds: float) -> None:
        """Other work took so long since the last step."""
        self._ahead = self._ahead + seconds if self._somebody_decodes else 0.0

    def _seconds(self, n: int) -> float:
        """How long a step takes in which so many decode, after the nearest number that was seen; 0 before any was."""
        n = min(n, MAX_PARTS)
        if not n or not self._decoding:
            return 0.0
        seen = min(self._decoding, key=lambda other: (abs(other - n), other))
        return self._decoding[seen] * (WEIGHTS_COST + n) / (WEIGHTS_COST + seen)

    @property
    def _somebody_decodes(self) -> bool:
        return any(one.part is not None and not _reads(one) for one in self._running)

    def _learn(self, chosen: Sequence[tuple[Running, SequenceBatch]], seconds: float) -> None:
        """Note how long a step took (a moving average over about eight)."""
        self._ahead = max(0.0, self._ahead - seconds)
        prompt = sum(len(part.tokens) for one, part in chosen if _reads(one))
        decoding = sum(not _reads(one) for one, _ in chosen)
        if decoding and not prompt:
            before = self._decoding.get(decoding, seconds)
            self._decoding[decoding] = before + (seconds - before) / 8
        elif prompt:
            each = max(0.0, seconds - self._seconds(decoding)) / prompt
            self._a_prompt_token += (each - self._a_prompt_token) / (8 if self._a_prompt_token else 1)

    def _expect(self, chosen: Sequence[tuple[Running, SequenceBatch]]) -> float | None:
        """Seconds that a step should take, None if there was none of its kind."""
        prompt = sum(len(part.tokens) for one, part in chosen if _reads(one))
        if not self._decoding or (prompt and not self._a_prompt_token):
            return None
        return self._seconds(max(1, sum(not _reads(one) for one, _ in chosen))) + prompt * self._a_prompt_token

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _feed(self, chosen: Sequence[tuple[Running, SequenceBatch]]) -> list[Logits | None]:
        """One step of the engine. The lock is held."""
        results = self._engine.step([part for _, part in chosen])
        # One request's eviction may use the engine before the next has read its logits, and so may a session that is not in the batch.
        # Each copy is read before the same request takes another step.
        for (one, _), logits in zip(chosen, results, strict=True):
            if logits is not None:
                one.logits = logits.copy(one.logits) if isinstance(logits, Rows) and isinstance(one.logits, Rows) else logits.copy()
        return [None if logits is None else one.logits for (one, _), logits in zip(chosen, results, strict=True)]

    def _alone(self, one: Running, part: SequenceBatch) -> None:
        """A step failed: each request takes its own, and the one whose fault it is fails."""
        try:
            with self._lock:
                if self._engine.length(part.sequence) != one.job.history.cells + one.fed:
                    raise OutOfMemory("a step that failed left a part of its tokens behind; ask again")
                try:
                    (logits,) = self._feed([(one, part)])
                except OutOfMemory:
                    if self._engine.length(part.sequence) != one.job.history.cells + one.fed or not one.job.relieve():
                        raise
                    (logits,) = self._feed([(one, part)])
        except Exception as error:  # it is the loop's affair, as if it had taken the step
            self._advance(one, partial(one.steps.throw, error))
        else:
            self._took(one, part, logits)

    def _took(self, one: Running, part: SequenceBatch, logits: Logits | None) -> None:
        """A request's tokens were fed."""
        assert one.part is not None, "it had a step to take"
        one.clock += len(part.tokens) / one.weight
        one.fed += len(part.tokens)
        if one.fed == len(one.part.tokens):
            self._advance(one, partial(one.steps.send, logits))

    def _stop_cancelled(self) -> None:
        """Who was cancelled while its tokens are being fed need not wait for the rest of them."""
        for one in [one for one in self._running if one.part is not None and one.job.cancelled()]:
            if one.fed:
                with self._lock:
                    self._engine.truncate(one.part.sequence, one.job.history.cells)  # type: ignore[union-attr]
            self._advance(one, partial(one.steps.throw, Cancelled("the request was cancelled")))

    def _advance(self, one: Running, go_on: Callable[[], Event | SequenceBatch]) -> None:
        """Run a request's own code up to its next step, and deliver its events. The step that it waited for is over."""
        one.part, one.fed = None, 0
        while True:
            try:
                made = go_on()
            except StopIteration:
                return self._over(one, None)
            except Exception as error:
                return self._over(one, error)
            if isinstance(made, SequenceBatch):
                one.part = made
                return
            if not one.deliver(made) and not one.job.cancelled():
                one.paused = True
                return
            go_on = partial(next, one.steps)

    def _over(self, one: Running, error: Exception | None) -> None:
        """A request has ended. Its logits go at once: a row is a MB for a large vocabulary, and who asked may keep ``one``."""
        self._running.remove(one)
        one.logits = None
        one.ended(error)


def _reads(one: Running) -> bool:
    """Whether a request is reading its prompt, or what eviction made the engine forget."""
    return one.part is not None and one.part.logits != "all"
