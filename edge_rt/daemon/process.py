"""One life of the worker process, as the daemon sees it: commands to it, answers from it, and how it ended."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple, cast

from edge_rt.daemon.frames import Frames, Message, pack
from edge_rt.daemon.tasks import Tasks
from edge_rt.errors import ProtocolError

Took = Callable[[Message], None]
"""Takes the answer to a command: any number of events, then ``{"ok": ...}`` or ``{"error": ...}``."""


class Ended(NamedTuple):
    """How the process ended, as the protocol tells it."""

    code: str
    message: str
    fields: Message = {}  # noqa: RUF012 - nobody changes it

    @property
    def error(self) -> Message:
        """What those hear who were to be answered."""
        return {"code": self.code, "message": self.message, **self.fields}


class Process(asyncio.Protocol):
    """Commands are written as soon as the process is started; it reads them when it can.

    ``told`` takes what the process says of itself, ``ended`` is called once. Nothing of a process that has ended is passed on.
    """

    def __init__(self, told: Callable[[Message], None], ended: Callable[[Process, Ended], None]) -> None:
        """Raises OSError."""
        self._told, self._ended = told, ended
        self.pending: dict[int, Took] = {}
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._verdict: Ended | None = None  # why we ended it
        self.over = False
        """It has ended; ``ended`` is called in a moment."""
        self._gone = asyncio.Event()
        self._tasks = Tasks()
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
        """Of the process."""
        return self._process.pid

    def call(self, number: int, command: Message, took: Took) -> None:
        """Send a command; ``number`` is its id. Raises ProtocolError if it is too long."""
        data = pack({"id": number, **command})
        self.pending[number] = took
        self._write(data)

    def tell(self, command: Message) -> None:
        """Send a command that has no answer."""
        self._write(pack(command))

    def kill(self, why: Ended) -> None:
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

    # ---- of the loop -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Write what has been asked meanwhile."""
        self._transport = cast(asyncio.Transport, transport)
        for data in self._early:
            self._transport.write(data)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        """Pass on answers."""
        if self.over:
            return
        try:
            for message in self._frames.feed(data):
                if self._verdict is None:  # else it said this before it knew of its end, and the verdict says more
                    self._answer(message)
        except ProtocolError as error:
            self.kill(Ended("worker_died", f"the worker wrote what it must not: {error}"))

    def _answer(self, message: Message) -> None:
        number = message.pop("id", None)
        took = self._told if number is None else self.pending.get(number)
        if number is not None and "event" not in message:
            self.pending.pop(number, None)
        if took is not None:
            self._pass_on(took, message)

    @staticmethod
    def _pass_on(took: Took, message: Message) -> None:
        """What goes wrong with one answer is no affair of the others."""
        try:
            took(message)
        except Exception as error:
            logging.getLogger("edge_rt.daemon").error("an answer of the worker was lost", exc_info=error)

    def connection_lost(self, error: Exception | None) -> None:
        """It has ended, or does now."""
        if not self.over:
            self.over = True
            self._tasks.spawn(self._bury())

    async def _bury(self) -> None:
        """Wait for the status, which comes a moment after the connection ends, then tell everybody."""
        if not await self._dead(0.2):
            self._process.kill()
            await self._dead(1.0)
        verdict = self._verdict or Ended("worker_died", f"the worker process {_how(self._process.returncode)}")
        pending, self.pending = self.pending, {}
        self._ended(self, verdict)
        for took in pending.values():
            self._pass_on(took, {"error": verdict.error})
        self._gone.set()

    async def _dead(self, seconds: float) -> bool:
        """Wait for the process's end, so long at most; whether it came."""
        until = asyncio.get_running_loop().time() + seconds
        while self._process.poll() is None and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.002)
        return self._process.poll() is not None

    async def stop(self, why: Ended) -> None:
        """Let it end: it does when the connection does. What is pending gets this error."""
        self._verdict = self._verdict or why
        if self._transport is not None:
            self._transport.close()
        await self._dead(1.0)
        self.kill(why)
        await self._gone.wait()


def _how(status: int | None) -> str:
    """A process's status in words."""
    if status is None:  # it waits for a disk that does not answer
        return "does not answer, and cannot be ended"
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
