"""Clients of the daemon: blocking (`Client`) and for asyncio (`AsyncClient`).

with Client() as client, client.session() as session:
    for event in session.generate([{"role": "user", "content": "Hello"}], max_tokens=64):
        ...
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from edge_rt.daemon import address as addresses
from edge_rt.daemon.address import Address
from edge_rt.daemon.client.protocol import ClientProtocol, Reply, embed_fields, feedback_fields, generate_fields, hello_fields, score_fields
from edge_rt.daemon.protocol import Message
from edge_rt.errors import DaemonError, ProtocolError
from edge_rt.types import Event
from edge_rt.types import Message as ChatMessage

if TYPE_CHECKING:
    from edge_rt.daemon.client.async_ import AsyncClient

__all__ = ["AsyncClient", "Client", "Generation", "Session", "connect_socket"]

PAUSES = (0.05, 0.2, 0.5, 1.0, 2.0)  # seconds between attempts to reconnect for a resumable stream
CONNECT_SECONDS = 5.0  # how long connecting is retried while the backlog of the daemon's socket is full, without a timeout of the caller's


class Client:
    """A blocking connection to the daemon; a context manager. Not thread-safe, except for ``Generation.cancel``.

    All methods raise DaemonError with the protocol's ``code``, or ``disconnected`` if the connection was lost.
    """

    def __init__(self, address: str | Address | None = None, *, key: str | None = None, timeout: float | None = None) -> None:
        """``address``: as for ``edge-rt serve --listen``, by default the user's own daemon. ``key``: required over TCP. ``timeout``:
        seconds without data after which a call fails, by default none.
        """
        self.address = addresses.parse(address) if isinstance(address, str) else address or addresses.default_address()
        self._key, self._timeout = key, timeout
        self._socket: socket.socket | None = None
        self._protocol = ClientProtocol()
        self._lock = threading.RLock()  # guards the protocol's state and writing to the socket
        self.hello: Message = {}  # the daemon's answer to hello: version, server, capabilities, limits
        self.connect()

    def connect(self) -> None:
        """Connect or reconnect. Resumable streams are resumed; other pending requests fail."""
        with self._lock:
            self.close()
            self._protocol.disconnected()
        try:
            self._socket = connect_socket(self.address, self._timeout)
        except OSError as error:
            raise DaemonError("disconnected", f"no daemon answers at {self.address}; start one with `edge-rt serve`") from error
        try:
            self.hello = self.call("hello", **hello_fields(self._key))
        except BaseException:
            self.close()
            raise
        with self._lock:
            self._protocol.on_hello(self.hello)
            self._protocol.resume()

    def _reconnect(self) -> None:
        for pause in PAUSES:
            try:
                self.connect()
            except DaemonError as error:
                if error.code != "disconnected":
                    raise
                time.sleep(pause)
            else:
                return
        self.connect()

    def call(self, op: str, **fields: Any) -> Message:
        """Send a request and wait for its answer."""
        reply = self._send(op, fields)
        while not reply.over:
            self._receive()
        return reply.result()

    def generate(
        self, prompt: str | Sequence[ChatMessage], *, session: Session | None = None, model: str | None = None, priority: str = "normal",
        resumable: bool = False, **options: Any,
    ) -> Generation:  # fmt: skip
        """Iterate over the events of an answer, the last one Done; ``options`` are those of ``edge_rt.Session.generate``.

        ``model``: a name, by default the session's model or the daemon's default. The request is sent when the first event is requested.

        Leaving the loop cancels the request and discards its remaining events. With ``resumable``, a lost connection is re-established
        and the events continue where they stopped.
        """
        return Generation(self, generate_fields(prompt, None if session is None else session.id, model, priority, resumable, options))

    def _stream(self, fields: Message, reply: Reply) -> Generator[Event, None, None]:
        self._send("generate", fields, reply)
        try:
            while True:
                while (event := reply.next_event()) is not None:
                    yield event
                if reply.over:
                    break
                try:
                    self._flush()
                    self._receive()
                except DaemonError as error:
                    if error.code != "disconnected" or not reply.resumable:
                        raise
                    self._reconnect()
            with suppress(DaemonError):  # the answer is complete, even if the connection is lost before the last acknowledgement
                self._flush()
            reply.result()
        finally:
            if not reply.over:
                self._abandon(reply)

    def _abandon(self, reply: Reply) -> None:
        """Cancel a request and discard its remaining events."""
        self._cancel(reply)
        with suppress(DaemonError):  # disconnected, or a timeout: then the events are discarded during the next request
            while not reply.over:
                reply.events.clear()
                self._flush()
                self._receive()

    def _cancel(self, reply: Reply) -> None:
        """Send a cancellation, on any thread; with the next connection if this one is lost."""
        with self._lock:
            self._protocol.cancel(reply)
            if self._socket is None:
                return
            try:
                self._socket.sendall(self._protocol.to_send())
            except OSError:
                with suppress(OSError):  # part of a frame may have been sent: the thread that reads reports the end of the connection
                    self._socket.shutdown(socket.SHUT_RDWR)

    def embed(
        self, texts: Sequence[str | Sequence[int]], *, model: str | None = None, pooling: str | None = None, normalize: bool = True,
        dimensions: int | None = None,
    ) -> list[list[float]]:  # fmt: skip
        """Embeddings of texts, or of their tokens; see ``edge_rt.Model.embed``. ``dimensions``: keep only the first so many numbers."""
        return [one["embedding"] for one in self._read_texts("embed", embed_fields(texts, model, pooling, normalize, dimensions))]

    def score(
        self, texts: Sequence[str | Sequence[int]], *, before: str | Sequence[ChatMessage] | None = None, model: str | None = None,
        top: int = 0, beyond: bool = False,
    ) -> list[Message]:  # fmt: skip
        """Log-probabilities of texts: for each a dict of ``tokens`` and natural ``logprobs``. ``before``: the prompt or messages that the
        texts continue; without it the first token of a text has no score. ``top``: adds the so many likeliest tokens at each position, as
        (token, log-probability). ``beyond``: adds them for the position after the last token.
        """
        events = self._read_texts("score", score_fields(texts, before, model, top, beyond))
        return [score for event in events for score in event["scores"]]

    def _read_texts(self, op: str, fields: Message) -> list[Message]:
        reply = self._send(op, fields)
        try:
            while not reply.over:
                self._flush()
                self._receive()
        finally:
            if not reply.over:
                self._abandon(reply)
        reply.result()
        return reply.readings

    def feedback(
        self, prompt: str | Sequence[ChatMessage], answer: str, *, rating: int | None = None, correction: str | None = None,
        comment: str | None = None, model: str | None = None,
    ) -> None:  # fmt: skip
        """Record feedback on an answer, in a daemon that records traffic. Give at least one of ``rating`` (-1, 0, 1), ``correction`` (the
        answer it should have been) and ``comment``. Returns when the feedback is written, redacted.
        """
        self.call("feedback", **feedback_fields(prompt, answer, rating, correction, comment, model))

    def session(self, *, keep: bool = False, context: int | None = None, model: str | None = None) -> Session:
        """Open a session. ``keep``: it outlives this connection for the daemon's ``keep_sessions`` seconds. ``model``: by default the
        daemon's default.
        """
        return Session(self, self.call("open_session", keep=keep, context=context, model=model)["session"])

    def restore(self, name: str, *, keep: bool = False, model: str | None = None) -> Session:
        """Open a saved session."""
        return Session(self, self.call("restore_session", name=name, keep=keep, model=model)["session"])

    def saved(self) -> list[Message]:
        """The user's saved sessions, ordered by ``name``, each with its size in ``bytes`` and the time ``saved``, in seconds since 1970."""
        found: list[Message] = self.call("list_saved")["saved"]
        return found

    def delete_saved(self, name: str) -> None:
        self.call("delete_saved", name=name)

    def status(self) -> Message:
        return self.call("status")

    def _send(self, op: str, fields: Mapping[str, Any], reply: Reply | None = None) -> Reply:
        with self._lock:
            reply = self._protocol.request(op, fields, reply)
            self._flush()
            return reply

    def _flush(self) -> None:
        with self._lock:
            if self._socket is None:
                raise DaemonError("disconnected", "the connection was closed; connect again")
            if data := self._protocol.to_send():
                try:
                    self._socket.sendall(data)
                except OSError as error:
                    with suppress(OSError, ProtocolError):  # the daemon may have sent an error before it closed
                        while said := self._socket.recv(1 << 18):
                            self._protocol.feed(said)
                    self._lose_connection(error)

    def _receive(self) -> None:
        if self._socket is None:
            raise DaemonError("disconnected", "the connection was closed; connect again")
        try:
            data = self._socket.recv(1 << 18)
        except TimeoutError as error:
            raise DaemonError("timeout", f"the daemon said nothing for {self._timeout:g} seconds; give it more time") from error
        except OSError as error:
            self._lose_connection(error)
        if not data:
            self._lose_connection(None)
        try:
            with self._lock:
                self._protocol.feed(data)
        except ProtocolError as error:
            self.close()
            raise DaemonError("disconnected", f"what answers at {self.address} is no daemon of edge-rt: {error}") from error

    def _lose_connection(self, error: OSError | None) -> NoReturn:
        self.close()
        raise self._protocol.disconnect_error() from error

    def close(self) -> None:
        """Close the connection. The daemon ends its requests, unless they are resumable."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Generation(Iterator[Event]):
    """The events of one answer, the last one Done. Made by ``Client.generate``."""

    def __init__(self, client: Client, fields: Message) -> None:
        self._client, self._reply = client, Reply()
        self._events = client._stream(fields, self._reply)  # has no reference to us: it is closed when we are garbage collected

    def __next__(self) -> Event:
        """Wait for the next event. Raises DaemonError."""
        return next(self._events)

    def cancel(self) -> None:
        """End the generation, from any thread: the events continue until Done with the reason ``cancelled``. A request that has not begun
        raises the error ``cancelled`` instead.
        """
        self._client._cancel(self._reply)

    def close(self) -> None:
        """Cancel the generation and discard its remaining events, as leaving the loop does. Only on the thread that iterates."""
        self._events.close()


class Session:
    """A session in the daemon; a context manager. Made by ``Client.session`` and ``Client.restore``."""

    def __init__(self, client: Client, name: str) -> None:
        self._client, self.id = client, name

    def generate(self, prompt: str | Sequence[ChatMessage], **options: Any) -> Generation:
        """``Client.generate`` in this session."""
        return self._client.generate(prompt, session=self, **options)

    def clone(self, *, keep: bool = False) -> Session:
        """Open another session that starts with the content of this one."""
        return Session(self._client, self._client.call("clone_session", session=self.id, keep=keep)["session"])

    def save(self, name: str) -> None:
        """Save the session under a name, in the daemon's state folder."""
        self._client.call("save_session", session=self.id, name=name)

    def close(self) -> None:
        self._client.call("close_session", session=self.id)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()


def connect_socket(address: Address, timeout: float | None) -> socket.socket:
    """Connect to a daemon. Raises OSError."""
    family = socket.AF_INET6 if ":" in address.path else socket.AF_INET
    found = socket.socket(family if address.kind == "tcp" else socket.AF_UNIX)
    try:
        found.settimeout(timeout)
        if address.kind == "tcp":
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a small frame waits until earlier ones are acknowledged
        where = (address.path, address.port) if address.kind == "tcp" else address.path if address.kind == "unix" else "\0" + address.path
        until = time.monotonic() + (timeout or CONNECT_SECONDS)
        while True:
            try:
                found.connect(where)
                break
            except BlockingIOError:  # the backlog is full; on a socket with a timeout the system does not wait
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
    except BaseException:
        found.close()
        raise
    return found


def __getattr__(name: str) -> Any:
    if name == "AsyncClient":  # imported on demand: blocking programs need no asyncio
        from edge_rt.daemon.client.async_ import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
