"""A small server in OpenAI's form, whose answers do what the last message says. As a program it listens at the port that it is given."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n"


class Peer:
    """``bodies``: what it was asked, in order. ``running``: how many it answers now. ``usage``: whether it counts tokens in every chunk."""

    def __init__(self, owner: str = "somebody", usage: bool = False, path: Path | None = None) -> None:
        self.owner, self.usage, self.path = owner, usage, path
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.running = self.most = self.left = 0
        self.before: Callable[[dict[str, Any]], Awaitable[None]] | None = None
        """Waited for before an answer begins."""
        self.port = 0

    async def __aenter__(self) -> Peer:
        if self.path is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]
        else:
            self._server = await asyncio.start_unix_server(self._serve, str(self.path))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}" if self.path is None else f"unix:{self.path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            self.keys.append(fields.get("authorization", ""))
            method, path, _ = head[0].split()
            if method == "GET":
                self._tell(writer, path)
            else:
                await self._answer(json.loads(body), reader, writer)
            await writer.drain()
        writer.close()

    def _tell(self, writer: asyncio.StreamWriter, path: str) -> None:
        found: dict[str, Any] = {"data": [{"id": "the-model", "owned_by": self.owner}]}
        if path == "/edge-rt/status":
            found = {"server": {"version": "9", "pid": None}, "worker": {"pid": None}}
        writer.write((HEAD.format(kind="application/json") + json.dumps(found)).encode())

    async def _answer(self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.bodies.append(body)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.before is not None:
                await self.before(body)
            what, _, argument = body["messages"][-1]["content"].partition(" ")
            await getattr(self, f"_{what}", self._say)(argument, reader, writer)
        finally:
            self.running -= 1

    def chunk(self, number: int, text: str, **more: Any) -> bytes:
        usage = {"usage": {"prompt_tokens": 5, "completion_tokens": 2 * number + 2}} if self.usage else {}
        chunk = {"choices": [{"delta": {"content": text}, "finish_reason": None}], **usage, **more}
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()

    END = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}], "timings": {"prompt_ms": 250}}\n\n'

    async def _say(self, words: str, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The words, a chunk each, then how many tokens they were: two each."""
        writer.write(HEAD.format(kind="text/event-stream").encode())
        for number, word in enumerate(words.split()):
            writer.write(self.chunk(number, word))
            await writer.drain()
            await asyncio.sleep(0)
        usage = {"prompt_tokens": 5, "completion_tokens": 2 * len(words.split())}
        writer.write(self.END + f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())

    async def _bytewise(self, argument: str, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """So many bytes at a time."""
        size, _space, words = argument.partition(" ")
        writer.write(HEAD.format(kind="text/event-stream").encode())
        data = self.chunk(0, words) + self.END + b"data: [DONE]\n\n"
        for at in range(0, len(data), int(size)):
            writer.write(data[at : at + int(size)])
            await writer.drain()
            await asyncio.sleep(0)

    async def _forever(self, _argument: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Words until the client goes away."""
        writer.write(HEAD.format(kind="text/event-stream").encode())
        while not reader.at_eof():
            writer.write(self.chunk(0, "on "))
            await writer.drain()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.02)
        self.left += 1

    async def _refuse(self, argument: str, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """With a status, and for how long the client is to stay away, if that is said."""
        status, _space, wait = argument.partition(" ")
        away = f"Retry-After: {wait}\r\n" if wait else ""
        error = {"error": {"code": "no_such_thing", "message": "there is none"}} if status == "400" else "busy"
        writer.write(f"HTTP/1.1 {status} No\r\nConnection: close\r\n{away}\r\n{json.dumps(error)}".encode())

    async def _drop(self, _argument: str, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD.format(kind="text/event-stream").encode() + self.chunk(0, "half"))

    async def _page(self, _argument: str, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((HEAD.format(kind="text/html") + "<html>data: nothing</html>").encode())

    async def _mumble(self, data: str, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((HEAD.format(kind="text/event-stream") + f"data: {data}\n\n").encode())

    async def _break(self, _argument: str, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD.format(kind="text/event-stream").encode() + self.chunk(0, "half"))
        writer.write(b'data: {"error": {"code": "worker_died", "message": "it died"}}\n\n')


async def main(port: int) -> None:
    peer = Peer()
    peer.port = port
    async with peer:
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
