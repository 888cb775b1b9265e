"""Connections of clients: limits on what one may ask, the streams of its requests, and the framing of the daemon's own protocol."""

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

MESSAGES_AT_ONCE = 32  # messages handled before others have a turn
UNREAD = 1 << 20  # bytes that a client has not read, before no more is read from it
OVER_TCP, OVER_HTTP = -1, -2
"""Users of whom the system does not tell, as they came over TCP: all with the key of the daemon's protocol; all over HTTP without a key.
Each key of HTTP is a user of its own, from -3 down."""
BEFORE_HELLO = 4096  # bytes of a frame, as long as nobody has said hello
_FATAL = ("bad_frame", "frame_too_long", "unsupported_version", "not_allowed")


class Daemon(Protocol):
    """What a connection needs of the daemon; see ``operations.Operations``."""

    config: Config
    draining: bool

    def enter(self, connection: ClientConnection, user: int | None) -> None: ...
    def become(self, connection: ClientConnection, user: int) -> None: ...
    def leave(self, connection: ClientConnection) -> None: ...
    def penalty(self, user: int | None) -> float: ...
    def hold(self, connection: ClientConnection, more: int) -> None: ...
    def count(self, what: str, kind: str, more: int = 1) -> None: ...
    def run(self, connection: ClientConnection, request: Request, size: int) -> None: ...


class StreamObserver(Protocol):
    """Hears what becomes of a request that is recorded."""

    def observe(self, message: Message) -> None:
        """An event, or the answer."""

    def note_left(self) -> None:
        """The client wants no more of it."""

    def finish(self, code: str | None) -> None:
        """It is over, with the code of an error if it failed."""


class TokenBucket:
    """``rate``: tokens a second, 0: no limit. ``most``: that may be taken at once; full at ``now``. Times are seconds of one clock."""

    __slots__ = ("_filled", "_most", "_rate", "_tokens")

    def __init__(self, rate: float, most: float, now: float) -> None:
        self._rate, self._most = rate, most
        self._tokens, self._filled = most, now

    def take(self, now: float) -> float:
        """Take one, and return 0; or the seconds until there is one to take."""
        if not self._rate:
            return 0.0
        self._fill(now)
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0.0

    def overdraw(self, now: float, longest: float) -> float:
        """Take one also if there is none. Returns the seconds until all that were taken so are paid for: at most ``longest``."""
        if not self._rate:
            return 0.0
        self._fill(now)
        self._tokens = max(self._tokens - 1, -longest * self._rate)
        return max(0.0, -self._tokens / self._rate)

    def _fill(self, now: float) -> None:
        self._tokens = min(self._most, self._tokens + (now - self._filled) * self._rate)
        self._filled = now


class EventStream:
    """Events of one request between the worker and its client, so that none is lost, repeated, or kept without end.

    An event has a credit until it is written to the client, or, of a stream that can be resumed, acknowledged by it. Those that are not
    are held, so as many at most as there are credits, and the answer at the end. Who cancels gets the few events with which a generation
    ends beside them.
    """

    def __init__(self, user: int, hosted: ManagedModel, credits: int, *, resumable: bool) -> None:
        self.user, self.hosted = user, hosted
        self.token = secrets.token_urlsafe(16) if resumable else None
        self.seq = 0  # of the last event or answer; they count from 1
        self.ended = False  # the answer has come
        self.cancelled = False  # the worker was told
        self.number = 0  # of the command to the worker
        self.request = 0  # the client's number for it
        self.begun = False  # a token has come
        self.last_token = 0.0  # when it came; before the first, when the request was started
        self.connection: ClientConnection | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self.observer: StreamObserver | None = None
        self._held: deque[Message] = deque()
        self._batch, self._owed = max(1, credits // 4), 0

    @property
    def held(self) -> int:
        """Events and answers that the client has not acknowledged."""
        return len(self._held)

    @property
    def finished(self) -> bool:
        """Nothing will be asked of it any more."""
        return self.ended and not self._held

    def add(self, message: Message) -> Message:
        """Take an event or the answer from the worker; returns what is to be sent of it."""
        self.ended = "event" not in message
        if self.token is None:
            return message
        self.seq += 1
        message = {**message, "seq": self.seq}
        self._held.append(message)
        return message

    def written(self) -> None:
        """The client's socket took an event."""
        if self.token is None:
            self._return_credits(1)

    def note_left(self) -> None:
        """The client wants no more of it."""
        if self.observer is not None:
            self.observer.note_left()

    def acknowledge(self, seq: int) -> None:
        """The client has all up to this one."""
        events = 0
        while self._held and self._held[0]["seq"] <= seq:
            events += "event" in self._held.popleft()
        self._return_credits(events)

    def events_after(self, seq: int) -> list[Message]:
        """What follows this one, which the client has with all before it. Raises ProtocolError."""
        first = self.seq - len(self._held)
        if not first <= seq <= self.seq:
            raise ProtocolError("bad_request", f"the stream can be resumed after {first} to {self.seq}, and not after {seq}")
        self.acknowledge(seq)
        return list(self._held)

    def _return_credits(self, events: int) -> None:
        """Let the worker send as many more, a quarter of all at a time."""
        self._owed += events
        if self._owed >= self._batch and not self.ended:
            owed, self._owed = self._owed, 0
            self.hosted.supervisor.tell({"op": "resume", "request": self.number, "events": owed})


class ClientConnection(asyncio.Protocol):
    """One client's connection: who it is, what is under way for it, and whether it reads what it is sent.

    Messages are the protocol's, in and out. A subclass says how ``send`` writes them, and what else ends with the connection.
    """

    _transport: asyncio.Transport

    def __init__(self, server: Daemon) -> None:
        self.server = server
        self.user: int | None = None  # as the system or a key says; None until that is known to be somebody who may be
        self.streams: dict[int, EventStream] = {}  # by the client's number
        self.waiting: set[int] = set()  # other requests that were not answered yet
        self.withdraw: dict[int, Callable[[], object]] = {}  # how to take back each of these, as long as its model waits for memory
        self.held = 0  # bytes of the request that has begun and of requests not answered yet; see ``Operations.hold``
        self._sizes: dict[int, int] = {}
        rate = server.config.limits.requests_per_second
        self._requests = TokenBucket(rate, 2 * rate, now())
        self._writing = True
        self._unwritten: list[EventStream] = []
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._closed = False

    @property
    def known_user(self) -> int:
        assert self.user is not None, "nobody else comes as far as this"
        return self.user

    def eof_received(self) -> None:
        """The client will say no more: it has left."""

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
            stream.written()
        self._read_on()

    def _read_on(self) -> None:
        """Go on with what has come, or read more."""
        raise NotImplementedError

    def _take_token(self) -> None:
        """Count a request against ``requests_per_second``; a burst of two seconds' is allowed. Raises ProtocolError: limit."""
        if wait := self._requests.take(now()):
            rate = self.server.config.limits.requests_per_second
            raise ProtocolError("limit", f"there may be {rate:g} requests a second; ask again a little later", retry_after=wait)

    def _penalize(self) -> None:
        """After a request that was refused: a user of whom that is often so is not read for a moment after each."""
        if (seconds := self.server.penalty(self.user)) and not self._closed and not self._deaf:
            self._transport.pause_reading()
            self._timers["deaf"] = asyncio.get_running_loop().call_later(seconds, self._end_penalty)

    def _end_penalty(self) -> None:
        del self._timers["deaf"]
        self._read_on()

    @property
    def _deaf(self) -> bool:
        return "deaf" in self._timers

    def greet(self, key: str | None) -> None:
        """Hello was said. Raises ProtocolError: not_allowed."""
        raise NotImplementedError

    def begin(self, number: int, size: int) -> None:
        """Count a request that is passed on; ``size``: its bytes. Raises ProtocolError: limit."""
        most = self.server.config.limits.requests_per_connection
        if len(self.waiting) + len(self.streams) >= most:
            raise ProtocolError("limit", f"a connection may have {most} requests under way; wait for one")
        self.server.hold(self, size)
        self._sizes[number] = size
        self.waiting.add(number)

    def done(self, number: int) -> None:
        """Count a request no more: it was answered, or could not be begun."""
        self.waiting.discard(number)
        self.withdraw.pop(number, None)
        self.server.hold(self, -self._sizes.pop(number, 0))

    def send(self, message: Message) -> None:
        """Write a message; the client may be gone."""
        raise NotImplementedError

    def answer(self, number: int | None, result: Message) -> None:
        if number is not None:
            self.send({"id": number, "ok": result})

    def refuse(self, number: int | None, error: Exception) -> None:
        found = protocol.describe_error(error)
        self.server.count("errors", found["code"])
        self.send({"id": number, "error": found})

    def deliver(self, stream: EventStream, message: Message) -> None:
        """Send a stream's event or answer; an event's credit returns when the client reads fast enough."""
        self.send({**message, "id": stream.request})
        if "event" in message:
            if self._writing:
                stream.written()
            else:
                self._unwritten.append(stream)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._transport.close()
            # Who reads nothing does not keep us.
            self._timers["close"] = asyncio.get_running_loop().call_later(5.0, self._transport.abort)

    def end(self, error: ProtocolError) -> None:
        self.refuse(None, error)
        self.close()

    def _end_after(self, name: str, seconds: float, what: str) -> None:
        """End the connection after some seconds, unless ``_stop_timer`` comes first."""
        self._stop_timer(name)
        if seconds and not self._closed:
            error = ProtocolError("limit", f"{what} within {seconds:g} seconds")
            self._timers[name] = asyncio.get_running_loop().call_later(seconds, self.end, error)

    def _stop_timer(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()


class FramedConnection(ClientConnection):
    """A client that speaks the daemon's own protocol. What goes wrong here concerns nobody else."""

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
        user = peer_credentials(connection).user  # asyncio's wrapper has what is asked of it
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

    def _read_on(self) -> None:
        if self._messages is None:
            self._transport.resume_reading()
        else:
            self._handle_messages()

    def _handle_messages(self) -> None:
        """Handle messages that have come, some at a time, and as long as the client reads what it is answered."""
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
        """A part of a frame counts among the bytes held, and has ``frame_seconds`` to become whole."""
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
        expected = self.server.config.key
        if self._over_tcp and (expected is None or not hmac.compare_digest((key or "").encode(), expected.encode())):
            raise ProtocolError("not_allowed", "the key is not the daemon's; give the one in its key_file")
        self.greeted = True
        self._frames.max_bytes = self.server.config.limits.frame_bytes
        self._stop_timer("hello")

    def send(self, message: Message) -> None:
        if self._closed or self._transport.is_closing():  # the loop knows before it tells, and complains of each write until then
            return
        self._transport.write(pack_answer(message))
        self._restart_idle_timer()

    def refuse(self, number: int | None, error: Exception) -> None:
        """Answer with an error; one after which the client cannot be understood, or is not to be, ends the connection."""
        super().refuse(number, error)
        if protocol.describe_error(error)["code"] in _FATAL or not self.greeted:
            self.close()

    def _restart_idle_timer(self) -> None:
        self._stop_timer("idle")
        if (seconds := self.server.config.limits.idle_seconds) and not self._closed:
            self._timers["idle"] = asyncio.get_running_loop().call_later(seconds, self._end_if_idle, seconds)

    def _end_if_idle(self, seconds: float) -> None:
        """Nothing was said for long: who waits for an answer may stay."""
        if self.streams or self.waiting:
            self._restart_idle_timer()
        else:
            self.end(ProtocolError("limit", f"nothing was asked for {seconds:g} seconds"))
