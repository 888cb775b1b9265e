"""One client's connection: frames in and out, and its limits. What goes wrong here concerns nobody else."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from edge_rt.daemon import operations, protocol
from edge_rt.daemon.address import peer
from edge_rt.daemon.frames import Frames, Message, pack, pack_answer
from edge_rt.errors import EdgeError, ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.protocol import Request
    from edge_rt.daemon.server import Server
    from edge_rt.daemon.streams import Stream

BEFORE_HELLO = 4096
"""Bytes of a frame, as long as nobody has said hello."""
AT_ONCE = 32
"""Messages handled before others have a turn."""
UNREAD = 1 << 20
"""Bytes that a client has not read, before no more is read from it."""
OVER_TCP = -1
"""The user of all who came with the key; the system does not say whose a TCP connection is."""
_FATAL = ("bad_frame", "frame_too_long", "unsupported_version", "not_allowed")


class Connection(asyncio.Protocol):
    """Made by the server for each client that connects."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.user: int | None = None
        """Who is there, as the system says; None until that is known to be somebody who may be."""
        self.greeted = False
        self.streams: dict[int, Stream] = {}
        """Generations by the client's number."""
        self.waiting: set[int] = set()
        """Other requests that were not answered yet."""
        self.held = 0
        """Bytes of the frame that has begun and of requests not answered yet; see ``Server.hold``."""
        limits = server.config.limits
        self._frames = Frames(BEFORE_HELLO)
        self._messages: Iterator[Message] | None = None
        self._sizes: dict[int, int] = {}
        self._begun = 0
        self._tokens, self._refilled = 2 * limits.requests_per_second, server.now()
        self._writing = True
        self._owing: list[Stream] = []
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._closed = False

    # ---- of the loop -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Who is it, and may they come in?"""
        self._transport = cast(asyncio.Transport, transport)
        connection: socket.socket = transport.get_extra_info("socket")
        self._over_tcp = connection.family != socket.AF_UNIX
        user = peer(connection).user  # asyncio's wrapper has what is asked of it
        try:
            self.server.enter(self, OVER_TCP if self._over_tcp else user)
        except ProtocolError as error:
            self._closed = True
            self._transport.write(pack({"id": None, "error": protocol.failure(error)}))
            self._transport.close()
            return
        self._after("hello", self.server.config.limits.hello_seconds, "no hello came")

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        self._messages = self._frames.feed(data)
        self._go_on()

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
        if self._messages is None:
            self._transport.resume_reading()
        else:
            self._go_on()

    # ---- in ----------------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Handle messages that have come, some at a time, and as long as the client reads what it is answered."""
        if self._closed or self._messages is None:
            return
        try:
            for _ in range(AT_ONCE):
                if self._transport.get_write_buffer_size() > UNREAD:
                    self._transport.pause_reading()
                    return
                message = next(self._messages, None)
                if message is None:
                    self._messages = None
                    self._transport.resume_reading()
                    self._note_begun()
                    return
                self._handle(message)
                if self._closed:
                    return
        except ProtocolError as error:
            self.end(error)
            return
        self._transport.pause_reading()
        asyncio.get_running_loop().call_soon(self._go_on)

    def _note_begun(self) -> None:
        """A part of a frame may be there: it counts, and has its time."""
        begun, before = self._frames.pending, self._begun
        self._begun = begun
        self.server.hold(self, begun - before)
        if not begun:
            self._stop("frame")
        elif "frame" not in self._timers:
            self._after("frame", self.server.config.limits.frame_seconds, "a frame was not completed")
        self._idle()

    def _handle(self, message: Message) -> None:
        self._stop("frame")
        number = message.get("id")
        try:
            request = protocol.request(message)
            self._admit(request)
        except ProtocolError as error:
            self.refuse(number if isinstance(number, int) else None, error)
            return
        try:
            self.server.count("requests", request.op)
            operations.run(self, request, self._frames.length)
        except Exception as error:
            if not isinstance(error, EdgeError):
                logging.getLogger("edge_rt.daemon").error("%s failed", request.op, exc_info=error)
            if request.id is not None:
                self.done(request.id)
            self.refuse(request.id, error)

    def _admit(self, request: Request) -> None:
        """Raises ProtocolError for what may not be asked now."""
        if not self.greeted and request.op != "hello":
            raise ProtocolError("bad_request", "the first request must be hello")
        if self.greeted and request.op == "hello":
            raise ProtocolError("bad_request", "hello was said already; open another connection to say it again")
        if request.id is not None and (request.id in self.streams or request.id in self.waiting):
            raise ProtocolError("bad_request", f"request {request.id} is not answered yet; give another id")
        if request.op not in ("ack", "cancel"):
            self._take_token()

    def _take_token(self) -> None:
        """Requests by the second, as a bucket that holds those of two. Raises ProtocolError: limit."""
        rate = self.server.config.limits.requests_per_second
        if not rate:
            return
        now = self.server.now()
        self._tokens = min(2 * rate, self._tokens + (now - self._refilled) * rate)
        self._refilled = now
        if self._tokens < 1:
            wait = (1 - self._tokens) / rate
            raise ProtocolError("limit", f"there may be {rate:g} requests a second; ask again a little later", retry_after=wait)
        self._tokens -= 1

    def greet(self, key: str | None) -> None:
        """Hello was said. Raises ProtocolError: not_allowed."""
        expected = self.server.config.key
        if self._over_tcp and (expected is None or not hmac.compare_digest((key or "").encode(), expected.encode())):
            raise ProtocolError("not_allowed", "the key is not the daemon's; give the one in its key_file")
        self.greeted = True
        self._frames.max_bytes = self.server.config.limits.frame_bytes
        self._stop("hello")

    # ---- what is under way -------------------------------------------------------------------------------------------

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
        self.server.hold(self, -self._sizes.pop(number, 0))

    # ---- out ---------------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Write a message; the client may be gone."""
        if self._closed:
            return
        self._transport.write(pack_answer(message))
        self._idle()

    def answer(self, number: int | None, result: Message) -> None:
        """Answer a request that is done."""
        if number is not None:
            self.send({"id": number, "ok": result})

    def refuse(self, number: int | None, error: Exception) -> None:
        """Answer with an error; one after which the client cannot be understood, or is not to be, ends the connection."""
        found = protocol.failure(error)
        self.server.count("errors", found["code"])
        self.send({"id": number, "error": found})
        if found["code"] in _FATAL or not self.greeted:
            self.close()

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

    def _idle(self) -> None:
        """Something was said, by either side."""
        self._stop("idle")
        if (seconds := self.server.config.limits.idle_seconds) and not self._closed:
            self._timers["idle"] = asyncio.get_running_loop().call_later(seconds, self._idled, seconds)

    def _idled(self, seconds: float) -> None:
        """Nothing was said for long: who waits for an answer may stay."""
        if self.streams or self.waiting:
            self._idle()
        else:
            self.end(ProtocolError("limit", f"nothing was asked for {seconds:g} seconds"))
