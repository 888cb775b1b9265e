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
from edge_rt.daemon.channel import AT_ONCE, OVER_TCP, UNREAD, Channel
from edge_rt.daemon.frames import Frames, Message, pack, pack_answer
from edge_rt.errors import EdgeError, ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.protocol import Request
    from edge_rt.daemon.server import Server

BEFORE_HELLO = 4096
"""Bytes of a frame, as long as nobody has said hello."""
_FATAL = ("bad_frame", "frame_too_long", "unsupported_version", "not_allowed")


class Connection(Channel):
    """Made by the server for each client that connects."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.greeted = False
        self._frames = Frames(BEFORE_HELLO)
        self._messages: Iterator[Message] | None = None
        self._begun = 0

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

    def _read_on(self) -> None:
        if self._messages is None:
            self._transport.resume_reading()
        else:
            self._go_on()

    # ---- in ----------------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Handle messages that have come, some at a time, and as long as the client reads what it is answered."""
        if self._closed or self._deaf or self._messages is None:
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
                if self._closed or self._deaf:
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
            self._fault()
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
            self._fault()

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

    def greet(self, key: str | None) -> None:
        """Hello was said. Raises ProtocolError: not_allowed."""
        expected = self.server.config.key
        if self._over_tcp and (expected is None or not hmac.compare_digest((key or "").encode(), expected.encode())):
            raise ProtocolError("not_allowed", "the key is not the daemon's; give the one in its key_file")
        self.greeted = True
        self._frames.max_bytes = self.server.config.limits.frame_bytes
        self._stop("hello")

    # ---- out ---------------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Write a message; the client may be gone."""
        if self._closed or self._transport.is_closing():  # the loop knows before it tells, and complains of each write until then
            return
        self._transport.write(pack_answer(message))
        self._idle()

    def refuse(self, number: int | None, error: Exception) -> None:
        """Answer with an error; one after which the client cannot be understood, or is not to be, ends the connection."""
        super().refuse(number, error)
        if protocol.failure(error)["code"] in _FATAL or not self.greeted:
            self.close()

    # ---- time --------------------------------------------------------------------------------------------------------

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
