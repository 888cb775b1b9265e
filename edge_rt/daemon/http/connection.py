"""One client over HTTP/1.1. h11 reads and writes the protocol; here are its limits and who may ask: host, origin, key.

A request is one of the daemon's, as if it had come over its own protocol: same operations, same limits, same back-pressure.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import socket
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import h11

from edge_rt.daemon import protocol
from edge_rt.daemon.address import peer_credentials
from edge_rt.daemon.config import HttpConfig
from edge_rt.daemon.connection import MESSAGES_AT_ONCE, OVER_HTTP, UNREAD, ClientConnection
from edge_rt.daemon.http.openai import ApiError, from_protocol, parse_body, to_api_error
from edge_rt.daemon.protocol import Message, Request
from edge_rt.errors import EdgeError, ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.operations import Operations

_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def check_host(http: HttpConfig, headers: Mapping[str, str]) -> None:
    """A page whose name was bound anew to this machine is told by the name it asks for. Raises ApiError."""
    host = headers.get("host")
    if host is None:  # no browser leaves it out
        return
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name.lower() not in _LOOPBACK_HOSTS and name.lower() not in http.hosts:
        raise ApiError(403, "the name in the Host header is not this daemon's; add it to hosts in [http]", "host_not_allowed")


def check_origin(http: HttpConfig, headers: Mapping[str, str]) -> str | None:
    """The origin of the page that asks, None if no page does or its origin is our own. Raises ApiError for pages of others."""
    origin, host = headers.get("origin"), headers.get("host")
    if origin is None or origin in (f"http://{host}", f"https://{host}"):  # TLS is a proxy's before us
        return None
    if origin not in http.origins:
        raise ApiError(403, "pages of this origin may not use the daemon; add it to origins in [http]", "origin_not_allowed")
    return origin


def cors_headers(origin: str | None) -> list[tuple[str, str]]:
    """Headers that let a page of this origin read the answer."""
    if origin is None:
        return []
    exposed = "Retry-After, X-Request-Id, Edge-RT-Ignored"
    return [("Access-Control-Allow-Origin", origin), ("Vary", "Origin"), ("Access-Control-Expose-Headers", exposed)]


def preflight_headers(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """The answer's headers when a browser asks whether a page may ask."""
    found = [("Access-Control-Allow-Methods", "GET, POST"), ("Access-Control-Max-Age", "600")]
    if asked := headers.get("access-control-request-headers"):
        found.append(("Access-Control-Allow-Headers", asked))
    if headers.get("access-control-request-private-network") == "true":
        found.append(("Access-Control-Allow-Private-Network", "true"))
    return found


def check_key(http: HttpConfig, headers: Mapping[str, str]) -> int | None:
    """Which of the keys was shown, None if there are none. Raises ApiError."""
    if not http.keys:
        return None
    scheme, _, key = headers.get("authorization", "").partition(" ")
    shown = key.strip(" \t").encode("latin-1") if scheme.lower() == "bearer" else b""
    matches = [hmac.compare_digest(shown, one.encode()) for one in http.keys]  # all of them: the time tells nothing
    if not any(matches):
        message = "the API key is not one of the daemon's; send `Authorization: Bearer KEY` with one of its key_file"
        raise ApiError(401, message, "invalid_api_key", headers=(("WWW-Authenticate", "Bearer"),))
    return matches.index(True)


HEAD_BYTES = 1 << 14  # most bytes of a request's head
PIPELINED_BYTES = 1 << 16  # bytes of further requests that may come while one is answered
KEEP_ALIVE = 75.0  # seconds that a connection stays open between two requests, unless ``idle_seconds`` says otherwise
LINGER = 1.0  # seconds in which the rest of a refused request is read and thrown away, so that the client gets to read why
STREAM_HEADERS = (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no"))
"""Headers of a stream."""


class Exchange:
    """A request and its answer. ``headers``: names in lower case. ``heard`` takes what the daemon says of it."""

    def __init__(self, connection: HttpConnection, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        self.connection, self.server, self.path, self.body, self.headers = connection, connection.server, path, body, headers
        self.heard: Callable[[Message], None] = lambda message: None
        self.left: Callable[[], None] = lambda: None  # called if the client is gone before the answer

    def json(self) -> dict[str, Any]:
        """The body. Raises ApiError."""
        return parse_body(self.body)

    def run(self, op: str, fields: Message, heard: Callable[[Message], None]) -> None:
        """Ask the daemon. Raises ProtocolError, EdgeError."""
        self.heard = heard
        self.connection.run(op, fields, len(self.body))


class Route(NamedTuple):
    """``path``: as metrics show it. ``work`` answers, now or later; raises ApiError, ProtocolError."""

    path: str
    method: str
    work: Callable[[Exchange], object]
    needs_key: bool = True


class HttpConnection(ClientConnection):
    """Made by the server for each client that connects. Answers one request at a time, as HTTP/1.1 does."""

    server: Operations

    def __init__(
        self, server: Operations, http: HttpConfig, names: dict[tuple[int, str, str], str], find_route: Callable[[str, str], Route],
        preflight: Route,
    ) -> None:  # fmt: skip
        """``names``: ids of sessions by user, model and the client's name, of all connections. ``find_route`` raises ApiError."""
        super().__init__(server)
        self._find_route, self._preflight = find_route, preflight
        self.names = names
        self._http = http
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self._ahead = 0
        self._over_tcp = False
        self._lingering = False
        self._body = bytearray()
        self._kept = 0
        self._number = 0
        self._reset()

    def _reset(self) -> None:
        """What was of one request, before the next."""
        self._head: h11.Request | None = None
        self._route: Route | None = None
        self._headers: dict[str, str] = {}
        self._origin: str | None = None
        self._exchange: Exchange | None = None
        self._streaming = False
        self._refusal: EdgeError | None = None
        self._thrown_away = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Who is it, and may they come in?"""
        self._transport = cast(asyncio.Transport, transport)
        connection: socket.socket = transport.get_extra_info("socket")
        self._over_tcp = connection.family != socket.AF_UNIX
        try:
            self.server.enter(self, OVER_HTTP if self._over_tcp else peer_credentials(connection).user)
        except ProtocolError as error:
            self._fail(to_api_error(error))
            self._lingering = True
            self.close()
            return
        self._end_after("head", self.server.config.limits.hello_seconds, "no request came")

    def data_received(self, data: bytes) -> None:
        if self._closed or self._lingering:
            return
        self._h11.receive_data(data)
        if self._exchange is None:
            self._go_on()
            return
        self._ahead += len(data)
        if self._ahead > PIPELINED_BYTES:
            self._transport.pause_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """The client has left: nobody works for it any more."""
        super().connection_lost(error)
        if self._exchange is not None:
            self._exchange.left()
        self._exchange = None

    def _continue_reading(self) -> None:
        if self._exchange is None:
            self._go_on()

    def _go_on(self) -> None:
        """Take what has come, some at a time, as long as the client reads what it is answered."""
        for _ in range(MESSAGES_AT_ONCE):
            if self._closed or self._lingering or self._deaf or self._exchange is not None:
                return
            if self._transport.get_write_buffer_size() > UNREAD:
                self._transport.pause_reading()
                return
            try:
                event = self._h11.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    self._wait()
                    return
                if isinstance(event, h11.Request):
                    self._on_head(event)
                elif isinstance(event, h11.Data):
                    self._on_body(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    self._on_request()
            except h11.RemoteProtocolError as error:
                said = f"the request is no HTTP/1.1: {error}"
                self._fail(ApiError(error.error_status_hint, said, "malformed_request"))
            except Exception as error:
                self._fail(error)
        self._transport.pause_reading()
        asyncio.get_running_loop().call_soon(self._go_on)

    def _wait(self) -> None:
        self._transport.resume_reading()
        limits = self.server.config.limits
        if self._head is not None:
            return
        if self._h11.trailing_data[0]:  # a head has begun
            self._stop_timer("idle")
            if "head" not in self._timers:
                self._end_after("head", limits.hello_seconds, "the request's head was not completed")
        elif "head" not in self._timers and "idle" not in self._timers:
            self._end_after("idle", limits.idle_seconds or KEEP_ALIVE, "no request came")

    def _on_head(self, head: h11.Request) -> None:
        """A request's head came. Raises ApiError for one after which it is not known, or would take long, where the next begins."""
        self._stop_timer("head")
        self._stop_timer("idle")
        self._head = head
        self._headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
        self._end_after("body", self.server.config.limits.frame_seconds, "the request was not completed")
        if len(head.target) + sum(len(name) + len(value) for name, value in head.headers) > HEAD_BYTES:  # it came all at once
            raise ApiError(431, f"the request's head is longer than {HEAD_BYTES:,} bytes", "malformed_request")
        if not head.http_version.startswith(b"1."):
            raise ApiError(505, "only HTTP/1.1 and HTTP/1.0 are spoken here", "malformed_request")
        if "transfer-encoding" in self._headers and ("content-length" in self._headers or head.http_version < b"1.1"):
            raise ApiError(400, "the request says in two ways how long it is, or in one that its version has not", "malformed_request")
        length = int(self._headers.get("content-length", 0))
        waits = self._h11.they_are_waiting_for_100_continue
        try:
            self._check(head, length)
        except EdgeError as error:
            if length > PIPELINED_BYTES or waits:
                raise
            self._refusal = error  # once the request is there: the connection may go on then
            return
        if waits:
            self._write(h11.InformationalResponse(status_code=100, headers=[], reason="Continue"))

    def _check(self, head: h11.Request, length: int) -> None:
        """Raises ApiError, ProtocolError for a request that will not be answered."""
        self._take_token()
        if self._over_tcp:
            check_host(self._http, self._headers)
        self._origin = check_origin(self._http, self._headers)
        if head.method == b"OPTIONS" and self._origin is not None:
            self._route = self._preflight
        else:
            self._route = self._find_route(head.method.decode("ascii"), self._path)
        if self._route.needs_key:
            key = check_key(self._http, self._headers)
            if key is not None:
                self.server.change_user(self, OVER_HTTP - 1 - key)
        if length > self.server.config.limits.frame_bytes:
            raise self._too_long()

    @property
    def _path(self) -> str:
        assert self._head is not None, "the head came before"
        return self._head.target.decode("latin-1").partition("?")[0]

    def _too_long(self) -> ApiError:
        most = self.server.config.limits.frame_bytes
        return ApiError(413, f"the body is longer than the {most:,} bytes that are allowed", "request_too_large")

    def _on_body(self, data: bytes) -> None:
        """A part of the body came. Raises ApiError, ProtocolError."""
        if self._refusal is not None:
            self._thrown_away += len(data)
            if self._thrown_away > PIPELINED_BYTES:
                raise self._refusal
            return
        if len(self._body) + len(data) > self.server.config.limits.frame_bytes:
            raise self._too_long()
        self.server.hold(self, len(data))
        self._body += data

    def _on_request(self) -> None:
        """A request is there. Raises ApiError, ProtocolError."""
        self._stop_timer("body")
        if self._refusal is not None:
            raise self._refusal
        assert self._route is not None, "it was found with the head"
        body = bytes(self._body)
        self._drop_body()
        self._ahead = len(self._h11.trailing_data[0])
        self._exchange = Exchange(self, self._path, body, self._headers)
        self._route.work(self._exchange)

    def _drop_body(self) -> None:
        self.server.hold(self, -len(self._body) - self._kept)
        self._body.clear()
        self._kept = 0

    def hold_answer(self, more: int) -> None:
        """Bytes of an answer that are kept until it is whole. Raises ProtocolError: limit."""
        self.server.hold(self, more)
        self._kept += more

    def run(self, op: str, fields: Message, size: int) -> int:
        """Ask the daemon; what it says comes to the exchange. Raises ProtocolError, EdgeError."""
        self._number += 1
        number = self._number
        try:
            self.server.run(self, Request(number, op, fields), size)
        except Exception:
            self.done(number)
            raise
        return number

    def send(self, message: Message) -> None:
        """The daemon says something of a request. What comes for one that was answered is for nobody."""
        exchange = self._exchange
        if self._closed or exchange is None or message["id"] != self._number:
            return
        try:
            if "error" in message:
                raise from_protocol(message["error"])
            exchange.heard(message)
        except Exception as error:
            self._fail(error)

    def respond(self, status: int, body: bytes, content_type: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        """Answer the request, and go on with the next."""
        length = (("Content-Length", str(len(body))),) if status not in (204, 304) else ()
        kind = (("Content-Type", content_type),) if body else ()
        self._start(status, (*kind, *length, *headers))
        self._write_body(body)
        self._finish()

    def respond_json(self, found: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> None:
        """``respond`` with JSON."""
        self.respond(status, json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode(), "application/json", headers)

    def preflight(self) -> None:
        self.respond(204, b"", "", tuple(preflight_headers(self._headers)))

    def stream(self, event: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        """Send a server-sent event; the first begins the answer, with these headers."""
        self._stream_line(f"data: {event}", headers)

    def comment(self, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        """Send a line that clients pass over: the answer is still to come."""
        self._stream_line(f": {text}", headers)

    def _stream_line(self, line: str, headers: tuple[tuple[str, str], ...]) -> None:
        if not self._streaming:
            self._streaming = True
            self._start(200, (*STREAM_HEADERS, *headers))
        self._write_body(f"{line}\n\n".encode())

    def stream_end(self) -> None:
        self._finish()

    def _start(self, status: int, headers: tuple[tuple[str, str], ...]) -> None:
        self.server.count("http", f"{self._route.path if self._route is not None else 'other'} {status}")
        every = [("Date", formatdate(usegmt=True)), ("X-Request-Id", f"req_{secrets.token_hex(12)}")]
        leaving = [("Connection", "close")] if self.server.draining else []
        every += [*headers, *cors_headers(self._origin), *leaving]
        self._write(h11.Response(status_code=status, headers=every, reason=HTTPStatus(status).phrase))

    def _write_body(self, data: bytes) -> None:
        if data and not (self._head is not None and self._head.method == b"HEAD"):
            self._write(h11.Data(data=data))

    def _write(self, event: h11.Event) -> None:
        data = self._h11.send(event)
        if data and not self._closed and not self._transport.is_closing():
            self._transport.write(data)

    def _finish(self) -> None:
        self._write(h11.EndOfMessage())
        for timer in ("head", "body", "idle"):
            self._stop_timer(timer)
        self._drop_body()
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
            self._reset()
            asyncio.get_running_loop().call_soon(self._go_on)
        else:
            self._exchange = None
            self._leave()

    def _leave(self) -> None:
        """End the connection; what the client is still sending is read for a moment, or it would not read our answer."""
        if self._h11.their_state in (h11.MUST_CLOSE, h11.CLOSED, h11.DONE):
            self.close()
        elif not self._lingering:
            self._lingering = True
            self._transport.resume_reading()
            if self._transport.can_write_eof():
                self._transport.write_eof()
            self._timers["linger"] = asyncio.get_running_loop().call_later(LINGER, self.close)

    def _fail(self, error: Exception) -> None:
        """Answer with an error; in a stream that has begun, as its last event."""
        if not isinstance(error, EdgeError):
            logging.getLogger("edge_rt.daemon").error("a request over HTTP failed", exc_info=error)
        if not isinstance(error, ApiError):  # else it was counted where it was found, or is none of the protocol's
            self.server.count("errors", protocol.describe_error(error)["code"])
        for stream in self.streams.values():
            if not stream.ended:  # the mistake is ours, and nobody is told the rest
                stream.hosted.supervisor.cancel(stream.number)
        found = to_api_error(error)
        if self._closed:
            return
        if self._streaming:
            self.stream(json.dumps(found.body(), ensure_ascii=False))
            self._finish()
        elif self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            if found.status < 500:
                self._penalize()
            self.respond_json(found.body(), found.status, found.headers)
        else:
            self._transport.abort()

    def end(self, error: ProtocolError) -> None:
        """Some time is over: who has asked for nothing need not be told."""
        if self._lingering:
            return
        if self._head is None and not self._h11.trailing_data[0]:
            self.close()
        else:
            self._fail(ApiError(408, str(error), "request_timeout"))
