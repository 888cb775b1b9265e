"""MessagePack and connections for the checks, written from docs/protocol.md with Python's standard library.

No code is shared with the daemon or its clients, so that a mistake in theirs is not made here too.
"""

from __future__ import annotations

import socket
import struct
import time
from types import TracebackType
from typing import Any, NamedTuple

Message = dict[str, Any]
OPS = (
    "hello", "generate", "cancel", "resume", "ack", "open_session", "close_session", "clone_session", "save_session", "restore_session",
    "list_saved", "delete_saved", "tokenize", "detokenize", "embed", "status", "metrics", "reload_rules", "load_model", "unload_model",
)  # fmt: skip
"""Operations of version 1, which a server must list as its capabilities."""


class ConformanceError(Exception):
    """What is checked does not keep to the protocol. The message says what came and what was expected."""


class ReceiveTimeout(ConformanceError):
    """No whole message came in time."""


def expect(condition: bool, message: str) -> None:
    """Raises ConformanceError with ``message`` if the condition is false."""
    if not condition:
        raise ConformanceError(message)


# ---- MessagePack -----------------------------------------------------------------------------------------------------


def encode(value: Any) -> bytes:
    """A value as MessagePack (https://msgpack.org). Raises TypeError for what has no such form."""
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        if -32 <= value < 128:
            return struct.pack(">b", value) if value < 0 else bytes([value])
        return struct.pack(">BQ", 0xCF, value) if value >= 0 else struct.pack(">Bq", 0xD3, value)
    if isinstance(value, float):
        return struct.pack(">Bd", 0xCB, value)
    if isinstance(value, str):
        data = value.encode()
        return (bytes([0xA0 | len(data)]) if len(data) < 32 else struct.pack(">BI", 0xDB, len(data))) + data
    if isinstance(value, list):
        return _head(0x90, 0xDD, len(value)) + b"".join(map(encode, value))
    if isinstance(value, dict):
        return _head(0x80, 0xDF, len(value)) + b"".join(encode(key) + encode(one) for key, one in value.items())
    raise TypeError(f"{type(value).__name__} has no form in the protocol")


def _head(short: int, long: int, count: int) -> bytes:
    return bytes([short | count]) if count < 16 else struct.pack(">BI", long, count)


def frame(message: Any) -> bytes:
    """A message with its length before it."""
    body = encode(message)
    return struct.pack(">I", len(body)) + body


_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_LENGTHS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}
_SHORT = {0x80: (0x0F, "map"), 0x90: (0x0F, "list"), 0xA0: (0x1F, "text"), 0xB0: (0x1F, "text")}


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        expect(self.at + count <= len(self.data), "a frame ends within a value")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self) -> Any:
        code = self.take(1)[0]
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 256
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return self.unpack(_NUMBERS[code])
        if code in _LENGTHS:
            kind, count = ("text" if code <= 0xDB else "list" if code <= 0xDD else "map"), self.unpack(_LENGTHS[code])
        else:
            expect(code < 0xC0, f"a frame holds a value of kind 0x{code:02x}, which the protocol does not have")
            mask, kind = _SHORT[code & 0xF0]
            count = code & mask
        if kind == "text":
            return self.take(count).decode()
        if kind == "list":
            return [self.value() for _ in range(count)]
        found = {}
        for _ in range(count):
            key = self.value()
            expect(isinstance(key, str), f"a map has the key {key!r}, which is no text")
            found[key] = self.value()
        return found


def decode(body: bytes) -> Message:
    """The map that a frame's body is. Raises ConformanceError."""
    reader = _Reader(body)
    try:
        found = reader.value()
    except UnicodeDecodeError:
        raise ConformanceError("a text is not UTF-8") from None
    expect(isinstance(found, dict), "a frame is no map")
    expect(reader.at == len(body), "a frame has bytes after its map")
    message: Message = found
    return message


# ---- connections -----------------------------------------------------------------------------------------------------


def socket_address(address: str) -> tuple[int, Any]:
    """The family and name of ``PATH``, ``unix:PATH``, ``abstract:NAME`` or ``tcp:HOST:PORT``; an IPv6 host is in brackets."""
    kind, colon, rest = address.partition(":")
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host.strip("[]"), int(port))
    if kind == "abstract":
        return socket.AF_UNIX, "\0" + rest
    return socket.AF_UNIX, rest if colon and kind == "unix" else address


class Peer:
    """One end of a connection; a context manager that closes it. A wait longer than ``seconds`` raises ConformanceError."""

    def __init__(self, made: socket.socket, seconds: float) -> None:
        self.socket, self.seconds = made, seconds
        made.settimeout(seconds)
        self.number = 0
        self.hello: Message = {}
        self._data = b""

    def send(self, message: Message) -> None:
        """Write a message as one frame."""
        self.write(frame(message))

    def write(self, data: bytes) -> None:
        """Write bytes. Raises ConformanceError if the other end does not read them in time."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return  # why the other end closed the connection is still to be read
        except TimeoutError:
            raise ConformanceError(f"nothing was read for {self.seconds:g} seconds") from None

    def receive(self, seconds: float | None = None) -> Message | None:
        """The next message, None at the end of the connection. After ReceiveTimeout the next call goes on with what has come."""
        if not self._fill(4, seconds):
            expect(not self._data, "the connection ended within a frame")
            return None
        (count,) = struct.unpack(">I", self._data[:4])
        expect(count <= 16 << 20, f"a frame of {count:,} bytes is longer than 16 MiB")
        expect(self._fill(4 + count, seconds), "the connection ended within a frame")
        body, self._data = self._data[4 : 4 + count], self._data[4 + count :]
        return decode(body)

    def message(self) -> Message:
        """The next message; the end of the connection is ConformanceError."""
        found = self.receive()
        if found is None:
            raise ConformanceError("the connection has ended")
        return found

    def _fill(self, count: int, seconds: float | None) -> bool:
        """Wait for so many bytes; False if the connection ends before."""
        until = time.monotonic() + (self.seconds if seconds is None else seconds)
        while len(self._data) < count:
            try:
                self.socket.settimeout(max(until - time.monotonic(), 0.001))
                data = self.socket.recv(1 << 16)
            except TimeoutError:
                raise ReceiveTimeout("nothing came in time") from None
            except ConnectionResetError:
                return False
            finally:
                self.socket.settimeout(self.seconds)
            if not data:
                return False
            self._data += data
        return True

    def receive_until_quiet(self, seconds: float) -> list[Message]:
        """All messages that come with less than ``seconds`` between them."""
        found: list[Message] = []
        try:
            while (message := self.receive(seconds)) is not None:
                found.append(message)
        except ReceiveTimeout:
            return found
        raise ConformanceError("the connection has ended")

    def ask(self, op: str, **fields: Any) -> int:
        """Send a request and return its id."""
        self.number += 1
        self.send({"id": self.number, "op": op, **fields})
        return self.number

    def call(self, op: str, **fields: Any) -> Message:
        """The message that answers a request. The request is repeated, after ``retry_after``, while the server limits the rate."""
        while True:
            answer = self.message_for(self.ask(op, **fields))
            if answer.get("error", {}).get("code") != "limit" or "retry_after" not in answer["error"]:
                return answer
            time.sleep(answer["error"]["retry_after"])

    def message_for(self, number: int) -> Message:
        """The next message of the request ``number``; messages of other requests before it are dropped."""
        while True:
            message = self.message()
            if message.get("id") == number:
                return message
            if message.get("id") is None:
                raise ConformanceError(f"the server said {message} while request {number} was under way")

    def ok(self, op: str, **fields: Any) -> Message:
        """The ``ok`` of a request's answer. Raises ConformanceError if it is answered with an error."""
        answer = self.call(op, **fields)
        expect("ok" in answer, f"{op} was answered {answer.get('error')}")
        found: Message = answer["ok"]
        return found

    def expect_error(self, code: str, op: str, **fields: Any) -> Message:
        """The error that answers a request. Raises ConformanceError for any other code or answer."""
        answer = self.call(op, **fields)
        expect("error" in answer, f"{op} with {abbreviate(fields)} was done; the error {code} was expected")
        return check_error(answer, code, f"{op} with {abbreviate(fields)}")

    def receive_all(self) -> list[Message]:
        """All messages that come before the server closes the connection."""
        found: list[Message] = []
        while (message := self.receive()) is not None:
            found.append(message)
        return found

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def check_error(answer: Message, code: str, what: str) -> Message:
    """The error of an answer. Raises ConformanceError if it has another code or no message; ``what`` names the request then."""
    found: Message = answer.get("error", {})
    expect(found.get("code") == code, f"{what} was answered {answer}; the error {code} was expected")
    expect(bool(found.get("message")) and isinstance(found["message"], str), f"the error {code} has no message")
    return found


def abbreviate(fields: Message) -> str:
    """The fields of a message for an error's text: 100 characters at most."""
    text = repr(fields)
    return text if len(text) < 100 else text[:100] + "..."


class Server(NamedTuple):
    """The server that is checked. ``key``: for TCP. ``seconds``: longest wait for a message."""

    address: str
    key: str | None
    seconds: float

    def connect(self) -> Peer:
        """A new connection, before hello. Raises OSError."""
        family, name = socket_address(self.address)
        made = socket.socket(family)
        made.settimeout(self.seconds)
        made.connect(name)
        return Peer(made, self.seconds)

    def hello(self, **fields: Any) -> Message:
        """The fields of a hello request, with these changed or added."""
        return {"versions": [1], "client": "conformance", **({"key": self.key} if self.key is not None else {}), **fields}

    def peer(self) -> Peer:
        """A new connection, after hello; what was answered is its ``hello``."""
        found = self.connect()
        found.hello = found.ok("hello", **self.hello())
        return found
