"""What the daemon knows of a client, whatever it speaks: who it is, what is under way for it, and whether it reads what it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_rt.daemon import protocol
from edge_rt.daemon.bucket import Bucket
from edge_rt.daemon.frames import Message
from edge_rt.errors import ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.server import Server
    from edge_rt.daemon.streams import Stream

AT_ONCE = 32
"""Messages handled before others have a turn."""
UNREAD = 1 << 20
"""Bytes that a client has not read, before no more is read from it."""
OVER_TCP, OVER_HTTP = -1, -2
"""Users of whom the system does not tell, as they came over TCP: all with the key of the daemon's protocol; all over HTTP without a key.
Each key of HTTP is a user of its own, from -3 down."""


class Channel(asyncio.Protocol):
    """One client's connection; the server's operations see no more of it than this.

    Messages are the protocol's, in and out. A subclass says how ``send`` writes them, and what else ends with the connection.
    """

    _transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.server = server
        self.user: int | None = None
        """Who is there, as the system or a key says; None until that is known to be somebody who may be."""
        self.streams: dict[int, Stream] = {}
        """Generations by the client's number."""
        self.waiting: set[int] = set()
        """Other requests that were not answered yet."""
        self.withdraw: dict[int, Callable[[], object]] = {}
        """How to take back each of these, as long as its model waits for memory."""
        self.held = 0
        """Bytes of the request that has begun and of requests not answered yet; see ``Server.hold``."""
        self._sizes: dict[int, int] = {}
        rate = server.config.limits.requests_per_second
        self._requests = Bucket(rate, 2 * rate, server.now())
        self._writing = True
        self._owing: list[Stream] = []
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._closed = False

    # ---- of the loop -------------------------------------------------------------------------------------------------

    def eof_received(self) -> None:
        """The client will say no more: it has left."""

    def connection_lost(self, error: Exception | None) -> None:
        """The client has left, or was sent away."""
        self._closed = True
        self._sizes.clear()
        for timer in self._timers.values():
            timer.cancel()
        self.server.left(self)

    def pause_writing(self) -> None:
        """The client reads slower than we write."""
        self._writing = False

    def resume_writing(self) -> None:
        """The client has read on."""
        self._writing = True
        owing, self._owing = self._owing, []
        for stream in owing:
            stream.written()
        self._read_on()

    def _read_on(self) -> None:
        """Go on with what has come, or read more."""
        raise NotImplementedError

    # ---- what is under way -------------------------------------------------------------------------------------------

    def _take_token(self) -> None:
        """Requests by the second, as a bucket that holds those of two. Raises ProtocolError: limit."""
        if wait := self._requests.take(self.server.now()):
            rate = self.server.config.limits.requests_per_second
            raise ProtocolError("limit", f"there may be {rate:g} requests a second; ask again a little later", retry_after=wait)

    def _fault(self) -> None:
        """A request was refused: a user who asks for such things again and again is not heard for a moment after each."""
        if (seconds := self.server.fault(self.user)) and not self._closed and "deaf" not in self._timers:
            self._transport.pause_reading()
            self._timers["deaf"] = asyncio.get_running_loop().call_later(seconds, self._hear)

    def _hear(self) -> None:
        del self._timers["deaf"]
        self._read_on()

    @property
    def _deaf(self) -> bool:
        return "deaf" in self._timers

    def greet(self, key: str | None) -> None:
        """Hello was said. Raises ProtocolError: not_allowed."""
        raise NotImplementedError

    def begin(self, number: int, size: int) -> None:
        """A request is passed on; ``size``: its bytes. Raises ProtocolError: limit."""
        most = self.server.config.limits.requests_per_connection
        if len(self.waiting) + len(self.streams) >= most:
            raise ProtocolError("limit", f"a connection may have {most} requests under way; wait for one")
        self.server.hold(self, size)
        self._sizes[number] = size
        self.waiting.add(number)

    def done(self, number: int) -> None:
        """A request was answered, or could not be begun."""
        self.waiting.discard(number)
        self.withdraw.pop(number, None)
        self.server.hold(self, -self._sizes.pop(number, 0))

    # ---- out ---------------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Write a message; the client may be gone."""
        raise NotImplementedError

    def answer(self, number: int | None, result: Message) -> None:
        """Answer a request that is done."""
        if number is not None:
            self.send({"id": number, "ok": result})

    def refuse(self, number: int | None, error: Exception) -> None:
        """Answer with an error."""
        found = protocol.failure(error)
        self.server.count("errors", found["code"])
        self.send({"id": number, "error": found})

    def deliver(self, stream: Stream, message: Message) -> None:
        """Send a stream's event or answer; the event is off our hands when the client reads fast enough."""
        self.send({**message, "id": stream.request})
        if "event" not in message:
            return
        if self._writing:
            stream.written()
        else:
            self._owing.append(stream)

    def close(self) -> None:
        """Send what was written, and no more."""
        if not self._closed:
            self._closed = True
            self._transport.close()
            # Who reads nothing does not keep us.
            self._timers["close"] = asyncio.get_running_loop().call_later(5.0, self._transport.abort)

    def end(self, error: ProtocolError) -> None:
        """Say why, and end the connection."""
        self.refuse(None, error)
        self.close()

    # ---- time --------------------------------------------------------------------------------------------------------

    def _after(self, name: str, seconds: float, what: str) -> None:
        """End the connection after some seconds, unless ``_stop`` comes first."""
        self._stop(name)
        if seconds and not self._closed:
            error = ProtocolError("limit", f"{what} within {seconds:g} seconds")
            self._timers[name] = asyncio.get_running_loop().call_later(seconds, self.end, error)

    def _stop(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()
