"""The clients of the soak. Each function is one round of one client: it comes, does what clients do, and goes."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import time
from collections.abc import Callable
from typing import Any

from bench.serve.served import GREEDY, Served, say, user
from edge_rt.errors import DaemonError
from edge_rt.types import Delta

RULES = """pipeline = ["terminology", "punctuation"]
[terminology.terms]
"lighthouse" = "{term}"
"""
_TOPICS = ("rivers", "the sea", "bread", "a lighthouse", "winter", "clocks", "the moon", "glass", "maps", "an old bridge")
_SCHEMA = {
    "type": "object", "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}}, "required": ["n", "ok"],
    "additionalProperties": False,
}  # fmt: skip
_PATIENCE = 60.0


class Unexpected(Exception):
    """An answer that should have been another."""


def _expect(true: bool, what: str) -> None:
    if not true:
        raise Unexpected(what)


def chats(daemon: Served, chance: random.Random) -> None:
    """A conversation of several turns in a session, which is cloned, saved and restored on the way."""
    name = f"soak-{chance.randrange(4)}"
    with daemon.client() as client, client.session() as session:
        messages = [user(f"Tell me about {chance.choice(_TOPICS)}.")]
        for turn in range(chance.randrange(2, 5)):
            answer = say(client, messages, chance.randrange(8, 32), session=session)
            _expect(answer.done.usage.completion_tokens > 0, "an answer without tokens")
            messages += [{"role": "assistant", "content": answer.text}, user(f"And what of {chance.choice(_TOPICS)}?")]
            if turn == 1:
                with session.clone() as other:
                    say(client, messages, 8, session=other)
                session.save(name)
                with client.restore(name) as again:
                    say(client, messages, 8, session=again)


def completes(daemon: Served, chance: random.Random) -> None:
    """Single requests without a session: texts, sampled ones, log-probabilities, priorities, tokens and back."""
    with daemon.client() as client:
        prompt = f"{chance.randrange(1000)} facts about {chance.choice(_TOPICS)}:"
        say(client, prompt, chance.randrange(4, 40), priority=chance.choice(["low", "normal", "high"]))
        seed, logprobs = chance.randrange(1 << 30), chance.choice([0, 3])
        list(client.generate(prompt, max_tokens=8, temperature=0.9, top_p=0.9, seed=seed, logprobs=logprobs))
        tokens = client.call("tokenize", text=prompt)["tokens"]
        _expect(client.call("detokenize", tokens=tokens)["text"] == prompt, "a text that is another after tokenizing")


def binds(daemon: Served, chance: random.Random) -> None:
    """An answer that a schema binds, and mistakes that are answered with the right errors."""
    with daemon.client() as client:
        text = say(client, f"Number {chance.randrange(9)} as JSON: ", 48, json_schema=_SCHEMA, ignore_eos=False).text
        with contextlib.suppress(ValueError):  # cut off by the number of tokens
            _expect(set(json.loads(text)) == {"n", "ok"}, f"a schema was not kept: {text!r}")
        for fields, code in (({"grammar": "root ::= ["}, "constraint"), ({"top_p": 7.0}, "option"), ({"context": 10**9}, "option")):
            try:
                list(client.generate("x", max_tokens=2, **fields))
            except DaemonError as error:
                _expect(error.code == code, f"{fields} was answered {error.code}: {error}")
            else:
                raise Unexpected(f"{fields} was done")


def cancels(daemon: Served, chance: random.Random) -> None:
    """Leaves the answer, at its beginning or while a long prompt is read."""
    with daemon.client() as client:
        prompt = "far away " * chance.randrange(1, 200)
        events = client.generate(f"{chance.random()} {prompt}", **GREEDY, max_tokens=500)
        for _ in range(chance.randrange(1, 10)):
            next(events)
        events.close()


def vanishes(daemon: Served, chance: random.Random) -> None:
    """Closes the connection in the middle; with a stream that can be resumed, comes back for it."""
    client = daemon.client()
    if chance.random() < 0.5:
        events = client.generate("Once upon a time", **GREEDY, max_tokens=500)
        for _ in range(chance.randrange(1, 10)):
            next(events)
        client.close()
        return
    with client:
        events, text = client.generate("Once upon a time", **GREEDY, max_tokens=24, resumable=True), ""
        for number, event in enumerate(events):
            text += event.text if isinstance(event, Delta) else ""
            if number == 5 and client._socket is not None:
                client._socket.shutdown(socket.SHUT_RDWR)
        _expect(len(text) > 20, f"a stream that was resumed has the text {text!r}")


def asks_over_http(daemon: Served, chance: random.Random) -> None:
    """OpenAI's API: a chat with a named session, as a whole and as a stream that is left; metrics."""
    body: dict[str, Any] = {"messages": [user(f"Name one of {chance.choice(_TOPICS)}.")], "max_tokens": 12, "temperature": 0}
    status, answer = _http(daemon, "POST", "/v1/chat/completions", body)
    _expect(status == 200 and bool(answer), f"HTTP {status}: {answer[:200]!r}")
    connection = _connection(daemon)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "Once", "max_tokens": 200, "stream": True}))
        connection.getresponse().read(chance.randrange(1, 2000))
    for path in ("/metrics", "/health", "/v1/models"):
        status, answer = _http(daemon, "GET", path, None)
        _expect(status == 200, f"{path}: HTTP {status}: {answer[:200]!r}")
    status, answer = _http(daemon, "POST", "/v1/chat/completions", {"messages": []})
    _expect(status == 400, f"no messages: HTTP {status}")


def _connection(daemon: Served) -> http.client.HTTPConnection:
    found = http.client.HTTPConnection("localhost", timeout=_PATIENCE)
    found.sock = socket.socket(socket.AF_UNIX)
    found.sock.settimeout(_PATIENCE)
    found.sock.connect(str(daemon.http))
    return found


def _http(daemon: Served, method: str, path: str, body: Any) -> tuple[int, bytes]:
    with contextlib.closing(_connection(daemon)) as connection:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read()


def metrics(daemon: Served) -> str:
    """What is told to monitors. Raises Unexpected."""
    status, answer = _http(daemon, "GET", "/metrics", None)
    _expect(status == 200, f"HTTP {status}")
    return answer.decode()


def watches(daemon: Served, chance: random.Random) -> None:
    """A monitor: status and metrics; now and then it changes the rules of post-processing."""
    with daemon.client() as client:
        for _ in range(5):
            _expect(client.status()["worker"]["state"] == "ready", "the worker is not ready")
            client.call("metrics")
            time.sleep(0.1)
        write_rules(daemon, f"beacon {chance.randrange(10**6)}")
        client.call("reload_rules")


def write_rules(daemon: Served, term: str) -> None:
    """Rules of post-processing with a term to write instead of another."""
    part = daemon.folder / "rules.part"
    part.write_text(RULES.format(term=term))
    part.replace(daemon.folder / "rules.toml")


ACTORS: tuple[Callable[[Served, random.Random], None], ...] = (
    chats, chats, completes, binds, cancels, vanishes, asks_over_http, watches,
)  # fmt: skip
