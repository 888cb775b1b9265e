"""What a server of docs/protocol.md must do with texts to embed; for edge_rt/testing/protocol_conformance.py."""

from __future__ import annotations

import math
from typing import Any

from edge_rt.testing.protocol_checks import Check, Server
from edge_rt.testing.protocol_peer import Message, Peer, error_is, expect
from edge_rt.testing.protocol_stream_checks import nothing_under_way

TEXTS = ["Hello", "Once upon a time there was a river", "Hello", "東京"]
MANY = 500
"""Texts: more than a test waits for."""
ROUNDING = 1e-3


def _messages(peer: Peer, **fields: Any) -> list[Message]:
    """All that is answered, the answer last."""
    number = peer.ask("embed", **fields)
    found = [peer.message_of(number)]
    while "event" in found[-1]:
        found.append(peer.message_of(number))
    return found


def _embed(peer: Peer, texts: list[Any], name: str = "texts", **fields: Any) -> tuple[list[list[float]], Message]:
    """Embeddings, as they must be for these texts, and the answer."""
    *events, last = _messages(peer, **{name: texts}, **fields)
    answer: Message = last.get("ok", {})
    expect("ok" in last, f"embed was answered {last}")
    expect([one.get("event") for one in events] == ["embedding"] * len(texts), "there is not one event `embedding` for each text")
    expect([one.get("index") for one in events] == list(range(len(texts))), "index does not count the texts")
    rows = [one["embedding"] for one in events]
    for row in rows:
        expect(isinstance(row, list) and all(isinstance(x, float) and math.isfinite(x) for x in row), "an embedding is no list of numbers")
        expect(len(row) == answer.get("dimensions"), f"dimensions are {answer.get('dimensions')}, and an embedding has {len(row)} numbers")
    expect(all(one.get("tokens", 0) > 0 for one in events), "a text has no tokens")
    expect(answer.get("tokens") == sum(one["tokens"] for one in events), "the answer's tokens are not those of all texts")
    return rows, answer


def _dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _same(a: list[float], b: list[float], what: str) -> None:
    expect(len(a) == len(b) and all(abs(x - y) < ROUNDING for x, y in zip(a, b, strict=True)), f"{what} changes an embedding")


def each_text_has_an_embedding(server: Server) -> None:
    with server.peer() as peer:
        rows, answer = _embed(peer, TEXTS)
        expect(answer.get("pooling") in ("mean", "cls", "last"), f"the pooling is {answer.get('pooling')}")
        for row in rows:
            expect(abs(_dot(row, row) - 1) < ROUNDING, "an embedding has another length than 1")
        _same(rows[0], rows[2], "a text before it")
        expect(_dot(rows[0], rows[1]) < 1 - 1e-6, "different texts have the same embedding")
        for text, row in zip(TEXTS, rows, strict=True):
            _same(_embed(peer, [text])[0][0], row, "other texts in the request")


def embeddings_are_made_as_asked(server: Server) -> None:
    with server.peer() as peer:
        (row,), answer = _embed(peer, TEXTS[:1])
        for pooling in ("mean", "cls", "last"):
            _, told = _embed(peer, TEXTS[:1], pooling=pooling)
            expect(told["pooling"] == pooling, f"the answer to pooling {pooling} says {told['pooling']}")
        _same(_embed(peer, TEXTS[:1], pooling=answer["pooling"])[0][0], row, "naming the model's own pooling")
        (raw,), _ = _embed(peer, TEXTS[:1], normalize=False)
        length = math.sqrt(_dot(raw, raw))
        _same([x / length for x in raw], row, "more than its length: normalize")
        half = max(1, len(row) // 2)
        (short,), told = _embed(peer, TEXTS[:1], dimensions=half)
        expect(told["dimensions"] == half, "the answer has other dimensions than asked for")
        length = math.sqrt(_dot(row[:half], row[:half]))
        _same([x / length for x in row[:half]], short, "more than its end: dimensions")


def tokens_are_embedded_as_they_are(server: Server) -> None:
    with server.peer() as peer:
        tokens = [peer.ok("tokenize", text=text)["tokens"] for text in TEXTS[:2]]
        rows, answer = _embed(peer, tokens, "tokens")
        expect(answer["tokens"] == sum(map(len, tokens)), "other tokens were embedded than asked for")
        expect(_dot(rows[0], rows[1]) < 1 - 1e-6, "different tokens have the same embedding")


def what_cannot_be_embedded_has_a_code(server: Server) -> None:
    with server.peer() as peer:
        context = peer.ok("status")["model"]["context"]
        for code, fields in (
            ("bad_request", {}),
            ("bad_request", {"texts": ["x"], "tokens": [[1]]}),
            ("bad_request", {"texts": "x"}),
            ("bad_request", {"tokens": [1]}),
            ("bad_request", {"tokens": [[-1]]}),
            ("option", {"texts": []}),
            ("option", {"texts": ["x", ""]}),
            ("option", {"tokens": [[1 << 50]]}),
            ("option", {"texts": ["x"], "pooling": "max"}),
            ("option", {"texts": ["x"], "dimensions": 0}),
            ("option", {"texts": ["x"], "dimensions": 1 << 40}),
        ):
            error_is(_only(_messages(peer, **fields)), code, f"embed with {fields}")
        error = error_is(_only(_messages(peer, tokens=[[1], [1] * (context + 1)])), "context_overflow", "a text longer than the context")
        expect(error.get("needed") == context + 1 and error.get("available") == context, "the error does not say how much is too much")
        _embed(peer, ["x"])


def _only(messages: list[Message]) -> Message:
    expect(len(messages) == 1, "something was embedded before the error")
    return messages[0]


def embedding_is_cancelled(server: Server) -> None:
    with server.peer() as peer:
        number = peer.ask("embed", texts=TEXTS[1:2] * MANY)
        expect(peer.message_of(number).get("event") == "embedding", "the first message is not an embedding")
        cancel = peer.ask("cancel", request=number)
        found, events = False, 1
        while True:
            message = peer.message()
            if message.get("id") == cancel:
                found = message["ok"]["found"]
            elif "event" not in message:
                error_is(message, "cancelled", "what was cancelled")
                break
            else:
                events += 1
        expect(found, "cancel does not find what is being embedded")
        expect(events < MANY, "all was embedded after cancel")
        _embed(peer, ["x"])


def leaving_ends_what_is_embedded(server: Server) -> None:
    with server.peer() as peer:
        number = peer.ask("embed", texts=TEXTS[1:2] * MANY)
        peer.message_of(number)
    nothing_under_way(server, 5, "what a client that left wanted embedded")


CHECKS: tuple[Check, ...] = (
    each_text_has_an_embedding,
    embeddings_are_made_as_asked,
    tokens_are_embedded_as_they_are,
    what_cannot_be_embedded_has_a_code,
    embedding_is_cancelled,
    leaving_ends_what_is_embedded,
)
