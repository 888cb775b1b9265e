"""Sends the requests of a trace to a target, at their times or so many at once, and notes what becomes of each."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from edge_rt_distill.data.answers import Answer
from edge_rt_distill.data.checks import worth
from edge_rt_distill.replay.live import Tally
from edge_rt_distill.replay.results import Outcome
from edge_rt_distill.replay.talks import Talks
from edge_rt_distill.replay.targets import Ending, Failed, Question, Target
from edge_rt_distill.replay.trace import Request

AWAY = 30.0
"""Seconds for which a client of a closed loop stays away at most, when a server asks it to (Retry-After)."""
BY_ITSELF = ("stop", "tool_calls")
"""Reasons of an answer that the model ended by itself."""


class Load(NamedTuple):
    """``concurrency``: so many clients, each of which asks again when its request has ended, and stays away first if the server asks it
    to; None: each request at its time in the trace, ``speed`` times as fast. ``timeout``: seconds after which a request has failed.
    """

    concurrency: int | None = None
    speed: float = 1.0
    timeout: float = 300.0

    def __str__(self) -> str:
        return f"open x{self.speed:g}" if self.concurrency is None else f"closed {self.concurrency}"


class Driven(NamedTuple):
    """``outcomes`` in the order of the trace. If the run was stopped early, ``unfinished`` requests were under way, and ``unsent`` not
    asked yet; of neither is there an outcome. ``messages``: of the first error with each code."""

    outcomes: tuple[Outcome, ...]
    unfinished: int
    unsent: int
    messages: Mapping[str, str]


class Driver:
    """One run; ``drive`` it once. Moments are seconds after its begin."""

    def __init__(self, requests: Sequence[Request], target: Target, load: Load, tally: Tally) -> None:
        self._requests, self._target, self._load, self._tally = requests, target, load, tally
        self._talks = Talks(requests)
        self._ended = [asyncio.Event() for _ in requests]
        self._outcomes: dict[int, Outcome] = {}
        self._messages: dict[str, str] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._one_ended = asyncio.Event()
        self._wrong: BaseException | None = None
        self._begun = time.perf_counter()

    def now(self) -> float:
        """Seconds since the begin, to the microsecond."""
        return round(time.perf_counter() - self._begun, 6)

    async def drive(self) -> Driven:
        """Send everything. Ctrl-C stops it: then nothing more is sent, and what is under way is left. A second one ends the program.

        Raises what is no affair of a single request.
        """
        loop = asyncio.get_running_loop()
        self._begun = time.perf_counter()
        sending = loop.create_task(self._send())
        stopped = False

        def stop() -> None:
            nonlocal stopped
            stopped = True
            loop.remove_signal_handler(signal.SIGINT)
            sending.cancel()

        loop.add_signal_handler(signal.SIGINT, stop)
        try:
            await sending
        except asyncio.CancelledError:
            if not stopped:
                raise
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
        done = tuple(self._outcomes[number] for number in sorted(self._outcomes))
        return Driven(done, self._tally.sent - len(done), len(self._requests) - self._tally.sent, self._messages)

    # ---- when ------------------------------------------------------------------------------------------------------------------------

    async def _send(self) -> None:
        await (self._on_time() if self._load.concurrency is None else self._so_many(self._load.concurrency))
        while self._running:
            await self._wait()
        self._raise_wrong()

    async def _on_time(self) -> None:
        """Open loop: each at its time, whatever became of those before."""
        first = self._requests[0].at
        for number, request in enumerate(self._requests):
            due = round((request.at - first) / self._load.speed, 6)
            while (left := due - self.now()) > 0:
                await self._wait(left)
            self._start(number, due)

    async def _so_many(self, concurrency: int) -> None:
        """Closed loop: whenever fewer than so many are under way, the first whose turn it is."""
        waiting = list(range(len(self._requests)))
        while waiting:
            ready = next((number for number in waiting if self._may_follow(number)), None)
            if ready is None or len(self._running) >= concurrency:
                await self._wait()
                continue
            waiting.remove(ready)
            self._start(ready, self.now())

    def _may_follow(self, number: int) -> bool:
        return number not in self._talks.before or self._ended[self._talks.before[number]].is_set()

    def _start(self, number: int, due: float) -> None:
        task = asyncio.get_running_loop().create_task(self._in_turn(number, due))
        self._running.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            self._wrong = self._wrong or task.exception()
        self._one_ended.set()

    async def _wait(self, within: float | None = None) -> None:
        """Until a request ends, or for so many seconds. Raises what no request should."""
        self._one_ended.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._one_ended.wait(), within)
        self._raise_wrong()

    def _raise_wrong(self) -> None:
        if self._wrong is not None:
            raise self._wrong

    # ---- one request -----------------------------------------------------------------------------------------------------------------

    async def _in_turn(self, number: int, due: float) -> None:
        """Ask when the turn before is answered: a client cannot go on sooner, so it is not due sooner."""
        if (before := self._talks.before.get(number)) is not None:
            await self._ended[before].wait()
            due = max(due, self._outcomes[before].ended)
        question = self._talks.question(number)
        self._tally.sent += 1
        outcome, away = await self._asked(number, due, question)
        self._outcomes[number] = outcome
        self._talks.answered(question, outcome)
        self._tally.ended(outcome)
        self._ended[number].set()
        if self._load.concurrency is not None and self._tally.sent < len(self._requests):
            await asyncio.sleep(min(away, AWAY))  # its place stays taken: each place is a client

    async def _asked(self, number: int, due: float, question: Question) -> tuple[Outcome, float]:
        """What becomes of a request, and for how many seconds its client is to stay away."""
        request, sent = self._requests[number], self.now()
        heard = _Heard(sent, self.now, self._tally)
        leaves = request.cancel_after is not None and request.cancel_after < self._load.timeout
        status, code, ending, away = "ok", "", Ending(""), 0.0
        try:
            ending = await asyncio.wait_for(self._target.ask(question, heard), request.cancel_after if leaves else self._load.timeout)
        except asyncio.TimeoutError:
            status, code = ("cancelled", "") if leaves else ("error", "timeout")
        except Failed as error:
            status, code, away = "error", error.code, error.wait
            self._messages.setdefault(error.code, str(error))
        text = "".join(heard.texts)
        passed = worth(request.checks, Answer(text, ending.finish_reason in BY_ITSELF)) if status == "ok" and request.checks else None
        outcome = Outcome(
            number, due, sent, self.now(), status, code, ending.finish_reason, text, tuple(heard.moments), heard.tokens(ending),
            ending.prompt_tokens, ending.prompt_seconds, passed,
        )  # fmt: skip
        return outcome, away


class _Heard:
    """What was heard of one answer so far; called with every piece."""

    def __init__(self, sent: float, now: Callable[[], float], tally: Tally) -> None:
        self._last, self._now, self._tally = sent, now, tally
        self.texts: list[str] = []
        self.moments: list[float] = []
        self._counts: list[int] = []
        self._told = 0
        """How many tokens the target said that there are; while it says nothing, a piece is taken for one."""

    def __call__(self, text: str, total: int | None) -> None:
        at = self._now()
        count = 1 if total is None else max(0, total - self._told)
        self._tally.piece(at, count, at - self._last, first=not self.moments)
        self._last, self._told = at, total or 0
        self.texts.append(text)
        self.moments.append(at)
        self._counts.append(count)

    def tokens(self, ending: Ending) -> tuple[int, ...]:
        """Of each piece. Where only the sum is told, it is spread evenly; what came after the last piece, as an end has no text, is its."""
        pieces, total = len(self._counts), ending.completion_tokens
        if not pieces or total is None:
            return tuple(self._counts)
        if self._told:
            return (*self._counts[:-1], self._counts[-1] + max(0, total - sum(self._counts)))
        return tuple(total * (place + 1) // pieces - total * place // pieces for place in range(pieces))
