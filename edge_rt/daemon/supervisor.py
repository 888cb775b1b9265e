"""Keeps a worker process: starts it, starts it again when it died, ends it when it hangs."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from edge_rt.daemon.frames import Message
from edge_rt.daemon.process import Ended, Process, Took
from edge_rt.errors import ProtocolError

FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0
"""Seconds until a worker that died is started again: doubling while it dies before it has served anybody."""
GIVES_UP_AFTER = 5
"""Deaths in a row without anybody served; then it is started for a request, and at most every ``LONGEST_DELAY`` seconds."""

PATIENCE, LEAST_PATIENCE = 100.0, 10.0
"""A step may take so many times as long as such steps did before, and so many seconds in any case: neighbours may be busy."""

UNLOADED = Ended("unloaded", "the model was unloaded; load one with load_model")


class Spec(NamedTuple):
    """What a worker is to open. ``options``: keywords of ``edge_rt.open``. ``rules``: a file."""

    model: str
    options: dict[str, Any]
    rules: str | None = None


class Supervisor:
    """At most one worker, which has at most one model for all its life.

    ``state``: ``none`` (no model was asked for), ``starting``, ``ready``, ``waiting`` (for its start), ``failed`` (it gave up).
    ``reason`` is of the last two. ``epoch`` counts lives: what a worker held is gone in the next.
    """

    def __init__(
        self, hung_after: float, changed: Callable[[], None], told: Callable[[Message], None], grant: Callable[[], Message],
    ) -> None:  # fmt: skip
        """``told``: takes what the worker says of its memory and sessions. ``grant``: what each is opened with, beside the model."""
        self.state, self.reason, self.epoch, self.deaths = "none", "", 0, 0
        self.phase: Message = {}
        self.model: Message | None = None
        self.rules: Message | None = None
        self._hung_after, self._changed, self._tell_others, self._grant = hung_after, changed, told, grant
        self.spec: Spec | None = None
        self._process: Process | None = None
        self._numbers = itertools.count(1)
        self._held: list[tuple[int, Message, Took | None]] = []
        self._failures, self._served = 0, False
        self._failure = Ended("worker_died", "")
        self._retry: asyncio.TimerHandle | None = None
        self._started = float("-inf")
        self._watch: asyncio.TimerHandle | None = None
        self._beats, self._moved = -1, 0.0
        self._expected: float | None = None

    @property
    def pid(self) -> int | None:
        """Of the worker, None while there is none."""
        return self._process.pid if self._process else None

    def status(self) -> Message:
        """What is the case now."""
        return {"state": self.state, "reason": self.reason, "pid": self.pid, "deaths": self.deaths, **self.phase}

    # ---- commands ----------------------------------------------------------------------------------------------------

    def call(self, command: Message, took: Took) -> int:
        """Send a command, perhaps after a start of the worker; returns its number. Raises ProtocolError if there is none to be had."""
        if self.spec is None:
            raise ProtocolError("no_model", "no model is loaded; load one with load_model")
        if self.state == "failed":
            if _now() - self._started < LONGEST_DELAY:
                raise ProtocolError(self._failure.code, self._failure.message)
            self._start()
            if self._process is None:
                raise ProtocolError(self._failure.code, self._failure.message)
        number = next(self._numbers)
        if (process := self._living) is None:
            self._held.append((number, command, took))
        else:
            self._send(process, number, command, took)
        return number

    def tell(self, command: Message) -> None:
        """Send a command that has no answer. A worker that is gone need not know; the next does, where more is held for it."""
        if (process := self._living) is not None:
            process.tell(command)
        elif self._held:
            self._held.append((0, command, None))

    def cancel(self, number: int, *, drop: bool = False) -> None:
        """End a generation. ``drop``: nobody wants the rest of its events."""
        if not self.withdraw(number):
            self.tell({"op": "drop" if drop else "cancel", "request": number})

    def withdraw(self, number: int) -> bool:
        """Answer a command that waits for a worker with ``cancelled``; False if it does not wait."""
        for one in self._held:
            if one[0] == number and one[2] is not None:
                self._held.remove(one)
                one[2]({"error": {"code": "cancelled", "message": "the request was cancelled before it began"}})
                return True
        return False

    @property
    def _living(self) -> Process | None:
        """The worker, None if there is none, or one whose end is only not yet understood."""
        return None if self._process is None or self._process.over else self._process

    def _send(self, process: Process, number: int, command: Message, took: Took | None) -> None:
        if took is None:
            process.tell(command)
            return
        if not process.pending:
            self._moved = _now()
        process.call(number, command, partial(self._answered, took))
        if self._watch is None:
            self._watch = _loop().call_later(self._interval, self._look)

    def _answered(self, took: Took, message: Message) -> None:
        self._moved = _now()
        if "ok" in message:
            self._served, self._failures = True, 0
        took(message)

    # ---- lives -------------------------------------------------------------------------------------------------------

    def load(self, spec: Spec) -> None:
        """Start a worker with this model; there must be none."""
        assert self._process is None, "unload comes first"
        self.spec, self._failures = spec, 0
        self._start()

    def expect(self, spec: Spec, why: str) -> None:
        """Hold commands until ``load``: the model is going to be loaded, and waits for something."""
        self.spec = spec
        self._set("waiting", why)

    async def unload(self, why: Ended = UNLOADED) -> None:
        """End the worker; what it is at gets an error."""
        process, self._process = self._process, None
        self.abandon(why)
        if process is not None:
            await process.stop(why)

    def abandon(self, why: Ended = UNLOADED) -> None:
        """There is no worker, and will be none before ``load``: what waits for one gets an error."""
        assert self._process is None, "it is ended by unload"
        self.spec, self.model = None, None
        self.epoch += 1  # what sessions have in the worker goes with it
        self._set("none")
        self._forget_timers()
        self._fail_held(why)

    def _start(self) -> None:
        assert self.spec is not None, "a worker is started for a model"
        self._retry, self._served, self._started = None, False, _now()
        self.phase = {"phase": "starting", "done": 0, "total": 0}
        try:
            self._process = process = Process(self._told, self._ended)
        except OSError as error:
            self._died(Ended("worker_died", f"the worker cannot be started: {(error.strerror or str(error)).lower()}"))
            return
        self._set("starting")
        opening = {"op": "open", **self.spec._asdict(), **self._grant()}
        self._moved = _now()
        process.call(0, opening, self._opened)
        held, self._held = self._held, []
        for number, command, took in held:
            self._send(process, number, command, took)
        if self._watch is None:
            self._watch = _loop().call_later(self._interval, self._look)

    def _opened(self, message: Message) -> None:
        """The model is open, or cannot be."""
        if "ok" in message:
            self.model, self.phase = message["ok"], {"phase": "ready", "done": 0, "total": 0}
            self._set("ready")
        elif self._process is not None:
            error = message["error"]
            self._failure = Ended(error["code"], error["message"])
            self._failures = GIVES_UP_AFTER  # a file that is wrong does not mend itself
            self._process.kill(self._failure)

    def _told(self, message: Message) -> None:
        """What the worker says of itself."""
        if "phase" in message:
            self._moved = _now()
            if self.state == "starting":
                self.phase = message
            elif message["phase"] == "prefetch":  # which goes on behind the first answers
                self.phase = {**message, "phase": "ready"}
        elif "rules" in message:
            self.rules = message["rules"]
        elif "beats" in message:
            self._expected = message["expected"]
            if message["idle"] or message["beats"] != self._beats:
                self._beats, self._moved = message["beats"], _now()
        else:
            self._tell_others(message)

    def _ended(self, process: Process, how: Ended) -> None:
        if process is self._process:
            self._process = None
            if self.spec is not None:
                self._died(how)

    def _died(self, how: Ended) -> None:
        """Start it again, later; or give up."""
        self.epoch += 1
        self.deaths += 1
        self.model = None
        self._failures = 0 if self._served else self._failures + 1
        if self._failures >= GIVES_UP_AFTER:
            self._failure = how
            self._set("failed", how.message)
            self._fail_held(how)
            return
        self._set("waiting", how.message)
        self._retry = _loop().call_later(min(LONGEST_DELAY, FIRST_DELAY * 2**self._failures), self._start)

    def _fail_held(self, how: Ended) -> None:
        held, self._held = self._held, []
        for took in [took for _, _, took in held if took is not None]:
            took({"error": how.error})

    def _set(self, state: str, reason: str = "") -> None:
        self.state, self.reason = state, reason
        if state not in ("starting", "ready"):
            self.phase = {}
        self._changed()

    # ---- the watchdog ------------------------------------------------------------------------------------------------

    @property
    def _interval(self) -> float:
        return min(1.0, self._hung_after / 4)

    def _look(self) -> None:
        """Ask whether anything moves, while anything should."""
        self._watch = None
        process = self._process
        if process is None or not process.pending:
            return
        patience = patience_with(self._expected, self._hung_after)
        if _now() - self._moved > patience:
            process.kill(Ended("worker_hung", f"nothing moved in the worker for {patience:.3g} seconds, and it was ended; ask again"))
            return
        self._expected = None  # until it answers
        process.tell({"op": "ping"})
        self._watch = _loop().call_later(self._interval, self._look)

    def _forget_timers(self) -> None:
        for timer in (self._retry, self._watch):
            if timer is not None:
                timer.cancel()
        self._retry = self._watch = None


def patience_with(expected: float | None, hung_after: float) -> float:
    """Seconds that nothing may move in a worker. ``expected``: that the engine's step under way should take, None if it is at
    something else, or does not answer.
    """
    return hung_after if expected is None else min(hung_after, max(LEAST_PATIENCE, PATIENCE * expected))


def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def _now() -> float:
    return _loop().time()
