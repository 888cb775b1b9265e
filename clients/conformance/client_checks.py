"""What a client of docs/protocol.md must do: its program is run against servers that follow scripts.

What the program is given and must do is in docs/clients.md. ``conformance.py`` runs these checks.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from protocol_peer import OPS, ConformanceError, Message, Peer, encode, expect, frame

PROMPT, TOKENS = "Once upon a time", 12
TEXTS = ("It", " was", "", " \U0001f600", "\n", " 東京", " é", " or", " so", " they", " say", ".")
TEXT = "".join(TEXTS)
STREAM = "a-token_to-resume-by"
CREDITS = 64


def _events(texts: Sequence[str] = TEXTS) -> list[Message]:
    """The messages of a generation, without ids: all kinds of events, one of a later version, and the answer."""
    found: list[Message] = [{"event": "prompt", "done": 4, "total": 4, "reused": 0, "later": {"a": [None]}}, {"event": "mood", "text": "?"}]
    found.insert(0, {"event": "queued", "reason": "memory", "needed": 2**33, "available": 0})
    found += [{"event": "delta", "text": text, "tokens": [n, 200, 70_000]} for n, text in enumerate(texts)]
    found += [{"event": "notice", "message": "a notice"}, _done("max_tokens", len(texts)), {"ok": {}}]
    return found


def _done(reason: str, tokens: int) -> Message:
    usage = dict.fromkeys(("prompt_tokens", "reused_tokens", "computed_tokens", "drafted_tokens", "accepted_tokens"), 0)
    timings = {"first_token": 0.5, "prompt": 0.25, "decode": 1e-7, "total": 2.0, "tokens_per_second": None}
    return {
        "event": "done", "reason": reason, "usage": {**usage, "completion_tokens": tokens}, "timings": timings,
        "context": {"used": 16, "allowed": 2048, "later": -300}, "seed": 2**64 - 1, "stop": None, "post": [], "rules": None, "text": None,
    }  # fmt: skip


def _numbered(events: Sequence[Message], first: int = 1) -> list[Message]:
    return [{**event, "seq": seq} for seq, event in enumerate(events, first)]


class ClientConnection:
    """A client's connection at the server's end. Methods that read raise ConformanceError for what no client may send."""

    def __init__(self, peer: Peer) -> None:
        self.peer, self.acknowledged, self.sent, self._ids = peer, 0, 0, set[int]()

    def request(self, op: str) -> Message:
        """The next request that is no acknowledgement. Raises ConformanceError if it is not an ``op``."""
        while (message := self._read())["op"] == "ack":
            self._acknowledge(message)
        expect(message["op"] == op, f"the client asks {message}; {op} was expected")
        return message

    def _read(self) -> Message:
        message = self.peer.receive()
        if message is None:
            raise ConformanceError("the client has left before it had all")
        op = message.get("op")
        expect(op in OPS, f"the client asks for {op!r}, which is no operation")
        if op != "ack":
            number = message.get("id")
            expect(isinstance(number, int) and number not in self._ids, f"the id {number!r} is no new whole number")
            self._ids.add(message["id"])
        return message

    def _acknowledge(self, message: Message) -> None:
        expect(message.get("stream") == STREAM, f"{message} names no stream that there is")
        expect(self.acknowledged <= message.get("seq", -1) <= self.sent, f"{message} came after {self.acknowledged}; {self.sent} were sent")
        self.acknowledged = message["seq"]

    def acknowledge(self, seq: int) -> None:
        """Wait until the client has acknowledged the event numbered ``seq``."""
        while self.acknowledged < seq:
            message = self._read()
            expect(message["op"] == "ack", f"the client asks {message}; an acknowledgement of {seq} was expected")
            self._acknowledge(message)

    def answer_hello(self, credits: int) -> None:
        """The client must say hello, and gets an answer with the limits of this server."""
        number = self.receive_hello()
        limits = {"frame_bytes": 1 << 20, "requests_per_connection": 8, "requests_per_second": 0, "credits": credits, "resume_within": 30}
        self.send({"id": number, "ok": {"version": 1, "server": "script/1", "capabilities": list(OPS), "limits": limits}})

    def receive_hello(self) -> int:
        """The id of the client's hello."""
        hello = self.request("hello")
        expect(1 in hello.get("versions", []), f"{hello} does not have 1 as one of the versions")
        number: int = hello["id"]
        return number

    def generate(self, resumable: bool) -> int:
        """The id of the client's generate, whose fields must be those that the document asks for."""
        message = self.request("generate")
        expect(message.get("prompt") == PROMPT, f"the prompt is {message.get('prompt')!r}, and not {PROMPT!r}")
        expect(bool(message.get("resumable")) == resumable, f"resumable is {message.get('resumable')}, and not {resumable}")
        expected = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        expect(message.get("options") == expected, f"the options are {message.get('options')}, and not {expected}")
        number: int = message["id"]
        if resumable:
            self.send({"id": number, "event": "stream", "stream": STREAM})
        return number

    def resume(self, after: int) -> int:
        """The id of the client's resume."""
        message = self.request("resume")
        expect(message.get("stream") == STREAM and message.get("after") == after, f"{message} does not resume {STREAM} after {after}")
        self.acknowledged = self.sent = after
        number: int = message["id"]
        return number

    def send(self, *messages: Message) -> None:
        """Write messages in one piece."""
        self.peer.write(b"".join(map(frame, messages)))
        self.sent = max([self.sent, *(message.get("seq", 0) for message in messages)])

    def events(self, number: int, events: Sequence[Message]) -> None:
        """Write messages of the request ``number`` in one piece."""
        self.send(*({**event, "id": number} for event in events))

    def finish(self) -> None:
        """Answer the client's last request, and wait until it has left."""
        self.send({"id": self.request("status")["id"], "ok": {"server": {}}})
        while (message := self.peer.receive()) is not None:
            expect(message["op"] == "ack", f"the client asks {message} after its last request")
            self._acknowledge(message)
        self.peer.close()


class ScriptedServer:
    """A server on a Unix domain socket, whose every wait ends after ``seconds``."""

    def __init__(self, path: str, seconds: float) -> None:
        self.path, self._seconds = path, seconds
        self._listener: socket.socket | None = None

    def listen(self) -> None:
        """Create the socket and accept connections."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._listener.settimeout(self._seconds)

    def close(self) -> None:
        """Remove the socket, so that no client can connect; connections that were accepted stay."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            os.unlink(self.path)

    def accept(self) -> ClientConnection:
        """The client's next connection, in which nothing was said. Raises ConformanceError if none comes in time."""
        assert self._listener is not None, "listen first"
        try:
            return ClientConnection(Peer(self._listener.accept()[0], self._seconds))
        except TimeoutError:
            raise ConformanceError("the client does not connect") from None

    def welcome(self, credits: int = CREDITS) -> ClientConnection:
        """The client's next connection, after hello. ``credits``: events that may come without an acknowledgement."""
        client = self.accept()
        client.answer_hello(credits)
        return client


# ---- scripts ---------------------------------------------------------------------------------------------------------


def _answer_byte_by_byte(server: ScriptedServer) -> None:
    client = server.welcome()
    number = client.generate(resumable=False)
    for byte in b"".join(frame({**event, "id": number}) for event in _events()):
        client.peer.write(bytes([byte]))
    client.finish()


def _answer_at_once(server: ScriptedServer) -> None:
    client = server.welcome()
    number = client.generate(resumable=False)
    client.send({"id": 2**53 - 1, "event": "delta", "text": "another's", "tokens": []}, *({**event, "id": number} for event in _events()))
    client.finish()


def _answer_in_all_forms(server: ScriptedServer) -> None:
    """MessagePack has many forms for one value, and a client may choose none of the daemon's."""
    client = server.welcome()
    number = client.generate(resumable=False)
    numbers = [bytes([code]) + number.to_bytes(1 << (code & 3), "big") for code in (*range(0xCC, 0xD0), *range(0xD0, 0xD4))]
    texts = [b"\xd9%c", b"\xda\0%c", b"\xdb\0\0\0%c"]
    maps = [b"\x84", b"\xde\0\x04", b"\xdf\0\0\0\x04"]
    lists = [b"\x91", b"\xdc\0\x01", b"\xdd\0\0\0\x01"]
    for at, part in enumerate(TEXTS):
        data = part.encode()
        body = maps[at % 3] + encode("id") + numbers[at % 8] + encode("event") + texts[at % 3] % 5 + b"delta"
        body += encode("text") + texts[(at + 1) % 3] % len(data) + data + encode("tokens") + lists[at % 3] + numbers[at % 7]
        client.peer.write(struct.pack(">I", len(body)) + body)
    later = {"floats": [0.5, -math.inf, math.nan], "numbers": [2**64 - 1, -(2**63), -1], "others": [None, True, False, "x" * 70_000]}
    client.events(number, [{"event": "notice", "message": "", "later": later}, *_events()[-2:]])
    client.finish()


def _break_at_every_event(server: ScriptedServer) -> None:
    events = _numbered(_events())
    client = server.welcome()
    number = client.generate(resumable=True)
    for at, event in enumerate(events[:-1], 1):
        half = frame({**events[at], "id": number})
        client.send({**event, "id": number})
        client.peer.write(half[: len(half) * at // len(events)])
        client.peer.close()
        client = server.welcome()
        number = client.resume(at)
    client.events(number, events[-1:])
    client.acknowledge(len(events))
    client.finish()


def _be_gone_for_a_moment(server: ScriptedServer) -> None:
    events = _numbered(_events())
    client = server.welcome()
    client.events(client.generate(resumable=True), events[:7])
    server.close()
    client.peer.close()
    time.sleep(0.4)
    server.listen()
    server.accept().peer.close()  # and one that ends before hello
    client = server.welcome()
    client.events(client.resume(7), events[7:])
    client.acknowledge(len(events))
    client.finish()


def _wait_for_acknowledgements(server: ScriptedServer) -> None:
    events = _numbered(_events())
    client = server.welcome(credits=3)
    number = client.generate(resumable=True)
    for at, event in enumerate(events, 1):
        client.acknowledge(at - 3)
        client.events(number, [event])
    client.acknowledge(len(events))
    client.finish()


def _lose_the_stream(server: ScriptedServer) -> None:
    client = server.welcome()
    client.events(client.generate(resumable=True), _numbered(_events())[:5])
    client.peer.close()
    client = server.welcome()
    client.send({"id": client.resume(5), "error": {"code": "no_such_stream", "message": "there is no such stream"}})
    client.peer.receive_all()


def _cancel(server: ScriptedServer, breaks: bool = False) -> None:
    events = _numbered([*_events()[:4], _done("cancelled", 1), {"ok": {}}])
    client = server.welcome()
    number = client.generate(resumable=True)
    client.events(number, events[:4])
    cancel = client.request("cancel")
    if breaks:
        client.peer.close()
        client = server.welcome()
        number, cancel = client.resume(4), client.request("cancel")
    expect(cancel.get("request") == number, f"{cancel} does not cancel request {number}")
    client.send({"id": cancel["id"], "ok": {"found": True}})
    client.events(number, events[4:])
    client.acknowledge(len(events))
    client.finish()


def _cancel_what_breaks(server: ScriptedServer) -> None:
    _cancel(server, breaks=True)


def _leave(server: ScriptedServer) -> None:
    events = _numbered([*_events()[:6], _done("cancelled", 3), {"ok": {}}])
    client = server.welcome()
    number = client.generate(resumable=True)
    client.events(number, events[:4])
    cancel = client.request("cancel")
    expect(cancel.get("request") == number, f"{cancel} does not cancel request {number}")
    client.send({"id": cancel["id"], "ok": {"found": True}})
    client.events(number, events[4:])
    client.finish()
    expect(client.acknowledged == len(events), f"of {len(events)} messages {client.acknowledged} were acknowledged")


def _break_what_cannot_be_resumed(server: ScriptedServer) -> None:
    client = server.welcome()
    client.events(client.generate(resumable=False), _events()[:5])
    client.peer.close()


def _refuse(error: Message) -> Callable[[ScriptedServer], None]:
    def script(server: ScriptedServer) -> None:
        client = server.welcome()
        client.send({"id": client.generate(resumable=False), "error": {"message": "a message", **error}})
        client.peer.receive_all()

    return script


def _speak_another_version(server: ScriptedServer) -> None:
    client = server.accept()
    client.send({"id": client.receive_hello(), "error": {"code": "unsupported_version", "message": "no common version", "supported": [9]}})
    client.peer.close()


def _say_last_words(server: ScriptedServer) -> None:
    client = server.welcome()
    client.generate(resumable=False)
    client.send({"id": None, "error": {"code": "limit", "message": "nothing was asked for 1 second"}})
    client.peer.close()


def _talk_nonsense(server: ScriptedServer) -> None:
    client = server.welcome()
    client.generate(resumable=False)
    client.peer.write(b"\xff\xff\xff\xff" + bytes(1000))
    client.peer.receive_all()


class Script(NamedTuple):
    """What the server does; the client's program must then print ``text``, and end with the error ``code`` (None: with success)."""

    follow: Callable[[ScriptedServer], None]
    scenario: str
    text: str = TEXT
    code: str | None = None


SCRIPTS = {
    "an answer, byte by byte": Script(_answer_byte_by_byte, "answer"),
    "an answer, in all forms of MessagePack": Script(_answer_in_all_forms, "answer"),
    "an answer, all at once": Script(_answer_at_once, "answer"),
    "a break at every event": Script(_break_at_every_event, "resume"),
    "a daemon that is gone for a moment": Script(_be_gone_for_a_moment, "resume"),
    "a daemon that waits for acknowledgements": Script(_wait_for_acknowledgements, "resume"),
    "a client that takes its time": Script(_wait_for_acknowledgements, "slow"),
    "a stream that cannot be resumed any more": Script(_lose_the_stream, "resume", "".join(TEXTS[:3]), "no_such_stream"),
    "cancelling": Script(_cancel, "cancel", TEXTS[0]),
    "cancelling, and the connection breaks": Script(_cancel_what_breaks, "cancel", TEXTS[0]),
    "leaving": Script(_leave, "leave", TEXTS[0]),
    "a break of what cannot be resumed": Script(_break_what_cannot_be_resumed, "answer", "".join(TEXTS[:3]), "disconnected"),
    "an error": Script(_refuse({"code": "context_overflow", "needed": 9, "available": 8}), "answer", "", "context_overflow"),
    "an error of a later version": Script(_refuse({"code": "sour", "later": [1]}), "answer", "", "sour"),
    "another version": Script(_speak_another_version, "answer", "", "unsupported_version"),
    "last words": Script(_say_last_words, "answer", "", "limit"),
    "nonsense": Script(_talk_nonsense, "answer", "", "disconnected"),
}


def run_script(script: Script, command: Sequence[str], seconds: float) -> None:
    """Run the client's program against a script; each wait ends after ``seconds``. Raises ConformanceError."""
    with tempfile.TemporaryDirectory() as folder:
        server = ScriptedServer(str(Path(folder) / "d.sock"), seconds)
        server.listen()
        words = [*command, server.path, script.scenario, PROMPT, str(TOKENS)]
        program = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            script.follow(server)
            out, said = program.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise ConformanceError(f"the program is still running after {seconds:g} seconds") from None
        except ConformanceError as error:
            program.kill()
            raise ConformanceError(f"{error}; it wrote {program.communicate()[1].decode(errors='replace')[-500:]!r}") from None
        finally:
            program.kill()
            program.wait()
            server.close()
    wrong = f"it wrote {out.decode(errors='replace')!r} and {said.decode(errors='replace')[-500:]!r}, with exit status {program.returncode}"
    expect(out.decode(errors="replace") == script.text, f"the text is not {script.text!r}: {wrong}")
    expect(program.returncode == (0 if script.code is None else 3), wrong)
    expect(script.code is None or said.decode().strip() == f"error: {script.code}", f"it does not tell the error {script.code}: {wrong}")
