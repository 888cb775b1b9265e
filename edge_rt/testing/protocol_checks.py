"""What a server of docs/protocol.md must do with frames, hello and requests; for edge_rt/testing/protocol_conformance.py."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from edge_rt.testing.protocol_peer import Broken, Message, Peer, encode, error_is, expect, family_of, frame

OPS = (
    "hello", "generate", "cancel", "resume", "ack", "open_session", "close_session", "clone_session", "save_session", "restore_session",
    "list_saved", "delete_saved", "tokenize", "detokenize", "embed", "status", "metrics", "reload_rules", "load_model", "unload_model",
)  # fmt: skip
LIMITS = ("frame_bytes", "requests_per_connection", "requests_per_second", "credits", "resume_within")
BEFORE_HELLO = 4096


class Server(NamedTuple):
    """The server that is checked. ``seconds``: of one wait."""

    address: str
    key: str | None
    seconds: float

    def connect(self) -> Peer:
        """A connection in which nothing was said. Raises OSError."""
        family, name = family_of(self.address)
        made = socket.socket(family)
        made.settimeout(self.seconds)
        made.connect(name)
        return Peer(made, self.seconds)

    def hello(self, **fields: Any) -> Message:
        """The fields of hello."""
        return {"versions": [1], "client": "conformance", **({"key": self.key} if self.key is not None else {}), **fields}

    def peer(self) -> Peer:
        """A connection in which hello was said."""
        found = self.connect()
        found.hello = found.ok("hello", **self.hello())
        return found


Check = Callable[[Server], None]
"""Its name says what must hold. Raises Broken where it does not."""


# ---- hello -----------------------------------------------------------------------------------------------------------


def hello_says_what_there_is(server: Server) -> None:
    with server.peer() as peer:
        expect(peer.hello.get("version") == 1, f"the version is {peer.hello.get('version')}, and not 1")
        expect(isinstance(peer.hello.get("server"), str), "server is no text")
        missing = [op for op in OPS if op not in peer.hello.get("capabilities", [])]
        expect(not missing, f"the capabilities lack {', '.join(missing)}")
        for name in LIMITS:
            expect(isinstance(peer.hello.get("limits", {}).get(name), (int, float)), f"the limits have no {name}")


def the_highest_common_version_is_chosen(server: Server) -> None:
    with server.connect() as peer:
        expect(peer.ok("hello", **server.hello(versions=[0, 1, 77]))["version"] == 1, "of the versions 0, 1 and 77, 1 is not chosen")


def without_a_common_version_the_connection_ends(server: Server) -> None:
    with server.connect() as peer:
        error = peer.refused("unsupported_version", "hello", **server.hello(versions=[77, 78]))
        expect(1 in error.get("supported", []), "the error has no list `supported` with 1 in it")
        expect(peer.ended() == [], "something follows unsupported_version")


def hello_is_the_first_request_and_said_once(server: Server) -> None:
    with server.connect() as peer:
        peer.refused("bad_request", "status")
    with server.peer() as peer:
        peer.refused("bad_request", "hello", **server.hello())
        peer.ok("status")


# ---- frames ----------------------------------------------------------------------------------------------------------


def frames_may_be_split_at_every_byte(server: Server) -> None:
    with server.peer() as peer:
        data = frame({"id": 900, "op": "tokenize", "text": "Hello"})
        expected: Message | None = None
        for at in range(1, len(data)):
            _slowly(peer)
            peer.write(data[:at])
            time.sleep(0.001)
            peer.write(data[at:])
            answer = peer.message_of(900)
            expect("ok" in answer, f"a frame in two parts, split after {at} bytes, was answered {answer}")
            expect(answer == (expected or answer), f"split after {at} bytes, tokenize has another answer")
            expected = answer
        for i in range(len(data)):
            peer.write(data[i : i + 1])
        expect(peer.message_of(900) == expected, "sent byte by byte, tokenize has another answer")
    with server.connect() as peer:
        data = frame({"id": 1, "op": "hello", **server.hello()})
        for i in range(len(data)):
            peer.write(data[i : i + 1])
        expect("ok" in peer.message_of(1), "hello, sent byte by byte, is refused")


def _slowly(peer: Peer) -> None:
    """Not more requests than the server allows."""
    rate = peer.hello["limits"]["requests_per_second"]
    time.sleep(1 / rate if rate else 0)


def many_frames_may_come_at_once(server: Server) -> None:
    with server.peer() as peer:
        numbers = range(100, 100 + min(20, int(peer.hello["limits"]["requests_per_connection"])))
        peer.write(b"".join(frame({"id": number, "op": "detokenize", "tokens": [number]}) for number in numbers))
        answers = [peer.message() for _ in numbers]
        expect(sorted(one.get("id", -1) for one in answers) == list(numbers), "requests that came at once are not answered once each")


def frames_have_a_longest_length(server: Server) -> None:
    with server.connect() as peer:
        body = len(encode({"id": 1, "op": "hello", **server.hello(client="x" * 100)}))
        hello = server.hello(client="x" * (BEFORE_HELLO - body + 100))
        expect(len(encode({"id": 1, "op": "hello", **hello})) == BEFORE_HELLO, "the check's own frame has another length")
        peer.ok("hello", **hello)
    with server.connect() as peer:
        _last_words(peer, struct.pack(">I", BEFORE_HELLO + 1), "frame_too_long")
    with server.peer() as peer:
        most = int(peer.hello["limits"]["frame_bytes"])
        rest = len(encode({"id": 2, "op": "sing", "text": "x" * 100})) - 100
        peer.number = 1
        peer.refused("unknown_op", "sing", text="x" * (most - rest))
        _last_words(peer, struct.pack(">I", most + 1), "frame_too_long")


def what_is_no_message_ends_the_connection(server: Server) -> None:
    deep = b"\x83\xa2id\x05\xa2op\xa4sing\xa1x"
    for name, body in (
        ("an empty frame", b""),
        ("a list", b"\x90"),
        ("a number", b"\x01"),
        ("a map that ends too early", b"\x82\xa2id\x01"),
        ("a map with bytes after it", b"\x80\xc0"),
        ("a map with a number as key", b"\x81\x01\x01"),
        ("a text that is not UTF-8", b"\x81\xa1x\xa2\xff\xfe"),
        ("a value of no kind", b"\x81\xa1x\xc1"),
        ("an extension type", b"\x81\xa1x\xd4\x01\x00"),
        ("33 maps and lists within each other", deep + b"\x91" * 31 + b"\x90"),
        ("a thousand lists within each other", deep + b"\x91" * 1000 + b"\x90"),
    ):
        with server.peer() as peer:
            try:
                _last_words(peer, struct.pack(">I", len(body)) + body, "bad_frame")
            except Broken as error:
                raise Broken(f"{name}: {error}") from None
    with server.peer() as peer:
        body = deep + b"\x91" * 30 + b"\x90"
        peer.write(struct.pack(">I", len(body)) + body)
        error_is(peer.message_of(5), "unknown_op", "32 maps and lists within each other")


def _last_words(peer: Peer, data: bytes, code: str) -> None:
    """These bytes are answered with an error without an id, and the end of the connection."""
    peer.write(data)
    found = peer.ended()
    expect(len(found) == 1, f"{len(found)} messages came before the connection ended, and not one")
    error_is(found[0], code, "it")
    expect(found[0].get("id", 0) is None, "the error before the connection's end has an id")


# ---- requests --------------------------------------------------------------------------------------------------------


def what_is_not_in_the_document_is_an_error(server: Server) -> None:
    with server.peer() as peer:
        peer.refused("unknown_op", "sing")
        peer.refused("unknown_op", "Status")
        peer.refused("bad_request", "status", colour="red")
        peer.refused("bad_request", "tokenize", text="x", colour=None)
        peer.refused("bad_request", "tokenize")
        peer.refused("bad_request", "tokenize", text=None)
        for fields in ({"text": 3}, {"text": "x", "special": 1}, {"text": ["x"]}):
            peer.refused("bad_request", "tokenize", **fields)
        for tokens in ([-1], ["1"], 1, [True], [0.5]):
            peer.refused("bad_request", "detokenize", tokens=tokens)
        peer.ok("tokenize", text="x", special=None)


def ids_are_whole_numbers(server: Server) -> None:
    with server.peer() as peer:
        for number in (0, 2**53 - 1):
            peer.send({"id": number, "op": "status"})
            expect("ok" in peer.message_of(number), f"the id {number} is refused")
        for wrong in (-1, 2**53, 1.5, "1", True, [1], None):
            peer.send({"id": wrong, "op": "status"})
            error_is(peer.message(), "bad_request", f"the id {wrong!r}")
        peer.send({"op": "status"})
        error_is(peer.message(), "bad_request", "a request without an id")
        peer.ok("status")


def text_and_tokens(server: Server) -> None:
    with server.peer() as peer:
        for text in ("", "Hello, world", "Grüße aus 東京 \U0001f600", "a\nb\tc\x00d"):
            tokens = peer.ok("tokenize", text=text)["tokens"]
            expect(isinstance(tokens, list) and all(isinstance(one, int) for one in tokens), "tokens is no list of whole numbers")
            again = peer.ok("detokenize", tokens=tokens)["text"]
            expect(again.endswith(text), f"{text!r} comes back from its tokens as {again!r}")


def status_and_metrics(server: Server) -> None:
    with server.peer() as peer:
        status = peer.ok("status")
        for part, fields in (
            ("server", ("version", "pid", "uptime", "draining", "connections", "sessions", "requests", "held_bytes")),
            ("worker", ("state", "pid", "deaths")),
            ("model", ("path", "engine", "device", "architecture", "context", "vocabulary", "notices")),
        ):
            missing = [name for name in fields if name not in status.get(part, {})]
            expect(not missing, f"{part} in the status lacks {', '.join(missing)}")
        expect("rules" in status, "the status has no rules")
        before = peer.ok("metrics")
        for name in ("requests", "errors", "connections", "tokens", "worker_deaths", "uptime"):
            expect(name in before, f"the metrics lack {name}")
        peer.ok("status")
        expect(peer.ok("metrics")["requests"]["status"] > before["requests"]["status"], "a request is not counted in the metrics")


def a_client_that_breaks_off_harms_nobody(server: Server) -> None:
    for data in (b"", b"\x00\x00", struct.pack(">I", 100) + b"\x81", b"\xff" * 50):
        with server.connect() as peer:
            peer.write(data)
        with server.peer() as peer:
            peer.write(data[:3])
    with server.peer() as peer:
        peer.socket.shutdown(socket.SHUT_WR)
        peer.ended()
    with server.peer() as peer:
        peer.ok("status")


CHECKS: tuple[Check, ...] = (
    hello_says_what_there_is,
    the_highest_common_version_is_chosen,
    without_a_common_version_the_connection_ends,
    hello_is_the_first_request_and_said_once,
    frames_may_be_split_at_every_byte,
    many_frames_may_come_at_once,
    frames_have_a_longest_length,
    what_is_no_message_ends_the_connection,
    what_is_not_in_the_document_is_an_error,
    ids_are_whole_numbers,
    text_and_tokens,
    status_and_metrics,
    a_client_that_breaks_off_harms_nobody,
)
