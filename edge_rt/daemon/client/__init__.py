"""Clients of the daemon: `Client` blocks, `AsyncClient` is the same for asyncio.

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
from typing import TYPE_CHECKING, Any

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

PAUSES = (0.05, 0.2, 0.5, 1.0, 2.0)  # seconds between attempts to connect again, for a stream that is to go on

CROWDED = 5.0  # seconds to try for, while more connect than the system keeps waiting


class Client:
    """A connection to the daemon; a context manager. For one thread at a time, but for ``Generation.cancel``.

    Everything raises DaemonError with the protocol's ``code``; ``disconnected`` if the daemon is gone.
    """

    def __init__(self, address: str | Address | None = None, *, key: str | None = None, timeout: float | None = None) -> None:
        """``address``: as ``edge-rt serve --listen`` takes it, else the user's own. ``key``: for TCP. ``timeout``: seconds of one wait."""
        self.address = addresses.parse(address) if isinstance(address, str) else address or addresses.default_address()
        self._key, self._timeout = key, timeout
        self._socket: socket.socket | None = None
        self._protocol = ClientProtocol()
        self._lock = threading.RLock()  # of the conversation, and of what is written
        self.hello: Message = {}  # what the daemon said of itself: version, server, capabilities, limits
        self.connect()

    def connect(self) -> None:
        """Connect, or connect again: streams that can be resumed go on, other requests fail."""
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

    def _connect_again(self) -> None:
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
        """Ask, and wait for the answer."""
        answers = self._ask(op, fields)
        while not answers.over:
            self._receive()
        return answers.result()

    def generate(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        session: Session | None = None,
        model: str | None = None,
        priority: str = "normal",
        resumable: bool = False,
        **options: Any,
    ) -> Generation:
        """Answer a prompt: events as they happen, the last one Done; ``options`` are those of ``edge_rt.Session.generate``.

        ``model``: the name of one, else the session's or the daemon's default. It is asked when the first event is taken.

        Leaving the loop cancels the request, and lets the rest of its events go by: the connection is as before. With ``resumable``, a
        connection that breaks is made again, and the events go on where they were.
        """
        return Generation(self, generate_fields(prompt, None if session is None else session.id, model, priority, resumable, options))

    def _answer(self, fields: Message, answers: Reply) -> Generator[Event, None, None]:
        self._ask("generate", fields, answers)
        try:
            yield from self._events(answers)
        finally:
            if not answers.over:
                self._leave(answers)

    def _events(self, answers: Reply) -> Iterator[Event]:
        while True:
            while (event := answers.take()) is not None:
                yield event
            if answers.over:
                break
            try:
                self._flush()
                self._receive()
            except DaemonError as error:
                if error.code != "disconnected" or not answers.resumable:
                    raise
                self._connect_again()
        with suppress(DaemonError):  # the answer is whole; the connection may go before we could say so
            self._flush()
        answers.result()

    def _leave(self, answers: Reply) -> None:
        """Cancel a request, and let its events go by."""
        self._cancel(answers)
        try:
            while not answers.over:
                answers.events.clear()
                self._flush()
                self._receive()
        except DaemonError:
            return  # the connection has ended; or the daemon takes long, and the rest goes by with what is asked next

    def _cancel(self, answers: Reply) -> None:
        """Tell the daemon that a request is to end, on any thread; in the next connection if this one is gone."""
        with self._lock:
            self._protocol.cancel(answers)
            if self._socket is None:
                return
            try:
                self._socket.sendall(self._protocol.to_send())
            except OSError:
                self._end_of(self._socket)

    def embed(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        model: str | None = None,
        pooling: str | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
    ) -> list[list[float]]:
        """Embeddings of texts, or of their tokens; see ``edge_rt.model``. ``dimensions``: so many of the first numbers of each."""
        return [one["embedding"] for one in self._readings("embed", embed_fields(texts, model, pooling, normalize, dimensions))]

    def score(
        self, texts: Sequence[str | Sequence[int]], *, before: str | Sequence[ChatMessage] | None = None, model: str | None = None,
        top: int = 0, beyond: bool = False,
    ) -> list[Message]:  # fmt: skip
        """How likely the model finds texts: of each its ``tokens`` and their natural ``logprobs``. ``before``: a prompt, or messages, that
        they continue; without it a text's first token is not scored. ``top``: and so many of the likeliest tokens at each place, as
        (token, log-probability). ``beyond``: and of the place behind the last.
        """
        events = self._readings("score", score_fields(texts, before, model, top, beyond))
        return [score for event in events for score in event["scores"]]

    def _readings(self, op: str, fields: Message) -> list[Message]:
        """Let texts be read; an event of each."""
        answers = self._ask(op, fields)
        try:
            while not answers.over:
                self._flush()
                self._receive()
        finally:
            if not answers.over:
                self._leave(answers)
        answers.result()
        return answers.readings

    def feedback(
        self, prompt: str | Sequence[ChatMessage], answer: str, *, rating: int | None = None, correction: str | None = None,
        comment: str | None = None, model: str | None = None,
    ) -> None:  # fmt: skip
        """Say what an answer was worth, for the daemon that records traffic: ``rating`` -1, 0 or 1, the ``correction`` that it should have
        been, a ``comment``; at least one of them. It is written, redacted, when this returns.
        """
        self.call("feedback", **feedback_fields(prompt, answer, rating, correction, comment, model))

    def session(self, *, keep: bool = False, context: int | None = None, model: str | None = None) -> Session:
        """Open a session. ``keep``: it outlives this connection for a while. ``model``: the name of one, else the daemon's default."""
        return Session(self, self.call("open_session", keep=keep, context=context, model=model)["session"])

    def restore(self, name: str, *, keep: bool = False, model: str | None = None) -> Session:
        """Open a session that was saved under a name."""
        return Session(self, self.call("restore_session", name=name, keep=keep, model=model)["session"])

    def saved(self) -> list[Message]:
        """The user's saved sessions by name: ``name``, ``bytes``, and when it was ``saved``, in seconds since 1970."""
        found: list[Message] = self.call("list_saved")["saved"]
        return found

    def delete_saved(self, name: str) -> None:
        self.call("delete_saved", name=name)

    def status(self) -> Message:
        return self.call("status")

    def _ask(self, op: str, fields: Mapping[str, Any], answers: Reply | None = None) -> Reply:
        with self._lock:
            answers = self._protocol.ask(op, fields, answers)
            self._flush()
            return answers

    def _flush(self) -> None:
        with self._lock:
            if self._socket is None:
                raise DaemonError("disconnected", "the connection was closed; connect again")
            if data := self._protocol.to_send():
                try:
                    self._socket.sendall(data)
                except OSError as error:
                    self._last_words()
                    self._lost(error)

    @staticmethod
    def _end_of(connection: socket.socket) -> None:
        """What was written is not whole: who reads finds the end, and says so."""
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already

    def _receive(self) -> None:
        if self._socket is None:
            raise DaemonError("disconnected", "the connection was closed; connect again")
        try:
            data = self._socket.recv(1 << 18)
        except TimeoutError as error:
            raise DaemonError("timeout", f"the daemon said nothing for {self._timeout:g} seconds; give it more time") from error
        except OSError as error:
            self._lost(error)
        if not data:
            self._lost(None)
        try:
            with self._lock:
                self._protocol.feed(data)
        except ProtocolError as error:
            self.close()
            raise DaemonError("disconnected", f"what answers at {self.address} is no daemon of edge-rt: {error}") from error

    def _last_words(self) -> None:
        """The daemon may have said why before it closed."""
        assert self._socket is not None, "what could not be written to it can still be read"
        try:
            while data := self._socket.recv(1 << 18):
                self._protocol.feed(data)
        except (OSError, ProtocolError):
            return  # it has said no more

    def _lost(self, error: OSError | None) -> None:
        self.close()
        raise self._protocol.disconnect_error() from error

    def close(self) -> None:
        """Leave; what runs for this connection ends, unless it can be resumed."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Generation(Iterator[Event]):
    """The events of one answer, the last one Done; see ``Client.generate``."""

    def __init__(self, client: Client, fields: Message) -> None:
        """Use ``Client.generate`` or ``Session.generate``."""
        self._client, self._answers = client, Reply()
        self._events = client._answer(fields, self._answers)  # knows nothing of us, so that it ends when nobody holds us any more

    def __next__(self) -> Event:
        """The next event, when it comes. Raises DaemonError."""
        return next(self._events)

    def cancel(self) -> None:
        """End it soon, from any thread: its events go on to Done, whose reason is ``cancelled``; or, if it has not begun, to the
        error ``cancelled``.
        """
        self._client._cancel(self._answers)

    def close(self) -> None:
        """Cancel it, and take no more of its events; on the thread that takes them, as leaving the loop does."""
        self._events.close()


class Session:
    """A session in the daemon; a context manager."""

    def __init__(self, client: Client, name: str) -> None:
        """Use ``Client.session`` or ``Client.restore``."""
        self._client, self.id = client, name

    def generate(self, prompt: str | Sequence[ChatMessage], **options: Any) -> Generation:
        """See ``Client.generate``."""
        return self._client.generate(prompt, session=self, **options)

    def clone(self, *, keep: bool = False) -> Session:
        """Another session that goes on from what was said in this one."""
        return Session(self._client, self._client.call("clone_session", session=self.id, keep=keep)["session"])

    def save(self, name: str) -> None:
        """Keep it under a name, in the daemon's folder."""
        self._client.call("save_session", session=self.id, name=name)

    def close(self) -> None:
        self._client.call("close_session", session=self.id)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()


def connect_socket(address: Address, timeout: float | None) -> socket.socket:
    """A socket that is connected. Raises OSError."""
    family = socket.AF_INET6 if ":" in address.path else socket.AF_INET
    found = socket.socket(family if address.kind == "tcp" else socket.AF_UNIX)
    try:
        found.settimeout(timeout)
        if address.kind == "tcp":
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or a cancel waits for an answer to what was sent before
        where = (address.path, address.port) if address.kind == "tcp" else address.path if address.kind == "unix" else "\0" + address.path
        until = time.monotonic() + (timeout or CROWDED)
        while True:
            try:
                found.connect(where)
                break
            except BlockingIOError:  # many others are connecting; with a timeout the system does not wait for a place
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
    except BaseException:
        found.close()
        raise
    return found


def __getattr__(name: str) -> Any:
    if name == "AsyncClient":  # not before it is asked for: a program that blocks needs no asyncio
        from edge_rt.daemon.client.async_ import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
