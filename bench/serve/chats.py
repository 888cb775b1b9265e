"""Clients that cost little: one thread talks to a server for all of them and notes when what came.

They share the CPUs with the server, so they do no more than they must, and the same for every server.
"""

from __future__ import annotations

import json
import random
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from edge_rt.daemon.client.protocol import ClientProtocol, Reply, hello_fields
from edge_rt.types import Delta, Done

PATIENCE = 180.0
"""Seconds without anything from a server, after which it counts as hung."""
_WORDS = """
river stone garden window paper travel morning winter summer music letter market bridge forest island mountain kitchen engine village
school teacher doctor painter writer number colour water bread butter coffee silver golden yellow little strong simple quiet early
modern ancient family friend brother sister people country machine picture story answer question reason science
"""
"""Each is one token in most vocabularies."""


def prompt(words: int, seed: int) -> str:
    """A text that nothing else begins with. SmolLM2 takes about as many tokens for it as it has words, and 30 for the template."""
    chosen = random.Random(seed).choices(_WORDS.split(), k=words)
    return f"{seed}: tell a long story of " + " ".join(chosen)


class Chat(Protocol):
    """One request. ``times`` are those at which text came; ``tokens`` and ``prompt_tokens`` are known at its end."""

    socket: socket.socket
    sent: float
    times: list[float]
    tokens: int
    prompt_tokens: int
    ended: bool

    def begin(self) -> None:
        """Connect and ask. The time to connect is part of what one waits."""
        ...

    def took(self, data: bytes, now: float) -> None:
        """Bytes came. Raises RuntimeError for an error."""
        ...


class HttpChat:
    """A chat over HTTP with OpenAI's API, streamed."""

    def __init__(self, address: tuple[str, int], text: str, tokens: int, more: Mapping[str, Any]) -> None:
        """``more``: fields by which this server is told to go on after the end of its text."""
        self._address = address
        self.sent, self.times, self.tokens, self.prompt_tokens, self.ended = 0.0, list[float](), 0, 0, False
        body = json.dumps({
            "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **more,
        })  # fmt: skip
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._request = f"{head}Connection: close\r\n\r\n{body}".encode()
        self._begun, self._rest = False, b""

    def begin(self) -> None:
        """Connect and ask."""
        self.sent = time.perf_counter()
        self.socket = socket.create_connection(self._address)
        self.socket.sendall(self._request)

    def took(self, data: bytes, now: float) -> None:
        """Server-sent events are whole lines, and servers write each in a chunk of its own, whose length is a line without "data:"."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not self._begun and lines:
            self._begun = True
            if b" 200 " not in lines[0]:
                raise RuntimeError(f"a server refused: {data[-300:].decode(errors='replace')}")
        for line in lines:
            if line.startswith(b"data: {"):
                self._event(json.loads(line[6:]), now)
            self.ended |= line.startswith(b"data: [DONE]")
        self.ended |= not data
        if self.ended and not self.tokens:
            raise RuntimeError("a server broke an answer off")

    def _event(self, event: Mapping[str, Any], now: float) -> None:
        if "error" in event:
            raise RuntimeError(f"a server failed: {event['error']}")
        if any(choice["delta"].get("content") for choice in event["choices"]):
            self.times.append(now)
        if usage := event.get("usage"):
            self.tokens, self.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]


class OwnChat:
    """A chat by the daemon's own protocol over its socket."""

    def __init__(self, path: str, text: str, tokens: int) -> None:
        self._path = path
        self.sent, self.times, self.tokens, self.prompt_tokens, self.ended = 0.0, list[float](), 0, 0, False
        self._conversation = ClientProtocol()
        self._conversation.request("hello", hello_fields(None))
        self._fields = {
            "messages": [{"role": "user", "content": text}], "options": {"max_tokens": tokens, "temperature": 0, "ignore_eos": True},
        }  # fmt: skip
        self._answers: Reply | None = None

    def begin(self) -> None:
        """Connect and ask."""
        self.sent = time.perf_counter()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(self._path)
        self._answers = self._conversation.request("generate", self._fields)
        self.socket.sendall(self._conversation.to_send())

    def took(self, data: bytes, now: float) -> None:
        """Events are decoded as any client of ours does."""
        if not data:
            raise RuntimeError(f"the daemon has left: {self._conversation.disconnect_error()}")
        self._conversation.feed(data)
        if self._answers is None:
            return
        while (event := self._answers.next_event()) is not None:
            if isinstance(event, Delta) and event.text:
                self.times.append(now)
            elif isinstance(event, Done):
                self.tokens, self.prompt_tokens = event.usage.completion_tokens, event.usage.prompt_tokens
        if self._answers.over:
            self._answers.result()
            self.ended = True


def talk(chats: Sequence[Chat], late: Chat | None = None, after: int = 0) -> float:
    """Let all chats run to their end, ``late`` from when every other has ``after`` pieces of text; seconds from the first to the last.

    Raises RuntimeError for an error of the server's, and for one that says nothing any more.
    """
    started = time.perf_counter()
    with selectors.DefaultSelector() as ready:
        for chat in chats:
            _begin(ready, chat)
        while ready.get_map():
            events = ready.select(PATIENCE)
            if not events:
                raise RuntimeError(f"a server said nothing for {PATIENCE:g} seconds")
            for key, _ in events:
                _read(ready, key.data)
            if late is not None and all(len(chat.times) >= after for chat in chats):
                _begin(ready, late)
                late = None
    return time.perf_counter() - started


def _begin(ready: selectors.BaseSelector, chat: Chat) -> None:
    chat.begin()
    ready.register(chat.socket, selectors.EVENT_READ, chat)


def _read(ready: selectors.BaseSelector, chat: Chat) -> None:
    chat.took(chat.socket.recv(1 << 16), time.perf_counter())
    if chat.ended:
        ready.unregister(chat.socket)
        chat.socket.close()
