"""Connections of clients: their limits, the event streams of their requests, and the daemon's own protocol."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, cast

from edge_rt.daemon import protocol
from edge_rt.daemon.address import peer_credentials
from edge_rt.daemon.protocol import FrameReader, Message, pack, pack_answer
from edge_rt.daemon.supervisor import now
from edge_rt.errors import EdgeError, ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.config import Config
    from edge_rt.daemon.models import ManagedModel
    from edge_rt.daemon.protocol import Request

MESSAGES_AT_ONCE = 32  # messages of one connection that are handled before others have their turn
UNREAD = 1 << 20  # bytes of unsent output above which a connection is not read
OVER_TCP, OVER_HTTP = -1, -2
"""User ids where the system knows none: clients over TCP with the protocol's key, and over HTTP without a key. Each HTTP key is a user of
its own, from -3 down."""
BEFORE_HELLO = 4096  # longest frame before hello
_FATAL = ("bad_frame", "frame_too_long", "unsupported_version", "not_allowed")


class Daemon(Protocol):
    """The part of ``operations.Operations`` that connections use."""

    config: Config
    draining: bool

    def enter(self, connection: ClientConnection, user: int | None) -> None: ...
    def change_user(self, connection: ClientConnection, user: int) -> None: ...
    def leave(self, connection: ClientConnection) -> None: ...
    def penalty(self, user: int | None) -> float: ...
    def hold(self, connection: ClientConnection, more: int) -> None: ...
    def count(self, what: str, kind: str, more: int = 1) -> None: ...
    def run(self, connection: ClientConnection, request: Request, size: int) -> None: ...


class StreamObserver(Protocol):
    """Records one request. ``finish`` is called with the code of an error if the request could not be started."""

    def on_message(self, message: Message) -> None: ...
    def on_left(self) -> None: ...
    def finish(self, code: str | None) -> None: ...


class TokenBucket:
    """A rate limit of ``rate`` tokens per second (0: none) with bursts of ``most``. Full at ``now``; times are seconds of one clock."""

    __slots__ = ("_filled", "_most", "_rate", "_tokens")

    def __init__(self, rate: float, most: float, now: float) -> None:
        self._rate, self._most = rate, most
        self._tokens, self._filled = most, now

    def take(self, now: float) -> float:
        """Take a token and return 0, or return the seconds until one is available."""
        if not self._rate:
            return 0.0
        self._fill(now)
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0.0

    def overdraw(self, now: float, longest: float) -> float:
        """Take a token even if none is left. Returns the seconds until the debt is refilled, which is limited to ``longest``."""
        if not self._rate:
            return 0.0
        self._fill(now)
        self._tokens = max(self._tokens - 1, -longest * self._rate)
        return max(0.0, -self._tokens / self._rate)

    def _fill(self, now: float) -> None:
        self._tokens = min(self._most, self._tokens + (now - self._filled) * self._rate)
        self._filled = now


class EventStream:
    """Flow control and resumption of one request's events, between its worker and its client.

    An event uses a credit until it is written to the client or, in a resumable stream, acknowledged. A resumable stream holds its
    unacknowledged events, so at most as many as there are credits, the answer, and the few events that end a cancelled generation.
    """

    def __init__(self, user: int, hosted: ManagedModel, credits: int, *, resumable: bool) -> None:
        self.user, self.hosted = user, hosted
        self.token = secrets.token_urlsafe(16) if resumable else None
        self.seq = 0  # of the last event or answer, from 1
        self.ended = False  # the answer was received
        self.cancelled = False  # the worker was told to cancel it
        self.number = 0  # of the worker's command
        self.request = 0  # id of the client's request
        self.begun = False  # a token was received
        self.last_token = 0.0  # time of the last token, before the first of the request's start
        self.connection: ClientConnection | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self.observer: StreamObserver | None = None
        self._held: deque[Message] = deque()
        self._batch, self._owed = max(1, credits // 4), 0

    @property
    def held(self) -> int:
        """Number of unacknowledged events and answers."""
        return len(self._held)

    @property
    def finished(self) -> bool:
        return self.ended and not self._held

    def add(self, message: Message) -> Message:
        """Process an event or the answer from the worker; returns the message for the client."""
        self.ended = "event" not in message
        if self.token is None:
            return message
        self.seq += 1
        message = {**message, "seq": self.seq}
        self._held.append(message)
        return message

    def on_written(self) -> None:
        """An event was written to the client's socket."""
        if self.token is None:
            self._return_credits(1)

    def on_left(self) -> None:
        """The client has cancelled the request or disconnected."""
        if self.observer is not None:
            self.observer.on_left()

    def acknowledge(self, seq: int) -> None:
        """The client has received all events up to ``seq``."""
        events = 0
        while self._held and self._held[0]["seq"] <= seq:
            events += "event" in self._held.popleft()
        self._return_credits(events)

    def events_after(self, seq: int) -> list[Message]:
        """Acknowledge up to ``seq`` and return the events that follow. Raises ProtocolError if they are not held."""
        first = self.seq - len(self._held)
        if not first <= seq <= self.seq:
            raise ProtocolError("bad_request", f"the stream can be resumed after {first} to {self.seq}, and not after {seq}")
        self.acknowledge(seq)
        return list(self._held)

    def _return_credits(self, events: int) -> None:
        """Return credits to the worker, in batches of a quarter of all."""
        self._owed += events
        if self._owed >= self._batch and not self.ended:
            owed, self._owed = self._owed, 0
            self.hosted.supervisor.tell({"op": "resume", "request": self.number, "events": owed})


class ClientConnection(asyncio.Protocol):
    """One client's connection: its user, pending requests, limits and flow control. Subclasses implement the wire format."""

    _transport: asyncio.Transport

    def __init__(self, server: Daemon) -> None:
        self.server = server
        self.user: int | None = None  # from the system or the key; None before the connection is admitted
        self.streams: dict[int, EventStream] = {}  # by id of the request
        self.waiting: set[int] = set()  # ids of other pending requests
        self.withdraw: dict[int, Callable[[], object]] = {}  # withdraws such a request while it waits for its model
        self.held = 0  # bytes of incomplete and unanswered requests
        self._sizes: dict[int, int] = {}
        rate = server.config.limits.requests_per_second
        self._requests = TokenBucket(rate, 2 * rate, now())
        self._writing = True
        self._unwritten: list[EventStream] = []
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._closed = False

    @property
    def known_user(self) -> int:
        assert self.user is not None, "the connection was admitted"
        return self.user

    def eof_received(self) -> None:
        """A client that closes its side of the connection has left: returning None closes ours."""

    def connection_lost(self, error: Exception | None) -> None:
        self._closed = True
        self._sizes.clear()
        for timer in self._timers.values():
            timer.cancel()
        self.server.leave(self)

    def pause_writing(self) -> None:
        self._writing = False

    def resume_writing(self) -> None:
        self._writing = True
        unwritten, self._unwritten = self._unwritten, []
        for stream in unwritten:
            stream.on_written()
        self._continue_reading()

    def _continue_reading(self) -> None:
        """Process input that was received already, or read more."""
        raise NotImplementedError

    def _take_token(self) -> None:
        """Enforce ``requests_per_second``, with bursts of two seconds' worth. Raises ProtocolError: limit."""
        if wait := self._requests.take(now()):
            rate = self.server.config.limits.requests_per_second
            raise ProtocolError("limit", f"there may be {rate:g} requests a second; ask again a little later", retry_after=wait)

    def _penalize(self) -> None:
        """After a refused request: stop reading for a while if the user has many of them."""
        if (seconds := self.server.penalty(self.user)) and not self._closed and not self._deaf:
            self._transport.pause_reading()
            self._timers["deaf"] = asyncio.get_running_loop().call_later(seconds, self._end_penalty)

    def _end_penalty(self) -> None:
        del self._timers["deaf"]
        self._continue_reading()

    @property
    def _deaf(self) -> bool:
        return "deaf" in self._timers

    def greet(self, key: str | None) -> None:
        """Complete the handshake. Raises ProtocolError: not_allowed."""
        raise NotImplementedError

    def begin(self, number: int, size: int) -> None:
        """Count a request of ``size`` bytes that is forwarded to a worker, until ``done``. Raises ProtocolError: limit."""
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

    def send(self, message: Message) -> None:
        """Write a message, unless the connection is closing."""
        raise NotImplementedError

    def answer(self, number: int | None, result: Message) -> None:
        if number is not None:
            self.send({"id": number, "ok": result})

    def refuse(self, number: int | None, error: Exception) -> None:
        found = protocol.describe_error(error)
        self.server.count("errors", found["code"])
        self.send({"id": number, "error": found})

    def deliver(self, stream: EventStream, message: Message) -> None:
        """Send a stream's event or answer. The event's credit is returned once the socket's buffer has room."""
        self.send({**message, "id": stream.request})
        if "event" in message:
            if self._writing:
                stream.on_written()
            else:
                self._unwritten.append(stream)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._transport.close()
            # A client that does not read what is buffered for it does not keep the connection open.
            self._timers["close"] = asyncio.get_running_loop().call_later(5.0, self._transport.abort)

    def end(self, error: ProtocolError) -> None:
        self.refuse(None, error)
        self.close()

    def _end_after(self, name: str, seconds: float, what: str) -> None:
        """End the connection after some seconds (0: never), unless ``_stop_timer`` is called before."""
        self._stop_timer(name)
        if seconds and not self._closed:
            error = ProtocolError("limit", f"{what} within {seconds:g} seconds")
            self._timers[name] = asyncio.get_running_loop().call_later(seconds, self.end, error)

    def _stop_timer(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()


class FramedConnection(ClientConnection):
    """A client that speaks the daemon's own protocol."""

    def __init__(self, server: Daemon) -> None:
        super().__init__(server)
        self.greeted = False
        self._frames = FrameReader(BEFORE_HELLO)
        self._messages: Iterator[Message] | None = None
        self._partial = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        connection: socket.socket = transport.get_extra_info("socket")
        self._over_tcp = connection.family != socket.AF_UNIX
        user = peer_credentials(connection).user
        try:
            self.server.enter(self, OVER_TCP if self._over_tcp else user)
        except ProtocolError as error:
            self._closed = True
            self._transport.write(pack({"id": None, "error": protocol.describe_error(error)}))
            self._transport.close()
            return
        self._end_after("hello", self.server.config.limits.hello_seconds, "no hello came")

    def data_received(self, data: bytes) -> None:
        self._messages = self._frames.feed(data)
        self._handle_messages()

    def _continue_reading(self) -> None:
        if self._messages is None:
            self._transport.resume_reading()
        else:
            self._handle_messages()

    def _handle_messages(self) -> None:
        """Handle received messages, ``MESSAGES_AT_ONCE`` at a time and as long as the client reads the answers."""
        if self._closed or self._deaf or self._messages is None:
            return
        try:
            for _ in range(MESSAGES_AT_ONCE):
                if self._transport.get_write_buffer_size() > UNREAD:
                    self._transport.pause_reading()
                    return
                message = next(self._messages, None)
                if message is None:
                    self._messages = None
                    self._transport.resume_reading()
                    self._count_partial_frame()
                    return
                self._handle(message)
                if self._closed or self._deaf:
                    return
        except ProtocolError as error:
            self.end(error)
            return
        self._transport.pause_reading()
        asyncio.get_running_loop().call_soon(self._handle_messages)

    def _count_partial_frame(self) -> None:
        """Count an incomplete frame as held bytes; it must be complete within ``frame_seconds``."""
        before, self._partial = self._partial, self._frames.pending
        self.server.hold(self, self._partial - before)
        if not self._partial:
            self._stop_timer("frame")
        elif "frame" not in self._timers:
            self._end_after("frame", self.server.config.limits.frame_seconds, "a frame was not completed")
        self._restart_idle_timer()

    def _handle(self, message: Message) -> None:
        self._stop_timer("frame")
        number = message.get("id")
        try:
            request = protocol.parse_request(message)
            self._check(request)
        except ProtocolError as error:
            self.refuse(number if isinstance(number, int) else None, error)
            self._penalize()
            return
        try:
            self.server.run(self, request, self._frames.length)
        except Exception as error:
            if not isinstance(error, EdgeError):
                logging.getLogger("edge_rt.daemon").error("%s failed", request.op, exc_info=error)
            if request.id is not None:
                self.done(request.id)
            self.refuse(request.id, error)
            self._penalize()

    def _check(self, request: Request) -> None:
        """Raises ProtocolError for a request that is not valid in the connection's state."""
        if not self.greeted and request.op != "hello":
            raise ProtocolError("bad_request", "the first request must be hello")
        if self.greeted and request.op == "hello":
            raise ProtocolError("bad_request", "hello was said already; open another connection to say it again")
        if request.id is not None and (request.id in self.streams or request.id in self.waiting):
            raise ProtocolError("bad_request", f"request {request.id} is not answered yet; give another id")
        if request.op not in ("ack", "cancel"):
            self._take_token()

    def greet(self, key: str | None) -> None:
        expected = self.server.config.key
        if self._over_tcp and (expected is None or not hmac.compare_digest((key or "").encode(), expected.encode())):
            raise ProtocolError("not_allowed", "the key is not the daemon's; give the one in its key_file")
        self.greeted = True
        self._frames.max_bytes = self.server.config.limits.frame_bytes
        self._stop_timer("hello")

    def send(self, message: Message) -> None:
        if self._closed or self._transport.is_closing():  # asyncio logs a warning for writes after the connection was lost
            return
        self._transport.write(pack_answer(message))
        self._restart_idle_timer()

    def refuse(self, number: int | None, error: Exception) -> None:
        """Answer with an error; a fatal one ends the connection."""
        super().refuse(number, error)
        if protocol.describe_error(error)["code"] in _FATAL or not self.greeted:
            self.close()

    def _restart_idle_timer(self) -> None:
        self._stop_timer("idle")
        if (seconds := self.server.config.limits.idle_seconds) and not self._closed:
            self._timers["idle"] = asyncio.get_running_loop().call_later(seconds, self._end_if_idle, seconds)

    def _end_if_idle(self, seconds: float) -> None:
        if self.streams or self.waiting:
            self._restart_idle_timer()
        else:
            self.end(ProtocolError("limit", f"nothing was asked for {seconds:g} seconds"))
