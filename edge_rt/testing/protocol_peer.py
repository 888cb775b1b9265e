"""A peer of the daemon's protocol for conformance checks, written from docs/protocol.md and Python's own library alone.

It shares no code with the daemon or its clients, so that a mistake in theirs is not made here too.
"""

from __future__ import annotations

import socket
import struct
import time
from types import TracebackType
from typing import Any

Message = dict[str, Any]


class Broken(Exception):
    """What is checked does not keep to the protocol; the message says where."""


class Silence(Broken):
    """Nothing came in time."""


def expect(true: bool, message: str) -> None:
    """Raises Broken with this message unless it is true."""
    if not true:
        raise Broken(message)


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
    """The map that a frame's body is. Raises Broken."""
    reader = _Reader(body)
    try:
        found = reader.value()
    except UnicodeDecodeError:
        raise Broken("a text is not UTF-8") from None
    expect(isinstance(found, dict), "a frame is no map")
    expect(reader.at == len(body), "a frame has bytes after its map")
    message: Message = found
    return message


# ---- a connection ----------------------------------------------------------------------------------------------------


def family_of(address: str) -> tuple[int, Any]:
    """An address as ``edge-rt serve --listen`` takes it, as sockets do: family and name. TCP: 127.0.0.1 or [::1] and a port."""
    kind, colon, rest = address.partition(":")
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host.strip("[]"), int(port))
    if kind == "abstract":
        return socket.AF_UNIX, "\0" + rest
    return socket.AF_UNIX, rest if colon and kind == "unix" else address


class Peer:
    """One end of a connection; a context manager. Every wait ends after ``seconds``, as Broken."""

    def __init__(self, made: socket.socket, seconds: float) -> None:
        self.socket, self.seconds = made, seconds
        made.settimeout(seconds)
        self.number = 0
        self.hello: Message = {}
        self._data = b""

    def send(self, message: Message) -> None:
        """Write a message."""
        self.write(frame(message))

    def write(self, data: bytes) -> None:
        """Write bytes; who has closed the connection meanwhile has said why, which is still to be read."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return
        except TimeoutError:
            raise Broken(f"nothing was read for {self.seconds:g} seconds") from None

    def receive(self, seconds: float | None = None) -> Message | None:
        """The next message, None at the end of the connection. Raises Silence after ``seconds``, and keeps what has come of it."""
        if not self._fill(4, seconds):
            expect(not self._data, "the connection ended within a frame")
            return None
        (count,) = struct.unpack(">I", self._data[:4])
        expect(count <= 16 << 20, f"a frame of {count:,} bytes is longer than 16 MiB")
        expect(self._fill(4 + count, seconds), "the connection ended within a frame")
        body, self._data = self._data[4 : 4 + count], self._data[4 + count :]
        return decode(body)

    def message(self) -> Message:
        """The next message; the end of the connection is Broken."""
        found = self.receive()
        if found is None:
            raise Broken("the connection has ended")
        return found

    def _fill(self, count: int, seconds: float | None) -> bool:
        """Wait for so many bytes; False if the connection ends before."""
        until = time.monotonic() + (self.seconds if seconds is None else seconds)
        while len(self._data) < count:
            try:
                self.socket.settimeout(max(until - time.monotonic(), 0.001))
                data = self.socket.recv(1 << 16)
            except TimeoutError:
                raise Silence("nothing came in time") from None
            except ConnectionResetError:
                return False
            finally:
                self.socket.settimeout(self.seconds)
            if not data:
                return False
            self._data += data
        return True

    def quiet(self, seconds: float) -> list[Message]:
        """What comes until nothing came for so long."""
        found: list[Message] = []
        try:
            while (message := self.receive(seconds)) is not None:
                found.append(message)
        except Silence:
            return found
        raise Broken("the connection has ended")

    def ask(self, op: str, **fields: Any) -> int:
        """Send a request; its id."""
        self.number += 1
        self.send({"id": self.number, "op": op, **fields})
        return self.number

    def call(self, op: str, **fields: Any) -> Message:
        """The answer to a request: what is in ``ok``, or the error. It is asked again when the server says to slow down."""
        while True:
            answer = self.message_of(self.ask(op, **fields))
            if answer.get("error", {}).get("code") != "limit" or "retry_after" not in answer["error"]:
                return answer
            time.sleep(answer["error"]["retry_after"])

    def message_of(self, number: int) -> Message:
        """The next message of a request; others in between are not for us."""
        while True:
            message = self.message()
            if message.get("id") == number:
                return message
            if message.get("id") is None:
                raise Broken(f"the server said {message} while request {number} was under way")

    def ok(self, op: str, **fields: Any) -> Message:
        """What a request's answer holds. An error is Broken."""
        answer = self.call(op, **fields)
        expect("ok" in answer, f"{op} was answered {answer.get('error')}")
        found: Message = answer["ok"]
        return found

    def refused(self, code: str, op: str, **fields: Any) -> Message:
        """The error of a request that cannot be done. Another answer is Broken."""
        answer = self.call(op, **fields)
        expect("error" in answer, f"{op} with {_short(fields)} was done; the error {code} was expected")
        return error_is(answer, code, f"{op} with {_short(fields)}")

    def ended(self) -> list[Message]:
        """What comes until the server closes the connection."""
        found: list[Message] = []
        while (message := self.receive()) is not None:
            found.append(message)
        return found

    def close(self) -> None:
        """Break the connection."""
        self.socket.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def error_is(answer: Message, code: str, what: str) -> Message:
    """The error that an answer holds, which must have this code and a sentence. Raises Broken."""
    found: Message = answer.get("error", {})
    expect(found.get("code") == code, f"{what} was answered {answer}; the error {code} was expected")
    expect(bool(found.get("message")) and isinstance(found["message"], str), f"the error {code} has no message")
    return found


def _short(fields: Message) -> str:
    text = repr(fields)
    return text if len(text) < 100 else text[:100] + "..."
