"""The client for asyncio: any number of concurrent requests on one connection.

async with AsyncClient() as client:
    async for event in client.generate("Once upon a time", max_tokens=64):
        ...
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from edge_rt.daemon import address as addresses
from edge_rt.daemon.address import Address
from edge_rt.daemon.client import PAUSES, connect_socket
from edge_rt.daemon.client.protocol import (
    GONE,
    ClientProtocol,
    Reply,
    embed_fields,
    feedback_fields,
    generate_fields,
    hello_fields,
    score_fields,
)
from edge_rt.daemon.protocol import Message
from edge_rt.errors import DaemonError, ProtocolError
from edge_rt.types import Event
from edge_rt.types import Message as ChatMessage


class AsyncClient:
    """A connection to the daemon; an asynchronous context manager. Any number of tasks may use it.

    All methods raise DaemonError with the protocol's ``code``, or ``disconnected`` if the connection was lost. Events are buffered without
    limit, so a task that consumes them slowly does not block others.
    """

    def __init__(self, address: str | Address | None = None, *, key: str | None = None) -> None:
        """``address``: as for ``edge-rt serve --listen``, by default the user's own daemon. ``key``: required over TCP."""
        self.address = addresses.parse(address) if isinstance(address, str) else address or addresses.default_address()
        self._key = key
        self._protocol = ClientProtocol()
        self._writer: asyncio.StreamWriter | None = None
        self._changed = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self.hello: Message = {}  # the daemon's answer to hello: version, server, capabilities, limits

    async def connect(self) -> None:
        reader, hello = await self._open()
        self._reading = asyncio.get_running_loop().create_task(self._read(reader, hello))
        while not hello.over:
            await self._changed.wait()
        try:
            self.hello = hello.result()
        except DaemonError:
            await self.close()
            raise
        self._protocol.on_hello(self.hello)

    async def _open(self) -> tuple[asyncio.StreamReader, Reply]:
        try:
            made = await asyncio.to_thread(connect_socket, self.address, None)
            reader, self._writer = await asyncio.open_connection(sock=made)
        except OSError as error:
            raise DaemonError("disconnected", f"no daemon answers at {self.address}; start one with `edge-rt serve`") from error
        return reader, self._send("hello", hello_fields(self._key))

    async def call(self, op: str, **fields: Any) -> Message:
        """Send a request and wait for its answer."""
        reply = self._send(op, fields)
        while not reply.over:
            await self._changed.wait()
        return reply.result()

    async def generate(
        self, prompt: str | Sequence[ChatMessage], *, session: str | None = None, model: str | None = None, priority: str = "normal",
        resumable: bool = False, **options: Any,
    ) -> AsyncIterator[Event]:  # fmt: skip
        """The events of an answer, as ``Client.generate``. ``session``: an id from ``open_session``."""
        reply = self._send("generate", generate_fields(prompt, session, model, priority, resumable, options))
        try:
            while True:
                while (event := reply.next_event()) is not None:
                    yield event
                if reply.over:
                    break
                await self._changed.wait()
            reply.result()
        finally:
            if not reply.over:
                self._protocol.cancel(reply)
                self._flush()

    async def embed(
        self, texts: Sequence[str | Sequence[int]], *, model: str | None = None, pooling: str | None = None, normalize: bool = True,
        dimensions: int | None = None,
    ) -> list[list[float]]:  # fmt: skip
        """Embeddings of texts, or of their tokens, as ``Client.embed``."""
        return [one["embedding"] for one in await self._read_texts("embed", embed_fields(texts, model, pooling, normalize, dimensions))]

    async def score(
        self, texts: Sequence[str | Sequence[int]], *, before: str | Sequence[ChatMessage] | None = None, model: str | None = None,
        top: int = 0, beyond: bool = False,
    ) -> list[Message]:  # fmt: skip
        """Log-probabilities of texts, as ``Client.score``."""
        events = await self._read_texts("score", score_fields(texts, before, model, top, beyond))
        return [score for event in events for score in event["scores"]]

    async def _read_texts(self, op: str, fields: Message) -> list[Message]:
        reply = self._send(op, fields)
        try:
            while not reply.over:
                await self._changed.wait()
        finally:
            if not reply.over and self._writer is not None:
                self._send("cancel", {"request": reply.request})
        reply.result()
        return reply.readings

    async def feedback(
        self, prompt: str | Sequence[ChatMessage], answer: str, *, rating: int | None = None, correction: str | None = None,
        comment: str | None = None, model: str | None = None,
    ) -> None:  # fmt: skip
        """Record feedback on an answer, as ``Client.feedback``."""
        await self.call("feedback", **feedback_fields(prompt, answer, rating, correction, comment, model))

    async def saved(self) -> list[Message]:
        found: list[Message] = (await self.call("list_saved"))["saved"]
        return found

    async def delete_saved(self, name: str) -> None:
        await self.call("delete_saved", name=name)

    def _send(self, op: str, fields: Mapping[str, Any]) -> Reply:
        if self._writer is None:
            raise DaemonError("disconnected", "the connection was closed; connect again")
        reply = self._protocol.request(op, fields)
        self._flush()
        return reply

    def _flush(self) -> None:
        if self._writer is not None and (data := self._protocol.to_send()):
            self._writer.write(data)

    def _wake(self) -> None:
        """Wake all tasks that wait for something to be received."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _read(self, reader: asyncio.StreamReader, hello: Reply) -> None:
        """Receive until the connection is lost; reconnect as long as there are streams to resume."""
        pauses = iter(PAUSES)
        while True:
            try:
                while data := await reader.read(1 << 18):
                    self._protocol.feed(data)
                    if self._protocol.broken and hello.over and _refusal(hello) is None:
                        self._protocol.resume()
                        pauses = iter(PAUSES)
                    self._flush()
                    self._wake()
            except (OSError, ProtocolError):
                pass  # handled as the end of the connection
            await self._close()
            self._protocol.disconnected()
            self._wake()
            refusal = _refusal(hello)
            while self._writer is None:
                if not self._protocol.broken:
                    return
                try:
                    if refusal is not None:
                        raise refusal
                    reader, hello = await self._open()
                except DaemonError as error:
                    refusal, pause = None, next(pauses, None)
                    if pause is None or error.code != "disconnected":
                        self._protocol.fail_broken(error)
                        self._wake()
                        return
                    await asyncio.sleep(pause)

    async def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
            with suppress(OSError):  # it is closed all the same
                await writer.wait_closed()

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        await self._close()
        self._protocol.disconnected()
        self._protocol.fail_broken(DaemonError("disconnected", GONE))
        self._wake()

    async def __aenter__(self) -> AsyncClient:
        await self.connect()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


def _refusal(hello: Reply) -> DaemonError | None:
    """The error with which the daemon refused ``hello``, None if it accepted."""
    try:
        hello.result()
    except DaemonError as error:
        return error
    return None
