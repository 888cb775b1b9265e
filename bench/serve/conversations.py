"""Conversations of several users of one daemon, each with a word that only it may ever hear: over the socket, over TCP and over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import secrets
import socket
import string
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench.serve.served import Served, user
from edge_rt.daemon.client import Client
from edge_rt.daemon.client import Session as ClientSession
from edge_rt.errors import DaemonError
from edge_rt.types import Delta, Done

KEYS = {name: secrets.token_hex(16) for name in ("tcp", "http")}
"""The keys of those who have no user id here."""
_ASKED = (
    "What is the code word?", "Say the code word once more.", "Name a river and a town on it.", "Tell me about bread.",
    "Which colours has the sea?", "What did I ask before?", "Who keeps a lighthouse?", "Write one line about winter.",
    "How does a clock work?", "Repeat my last question.",
)  # fmt: skip
_PATIENCE = 120.0


class Turn(NamedTuple):
    """What was asked and answered. ``whole``: nothing of the conversation was out of the context. ``heard``: all text that came."""

    messages: list[dict[str, str]]
    text: str
    tokens: tuple[int, ...]
    reused: int
    whole: bool
    heard: str


class Refused(Exception):
    """An error; ``code`` is the protocol's or HTTP's, and its text is all that came."""

    def __init__(self, code: str, heard: str) -> None:
        super().__init__(heard)
        self.code = code


@dataclass(eq=False)
class Conversation:
    """``user``: ``socket``, ``tcp`` or ``http``. ``session`` is none over HTTP, where sessions have names."""

    user: str
    daemon: Served
    address: str
    word: str
    messages: list[dict[str, str]] = field(default_factory=list)
    client: Client | None = None
    session: ClientSession | None = None

    def open(self) -> None:
        """Connect, and open a session."""
        if self.user != "http":
            key = KEYS["tcp"] if self.user == "tcp" else None
            self.client = self.client or Client(self.address, key=key, timeout=_PATIENCE)
            self.session = self.client.session()

    def close(self) -> None:
        """Leave."""
        if self.client is not None:
            self.client.close()
        self.client = self.session = None

    def question(self, chance: random.Random) -> list[dict[str, str]]:
        """The conversation with another question."""
        return [*self.messages, user(chance.choice(_ASKED))]

    def ask(
        self,
        messages: list[dict[str, str]],
        tokens: int,
        session: ClientSession | None = None,
        leave_after: int | None = None,
        **options: Any,
    ) -> Turn:
        """An answer, in a session. ``leave_after``: so many events, then it is cancelled. Raises Refused."""
        options |= {"max_tokens": tokens, "temperature": 0}
        if self.user == "http":
            return _over_http(self, messages, {**options, "stream": leave_after is not None}, leave_after)
        assert self.client is not None, "it is open"
        text, done = "", None
        ids: list[int] = []
        heard: list[str] = []
        events = self.client.generate(messages, session=session or self.session, **options)
        try:
            for number, event in enumerate(events):
                heard.append(repr(event))
                if isinstance(event, Delta):
                    text += event.text
                    ids += event.tokens
                elif isinstance(event, Done):
                    done = event
                if leave_after is not None and number >= leave_after:
                    break
        except DaemonError as error:
            raise Refused(error.code, f"{' '.join(heard)} {error}") from error
        finally:
            events.close()
        if done is None:
            return Turn(messages, text, tuple(ids), 0, False, " ".join([*heard, text]))
        whole = not done.context.absent_tokens and not done.context.missing_cells and not done.context.evicted_tokens
        return Turn(messages, text, tuple(ids), done.usage.reused_tokens, whole, " ".join([*heard, text]))

    def fresh(self, messages: list[dict[str, str]]) -> Turn:
        """An answer outside of all sessions, of one token. Raises Refused."""
        if self.user == "http":
            return _over_http(self, messages, {"max_tokens": 1, "temperature": 0}, None, named=False)
        assert self.client is not None, "it is open"
        session, self.session = self.session, None
        try:
            return self.ask(messages, 1)
        finally:
            self.session = session


def begin(kind: str, daemon: Served, address: str, chance: random.Random) -> Conversation:
    """A conversation that begins with a word nobody else has: no other's beginning is the same from its first letters on."""
    word = "".join(chance.choices(string.ascii_uppercase, k=9))
    found = Conversation(kind, daemon, address, word)
    told = f"{word} is the code word of this conversation. Tell it whenever you are asked for it."
    found.messages = [{"role": "system", "content": told}]
    found.open()
    return found


# ---- HTTP ------------------------------------------------------------------------------------------------------------


def _over_http(
    one: Conversation, messages: list[dict[str, str]], options: dict[str, Any], leave_after: int | None, *, named: bool = True
) -> Turn:  # fmt: skip
    more = {name: options.pop(name) for name in ("prune",) if name in options} | ({"session": one.word} if named else {})
    body = {"messages": messages, **options, "edge_rt": more}
    until = time.monotonic() + _PATIENCE
    while True:
        status, heard = _post(one.daemon, body, leave_after)
        if status != 503 or time.monotonic() > until:
            break
        time.sleep(0.1)  # the worker was ended, and the model is being opened
    if leave_after is not None:
        return Turn(messages, "", (), 0, False, heard)
    answer = json.loads(heard)
    if status != 200:
        raise Refused(str(answer["error"]["code"]), heard)
    facts, context = answer["edge_rt"], answer["edge_rt"]["context"]
    whole = not context["absent_tokens"] and not context["missing_cells"] and not context["evicted_tokens"]
    text = answer["choices"][0]["message"]["content"]
    return Turn(messages, text, (), facts["usage"]["reused_tokens"], whole, heard)


def _post(daemon: Served, body: dict[str, Any], leave_after: int | None) -> tuple[int, str]:
    with _connection(daemon) as connection:
        headers = {"Authorization": f"Bearer {KEYS['http']}"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if leave_after is not None and answer.status == 200:
            return 200, b"".join(answer.readline() for _ in range(2 * leave_after)).decode(errors="replace")
        return answer.status, answer.read().decode()


@contextlib.contextmanager
def _connection(daemon: Served) -> Iterator[http.client.HTTPConnection]:
    found = http.client.HTTPConnection("localhost", timeout=_PATIENCE)
    found.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(found):
        found.sock.settimeout(_PATIENCE)
        found.sock.connect(str(daemon.http))
        yield found


def metrics(daemon: Served) -> str:
    """What is told to monitors."""
    with _connection(daemon) as connection:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEYS['http']}"})
        return connection.getresponse().read().decode()
