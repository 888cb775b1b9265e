"""The client for asyncio: many requests at once on one connection.

async with AsyncClient() as client:
    async for event in client.generate("Once upon a time", max_tokens=64):
        ...
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
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

    Everything raises DaemonError with the protocol's ``code``; ``disconnected`` if the daemon is gone. A task that takes its events slowly
    holds up nobody: they are kept meanwhile, as many as the answer has.
    """

    def __init__(self, address: str | Address | None = None, *, key: str | None = None) -> None:
        """``address``: as ``edge-rt serve --listen`` takes it, else the user's own. ``key``: for TCP."""
        self.address = addresses.parse(address) if isinstance(address, str) else address or addresses.default_address()
        self._key = key
        self._protocol = ClientProtocol()
        self._writer: asyncio.StreamWriter | None = None
        self._changed = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self.hello: Message = {}  # what the daemon said of itself: version, server, capabilities, limits

    async def connect(self) -> None:
        reader, hello = await self._open()
        self._reading = asyncio.get_running_loop().create_task(self._read(reader, hello))
        while not hello.over:
            await self._wait()
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
        return reader, self._ask("hello", hello_fields(self._key))

    async def call(self, op: str, **fields: Any) -> Message:
        """Ask, and wait for the answer."""
        answers = self._ask(op, fields)
        while not answers.over:
            await self._wait()
        return answers.result()

    async def generate(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        session: str | None = None,
        model: str | None = None,
        priority: str = "normal",
        resumable: bool = False,
        **options: Any,
    ) -> AsyncIterator[Event]:
        """Answer a prompt: events as they happen, the last one Done; see ``Client.generate``.

        ``session``: the id of one, as ``open_session`` gives it.
        """
        answers = self._ask("generate", generate_fields(prompt, session, model, priority, resumable, options))
        try:
            while True:
                while (event := answers.take()) is not None:
                    yield event
                if answers.over:
                    break
                await self._wait()
            answers.result()
        finally:
            if not answers.over:
                self._protocol.cancel(answers)
                self._flush()

    async def embed(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        model: str | None = None,
        pooling: str | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
    ) -> list[list[float]]:
        """Embeddings of texts, or of their tokens; see ``Client.embed``."""
        return [one["embedding"] for one in await self._readings("embed", embed_fields(texts, model, pooling, normalize, dimensions))]

    async def score(
        self, texts: Sequence[str | Sequence[int]], *, before: str | Sequence[ChatMessage] | None = None, model: str | None = None,
        top: int = 0, beyond: bool = False,
    ) -> list[Message]:  # fmt: skip
        """How likely the model finds texts; see ``Client.score``."""
        events = await self._readings("score", score_fields(texts, before, model, top, beyond))
        return [score for event in events for score in event["scores"]]

    async def _readings(self, op: str, fields: Message) -> list[Message]:
        answers = self._ask(op, fields)
        try:
            while not answers.over:
                await self._wait()
        finally:
            if not answers.over and self._writer is not None:
                self._ask("cancel", {"request": answers.request})
        answers.result()
        return answers.readings

    async def feedback(
        self, prompt: str | Sequence[ChatMessage], answer: str, *, rating: int | None = None, correction: str | None = None,
        comment: str | None = None, model: str | None = None,
    ) -> None:  # fmt: skip
        """Say what an answer was worth; see ``Client.feedback``."""
        await self.call("feedback", **feedback_fields(prompt, answer, rating, correction, comment, model))

    async def saved(self) -> list[Message]:
        found: list[Message] = (await self.call("list_saved"))["saved"]
        return found

    async def delete_saved(self, name: str) -> None:
        await self.call("delete_saved", name=name)

    def _ask(self, op: str, fields: Mapping[str, Any]) -> Reply:
        if self._writer is None:
            raise DaemonError("disconnected", "the connection was closed; connect again")
        answers = self._protocol.ask(op, fields)
        self._flush()
        return answers

    def _flush(self) -> None:
        if self._writer is not None and (data := self._protocol.to_send()):
            self._writer.write(data)

    async def _wait(self) -> None:
        await self._changed.wait()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _read(self, reader: asyncio.StreamReader, hello: Reply) -> None:
        """Take what comes; when the connection breaks, connect again, as long as there are streams to go on with."""
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
                pass  # it broke, which is the same as its end
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
            try:
                await writer.wait_closed()
            except OSError:
                return  # it is closed all the same

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
    """Why there was no greeting, None if there was. It is over."""
    try:
        hello.result()
    except DaemonError as error:
        return error
    return None
