"""What clients do that mean harm, or are broken. Each runs in a process of its own, at the lowest priority, perhaps as another user."""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 - what connecting needs, which another user may not be able to read
import json
import os
import random
import resource
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from edge_rt.daemon.protocol import FrameReader, pack

HELLO = pack({"id": 1, "op": "hello", "versions": [1]})
CONNECTIONS = 1000
UNKNOWN = 10_000
_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


class Target(NamedTuple):
    """Where the daemon is: an abstract socket, and a TCP port for HTTP. ``until``: the end of the attack (``time.monotonic``)."""

    name: str
    port: int
    until: float
    chance: random.Random
    seen: Counter[str]

    @property
    def over(self) -> bool:
        """Whether it is time to stop."""
        return time.monotonic() > self.until


def attack(name: str, address: str, port: int, seconds: float, user: int | None) -> dict[str, int]:
    """Carry out an attack for a while; how often the daemon has said what."""
    os.nice(19)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * CONNECTIONS), hard))
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    target = Target(address, port, time.monotonic() + seconds, random.Random(name), Counter())
    ATTACKS[name](target)
    return dict(target.seen)


# ---- tools -----------------------------------------------------------------------------------------------------------


def _connect(target: Target, greet: bool = True) -> socket.socket:
    """A connection; with hello, if it is let in. Raises OSError."""
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(10)
    while True:
        try:
            made.connect("\0" + target.name)
            break
        except BlockingIOError:  # as many wait as the system lets wait
            time.sleep(0.002)
    target.seen["connections"] += 1
    if greet:
        _send(made, HELLO)
        _read(target, made)
    return made


def _http(target: Target) -> socket.socket:
    target.seen["connections"] += 1
    return socket.create_connection(("127.0.0.1", target.port), 10)


def _send(made: socket.socket, data: bytes) -> None:
    """What is not taken is not taken."""
    with contextlib.suppress(OSError):
        made.sendall(data)


def _read(target: Target, made: socket.socket, most: int = 1) -> None:
    """Answers, counted by code, until there are some, or the end."""
    frames, found = FrameReader(), 0
    with contextlib.suppress(OSError):
        while found < most and (data := made.recv(1 << 16)):
            for message in frames.feed(data):
                found += 1
                target.seen[message["error"]["code"] if "error" in message else "ok"] += 1


def _drain(target: Target, made: socket.socket) -> None:
    """Take what has come, without waiting."""
    with contextlib.suppress(OSError):
        while select.select([made], [], [], 0)[0] and made.recv(1 << 16):
            pass


def _status(target: Target, made: socket.socket) -> None:
    """The status of an HTTP answer, counted."""
    with contextlib.suppress(OSError):
        first = made.recv(1 << 16)
        target.seen[f"HTTP {first[9:12].decode(errors='replace')}" if first else "closed"] += 1


# ---- over the socket -------------------------------------------------------------------------------------------------


def random_bytes(target: Target) -> None:
    """With hello and without, as frames and not."""
    turn = 0
    while not target.over:
        turn += 1
        with contextlib.suppress(OSError), _connect(target, greet=turn % 3 == 0) as made:
            data = target.chance.randbytes(target.chance.randrange(1, 2000))
            _send(made, struct.pack(">I", len(data)) + data if turn % 2 else data)
            if turn % 5 == 0:
                made.shutdown(socket.SHUT_WR)
                _read(target, made, 99)


def lengths_and_depths(target: Target) -> None:
    """Lengths of 4 GiB, lists a thousand deep, texts that are no UTF-8, keys that are none."""
    frames = [
        struct.pack(">I", 2**32 - 1), struct.pack(">I", 1 << 30) + b"x" * 4096, struct.pack(">I", 3000) + b"\x91" * 3000,
        struct.pack(">I", 3000) + b"\x81\xa1a" * 1000, struct.pack(">I", 5) + b"\xdf\xff\xff\xff\xff",
        struct.pack(">I", 5) + b"\xc6\x7f\xff\xff\xff",
        pack({"id": 2, "op": "tokenize", "text": "?"}).replace(b"\xa1?", b"\xa1\xff"), struct.pack(">I", 4) + b"\x81\xa1\xff\x01",
        struct.pack(">I", 0), struct.pack(">I", 3) + b"\x81\x01\x01",
    ]  # fmt: skip
    while not target.over:
        with contextlib.suppress(OSError), _connect(target, greet=target.chance.random() < 0.5) as made:
            _send(made, target.chance.choice(frames))
            _read(target, made)


def half_open(target: Target) -> None:
    """Ask for a long answer and close our side, or never read, or vanish."""
    kept: list[socket.socket] = []
    asks = pack({"id": 2, "op": "generate", "prompt": "Once", "priority": "low", "options": {"max_tokens": 1000, "ignore_eos": True}})
    while not target.over:
        with contextlib.suppress(OSError):
            made = _connect(target)
            _send(made, asks)
            choice = target.chance.randrange(3)
            if choice == 0:
                made.shutdown(socket.SHUT_WR)
            elif choice == 1:
                made.close()
            kept.append(made)
        while len(kept) > 4:
            kept.pop(0).close()
        time.sleep(0.05)


def slow_loris(target: Target) -> None:
    """Fifty connections each that send a byte now and then, over both protocols."""
    data = pack({"id": 2, "op": "tokenize", "text": "x" * 5000})
    head = _HEAD + b"Content-Length: 5000\r\n\r\n" + b"{" * 5000
    slow = [(_connect(target), data) for _ in range(50)] + [(_http(target), head) for _ in range(50)]
    at = 0
    while not target.over:
        for made, whole in slow:
            _send(made, whole[at % len(whole) : at % len(whole) + 1])
        at += 1
        time.sleep(0.05)
    for made, _ in slow:
        made.close()


def wrong_versions(target: Target) -> None:
    """Hello with no version in common, twice, or not first."""
    words: list[dict[str, Any]] = [{"versions": [2, 3]}, {"versions": []}, {"versions": "1"}, {"versions": [2**60]}, {}]
    while not target.over:
        with contextlib.suppress(OSError), _connect(target, greet=False) as made:
            _send(made, pack({"id": 1, "op": "hello", **target.chance.choice(words)}))
            _read(target, made)
        with contextlib.suppress(OSError), _connect(target, greet=target.chance.random() < 0.5) as made:
            _send(made, target.chance.choice([HELLO, pack({"id": 5, "op": "status"})]))
            _read(target, made)


def wrong_user(target: Target) -> None:
    """Somebody whom the daemon does not know."""
    while not target.over:
        with contextlib.suppress(OSError), _connect(target) as made:
            _send(made, pack({"id": 2, "op": "generate", "prompt": "Once"}))
            _read(target, made)


def thousand_connections(target: Target) -> None:
    """All at once, and kept."""
    kept = []
    for _ in range(CONNECTIONS):
        with contextlib.suppress(OSError):
            kept.append(_connect(target))
    while not target.over:
        time.sleep(0.05)
    for made in kept:
        made.close()


def flood(target: Target) -> None:
    """Requests as fast as they can be written, of eight connections: much faster than the daemon lets a client ask."""
    data = b"".join(pack({"id": 2 + i, "op": op, **({"text": "some text"} if op == "tokenize" else {})})
                    for i, op in enumerate(["status", "tokenize", "metrics"] * 30))  # fmt: skip
    made = [_connect(target) for _ in range(8)]
    for one in made:
        one.setblocking(False)
    while not target.over:
        for one in made:
            with contextlib.suppress(OSError):
                target.seen["bytes"] += one.send(data)
            if target.chance.random() < 0.7:  # now and then nobody reads
                _drain(target, one)
        time.sleep(0.001)
    for one in made:
        one.close()


def unknown_operations(target: Target) -> None:
    """Ten thousand, and fields of the wrong kind."""
    values: list[Any] = [None, True, -1, 2**63, 1e300, float("nan"), "", "x" * 1000, [], {}, [[]], {"a": {}}]
    sent = 0
    while not target.over or sent < UNKNOWN:
        with contextlib.suppress(OSError), _connect(target) as made:
            for _ in range(200):
                op = target.chance.choice(["nonsense", "generate", "tokenize", "resume", "ack", "cancel", "open_session", "load_model"])
                fields = {name: target.chance.choice(values) for name in ("prompt", "session", "text", "options", "stream") if sent % 3}
                _send(made, pack({"id": 2 + sent % 1000, "op": op, **fields}))
                sent += 1
                _drain(target, made)
    target.seen["requests"] += sent


def huge_prompts(target: Target) -> None:
    """Texts of megabytes: words, one long word, what has many meanings for a tokenizer, and what is longer than a frame may be."""
    texts = ["far away " * 200_000, "a" * 2_000_000, "\u4e00" * 600_000, " " * 2_000_000, "x" * 5_000_000]
    while not target.over:
        for text in texts:
            with contextlib.suppress(OSError), _connect(target) as made:
                made.settimeout(60)
                asked = {"op": "generate", "prompt": text} if target.chance.random() < 0.5 else {"op": "tokenize", "text": text}
                _send(made, pack({"id": 2, **asked}))
                _read(target, made)


def many_generations(target: Target) -> None:
    """As many long answers as one client may ask for at once: that is no harm, and may cost others their share of the steps alone."""
    with _connect(target) as made:
        for number in range(2, 34):
            options = {"max_tokens": 2000, "ignore_eos": True}
            _send(made, pack({"id": number, "op": "generate", "prompt": f"{number} is", "options": options}))
        while not target.over:
            _drain(target, made)
            time.sleep(0.01)


# ---- over HTTP -------------------------------------------------------------------------------------------------------


def http(target: Target) -> None:
    """No HTTP, too much of it, bodies that are too long, too deep, no JSON, no UTF-8, never there."""
    deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

    def post(body: bytes) -> bytes:
        return _HEAD + b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body

    requests = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 9_000 + b"\r\n", _HEAD + b"Content-Length: 99999999999\r\n\r\n",
        _HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\n", _HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        post(deep), post(b'{"prompt": "\xff\xfe"}'), post(b'{"prompt": "\\ud800"}'), post(b'{"prompt": 1e999}'), post(b"[]"), post(b"{"),
        post(json.dumps({"prompt": "x", "max_tokens": -1}).encode()), post(json.dumps({"model": "x" * 100_000, "prompt": "x"}).encode()),
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    ]  # fmt: skip
    while not target.over:
        with contextlib.suppress(OSError), _http(target) as made:
            data = target.chance.choice([*requests, target.chance.randbytes(500)])
            _send(made, data)
            if target.chance.random() < 0.7:
                made.shutdown(socket.SHUT_WR)
                _status(target, made)


ATTACKS: dict[str, Callable[[Target], None]] = {
    "random bytes": random_bytes,
    "giant lengths, deep nesting, bad texts": lengths_and_depths,
    "half-open connections": half_open,
    "slow-loris, 100 connections": slow_loris,
    "wrong versions": wrong_versions,
    "wrong user": wrong_user,
    "1,000 connections": thousand_connections,
    "flood of requests": flood,
    "10,000 unknown operations": unknown_operations,
    "huge prompts": huge_prompts,
    "hostile HTTP": http,
    "32 long generations": many_generations,
}
