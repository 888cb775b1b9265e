"""Runs the worker process of one model: starts it, passes commands and answers, starts it again when it died, ends it when it hangs."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple, cast

from edge_rt.daemon.protocol import FrameReader, Message, pack
from edge_rt.errors import ProtocolError

ReplyHandler = Callable[[Message], None]  # takes the answer to a command: any number of events, then ``{"ok": ...}`` or ``{"error": ...}``

FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0
"""Seconds until a worker that died is started again: doubling while it dies before it has served anybody."""
GIVES_UP_AFTER = 5  # deaths in a row without anybody served; then it is started for a request, and at most every ``LONGEST_DELAY`` seconds
STEP_FACTOR, MIN_HANG_SECONDS = 100.0, 10.0
"""A step may take so many times as long as such steps did before, and so many seconds in any case: neighbours may be busy."""


def now() -> float:
    """Seconds on the running loop's clock."""
    return asyncio.get_running_loop().time()


class TaskSet:
    """Tasks of the loop, which itself keeps none alive."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task


class WorkerExit(NamedTuple):
    """How a worker ended, as the protocol tells it."""

    code: str
    message: str
    fields: Message = {}  # noqa: RUF012 - nobody changes it

    @property
    def error(self) -> Message:
        """The answer to what was pending."""
        return {"code": self.code, "message": self.message, **self.fields}


UNLOADED = WorkerExit("unloaded", "the model was unloaded; load one with load_model")


class WorkerSpec(NamedTuple):
    """What a worker is to open. ``options``: keywords of ``edge_rt.open``. ``rules``: a file."""

    model: str
    options: dict[str, Any]
    rules: str | None = None


class WorkerProcess(asyncio.Protocol):
    """One life of a worker. Commands are written as soon as it is started; it reads them when it can.

    Nothing of a process that has ended is passed on.
    """

    def __init__(self, on_report: Callable[[Message], None], on_exit: Callable[[WorkerProcess, WorkerExit], None]) -> None:
        """``on_report`` takes what the process says of itself, ``on_exit`` is called once. Raises OSError."""
        self._on_report, self._on_exit = on_report, on_exit
        self.pending: dict[int, ReplyHandler] = {}
        self._frames = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._verdict: WorkerExit | None = None  # why we ended it
        self.over = False  # it has ended; ``on_exit`` is called in a moment
        self._gone = asyncio.Event()
        self._tasks = TaskSet()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        program = [sys.executable, "-m", "edge_rt.daemon.worker", str(theirs.fileno())]
        try:
            self._process = subprocess.Popen(
                program, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._tasks.spawn(self._connect(ours))

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, number: int, command: Message, handle: ReplyHandler) -> None:
        """Send a command; ``number`` is its id. Raises ProtocolError if it is too long."""
        data = pack({"id": number, **command})
        self.pending[number] = handle
        self._write(data)

    def tell(self, command: Message) -> None:
        """Send a command that has no answer."""
        self._write(pack(command))

    def kill(self, why: WorkerExit) -> None:
        """End it at once; what is pending gets this error."""
        self._verdict = self._verdict or why
        if self._process.poll() is None:
            self._process.kill()
        if self._transport is not None:
            self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._transport is None:
            self._early.append(data)
        elif not self._transport.is_closing():  # it has died, which we are told in a moment
            self._transport.write(data)

    async def _connect(self, ours: socket.socket) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        for data in self._early:
            self._transport.write(data)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        if self.over:
            return
        try:
            for message in self._frames.feed(data):
                if self._verdict is None:  # else it said this before it knew of its end, and the verdict says more
                    self._dispatch(message)
        except ProtocolError as error:
            self.kill(WorkerExit("worker_died", f"the worker wrote what it must not: {error}"))

    def _dispatch(self, message: Message) -> None:
        number = message.pop("id", None)
        if number is None:
            handle: ReplyHandler | None = self._on_report
        else:
            handle = self.pending.get(number) if "event" in message else self.pending.pop(number, None)
        if handle is not None:
            self._pass_on(handle, message)

    @staticmethod
    def _pass_on(handle: ReplyHandler, message: Message) -> None:
        """What goes wrong with one answer is no affair of the others."""
        try:
            handle(message)
        except Exception as error:
            logging.getLogger("edge_rt.daemon").error("an answer of the worker was lost", exc_info=error)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over:
            self.over = True
            self._tasks.spawn(self._reap())

    async def _reap(self) -> None:
        """Wait for the status, which comes a moment after the connection ends, then tell everybody."""
        if not await self._wait_for_end(0.2):
            self._process.kill()
            await self._wait_for_end(1.0)
        verdict = self._verdict or WorkerExit("worker_died", f"the worker process {_describe_status(self._process.returncode)}")
        pending, self.pending = self.pending, {}
        self._on_exit(self, verdict)
        for handle in pending.values():
            self._pass_on(handle, {"error": verdict.error})
        self._gone.set()

    async def _wait_for_end(self, seconds: float) -> bool:
        """Wait so long at most; whether the process ended."""
        until = now() + seconds
        while self._process.poll() is None and now() < until:
            await asyncio.sleep(0.002)
        return self._process.poll() is not None

    async def stop(self, why: WorkerExit) -> None:
        """Let it end: it does when the connection does. What is pending gets this error."""
        self._verdict = self._verdict or why
        if self._transport is not None:
            self._transport.close()
        await self._wait_for_end(1.0)
        self.kill(why)
        await self._gone.wait()


def _describe_status(status: int | None) -> str:
    if status is None:  # it waits for a disk that does not answer
        return "does not answer, and cannot be ended"
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


class _HeldCommand(NamedTuple):
    """A command that waits for a worker; ``handle``: None if it has no answer."""

    number: int
    command: Message
    handle: ReplyHandler | None


class Supervisor:
    """At most one worker, which has at most one model for all its life.

    ``state``: ``none`` (no model was asked for), ``starting``, ``ready``, ``waiting`` (for its start), ``failed`` (it gave up).
    ``reason`` is of the last two. ``epoch`` counts lives: what a worker held is gone in the next.
    """

    def __init__(
        self, hung_after: float, on_state: Callable[[], None], on_report: Callable[[Message], None], grant: Callable[[], Message],
    ) -> None:  # fmt: skip
        """``on_report`` takes what the worker says of its memory and sessions. ``grant``: what it is opened with, beside the model."""
        self.state, self.reason, self.epoch, self.deaths = "none", "", 0, 0
        self.phase: Message = {}
        self.model: Message | None = None
        self.rules: Message | None = None
        self._hung_after, self._on_state, self._pass_report, self._grant = hung_after, on_state, on_report, grant
        self.spec: WorkerSpec | None = None
        self._process: WorkerProcess | None = None
        self._numbers = itertools.count(1)
        self._held: list[_HeldCommand] = []
        self._failures, self._served = 0, False
        self._failure = WorkerExit("worker_died", "")
        self._retry: asyncio.TimerHandle | None = None
        self._started = float("-inf")
        self._watch: asyncio.TimerHandle | None = None
        self._beats, self._moved = -1, 0.0
        self._expected: float | None = None  # seconds of the engine's step under way

    @property
    def pid(self) -> int | None:
        """None while there is no worker."""
        return self._process.pid if self._process else None

    def status(self) -> Message:
        return {"state": self.state, "reason": self.reason, "pid": self.pid, "deaths": self.deaths, **self.phase}

    # ---- commands ----------------------------------------------------------------------------------------------------

    def call(self, command: Message, handle: ReplyHandler) -> int:
        """Send a command, perhaps after a start of the worker; returns its number. Raises ProtocolError if there is none to be had."""
        if self.spec is None:
            raise ProtocolError("no_model", "no model is loaded; load one with load_model")
        if self.state == "failed":
            if now() - self._started >= LONGEST_DELAY:
                self._start()
            if self._process is None:
                raise ProtocolError(self._failure.code, self._failure.message)
        number = next(self._numbers)
        if (process := self._living) is None:
            self._held.append(_HeldCommand(number, command, handle))
        else:
            self._send(process, number, command, handle)
        return number

    def tell(self, command: Message) -> None:
        """Send a command that has no answer. A worker that is gone need not know; the next does, where more is held for it."""
        if (process := self._living) is not None:
            process.tell(command)
        elif self._held:
            self._held.append(_HeldCommand(0, command, None))

    def cancel(self, number: int, *, drop: bool = False) -> None:
        """End a generation. ``drop``: nobody wants the rest of its events."""
        if not self.withdraw(number):
            self.tell({"op": "drop" if drop else "cancel", "request": number})

    def withdraw(self, number: int) -> bool:
        """Answer a command that waits for a worker with ``cancelled``; False if it does not wait."""
        for one in self._held:
            if one.number == number and one.handle is not None:
                self._held.remove(one)
                one.handle({"error": {"code": "cancelled", "message": "the request was cancelled before it began"}})
                return True
        return False

    @property
    def _living(self) -> WorkerProcess | None:
        """The worker, None if there is none, or one whose end is only not yet understood."""
        return None if self._process is None or self._process.over else self._process

    def _send(self, process: WorkerProcess, number: int, command: Message, handle: ReplyHandler) -> None:
        if not process.pending:
            self._moved = now()
        process.call(number, command, partial(self._on_reply, handle))
        self._start_watch()

    def _on_reply(self, handle: ReplyHandler, message: Message) -> None:
        self._moved = now()
        if "ok" in message:
            self._served, self._failures = True, 0
        handle(message)

    # ---- lives -------------------------------------------------------------------------------------------------------

    def load(self, spec: WorkerSpec) -> None:
        """Start a worker with this model; there must be none."""
        assert self._process is None, "unload comes first"
        self.spec, self._failures = spec, 0
        self._start()

    def expect(self, spec: WorkerSpec, why: str) -> None:
        """Hold commands until ``load``: the model is going to be loaded, and waits for something."""
        self.spec = spec
        self._set("waiting", why)

    async def unload(self, why: WorkerExit = UNLOADED) -> None:
        """End the worker; what it is at gets an error."""
        process, self._process = self._process, None
        self.abandon(why)
        if process is not None:
            await process.stop(why)

    def abandon(self, why: WorkerExit = UNLOADED) -> None:
        """There is no worker, and will be none before ``load``: what waits for one gets an error."""
        assert self._process is None, "it is ended by unload"
        self.spec, self.model = None, None
        self.epoch += 1  # what sessions have in the worker goes with it
        self._set("none")
        for timer in (self._retry, self._watch):
            if timer is not None:
                timer.cancel()
        self._retry = self._watch = None
        self._fail_held(why)

    def _start(self) -> None:
        assert self.spec is not None, "a worker is started for a model"
        self._retry, self._served, self._started = None, False, now()
        self.phase = {"phase": "starting", "done": 0, "total": 0}
        try:
            self._process = process = WorkerProcess(self._on_report, self._on_exit)
        except OSError as error:
            self._restart_later(WorkerExit("worker_died", f"the worker cannot be started: {(error.strerror or str(error)).lower()}"))
            return
        self._set("starting")
        self._moved = now()
        process.call(0, {"op": "open", **self.spec._asdict(), **self._grant()}, self._on_opened)
        held, self._held = self._held, []
        for one in held:
            if one.handle is None:
                process.tell(one.command)
            else:
                self._send(process, one.number, one.command, one.handle)
        self._start_watch()

    def _on_opened(self, message: Message) -> None:
        if "ok" in message:
            self.model, self.phase = message["ok"], {"phase": "ready", "done": 0, "total": 0}
            self._set("ready")
        elif self._process is not None:
            error = message["error"]
            self._failure = WorkerExit(error["code"], error["message"])
            self._failures = GIVES_UP_AFTER  # a file that is wrong does not mend itself
            self._process.kill(self._failure)

    def _on_report(self, message: Message) -> None:
        """What the worker says of itself."""
        if "phase" in message:
            self._moved = now()
            if self.state == "starting":
                self.phase = message
            elif message["phase"] == "prefetch":  # which goes on behind the first answers
                self.phase = {**message, "phase": "ready"}
        elif "rules" in message:
            self.rules = message["rules"]
        elif "beats" in message:
            self._expected = message["expected"]
            if message["idle"] or message["beats"] != self._beats:
                self._beats, self._moved = message["beats"], now()
        else:
            self._pass_report(message)

    def _on_exit(self, process: WorkerProcess, how: WorkerExit) -> None:
        if process is self._process:
            self._process = None
            if self.spec is not None:
                self._restart_later(how)

    def _restart_later(self, how: WorkerExit) -> None:
        """After a death; or give up."""
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
        self._retry = asyncio.get_running_loop().call_later(min(LONGEST_DELAY, FIRST_DELAY * 2**self._failures), self._start)

    def _fail_held(self, how: WorkerExit) -> None:
        held, self._held = self._held, []
        for one in held:
            if one.handle is not None:
                one.handle({"error": how.error})

    def _set(self, state: str, reason: str = "") -> None:
        self.state, self.reason = state, reason
        if state not in ("starting", "ready"):
            self.phase = {}
        self._on_state()

    # ---- the watchdog ------------------------------------------------------------------------------------------------

    def _start_watch(self) -> None:
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(min(1.0, self._hung_after / 4), self._check_progress)

    def _check_progress(self) -> None:
        """End a worker in which nothing has moved for too long; else ask it, while anything is pending."""
        self._watch = None
        process = self._process
        if process is None or not process.pending:
            return
        patience = hang_timeout(self._expected, self._hung_after)
        if now() - self._moved > patience:
            process.kill(WorkerExit("worker_hung", f"nothing moved in the worker for {patience:.3g} seconds, and it was ended; ask again"))
            return
        self._expected = None  # until it answers
        process.tell({"op": "ping"})
        self._start_watch()


def hang_timeout(expected: float | None, hung_after: float) -> float:
    """Seconds that nothing may move in a worker. ``expected``: that the engine's step under way should take, None if it is at
    something else, or does not answer.
    """
    return hung_after if expected is None else min(hung_after, max(MIN_HANG_SECONDS, STEP_FACTOR * expected))
