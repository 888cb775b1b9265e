"""An HTTP client of the tests' own: the standard library's, over TCP or a Unix domain socket, and bare bytes for what no client sends."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """An answer. ``headers``: names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of the error in the body."""
        error = self.json["error"]
        assert set(error) >= {"message", "type", "param", "code"}
        return error["code"]


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: str | int, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._address = address

    def connect(self) -> None:
        self.sock = connect(self._address, self.timeout or 30.0)


def connect(address: str | int, timeout: float = 30.0) -> socket.socket:
    """``address``: the path of a socket, or a port."""
    if isinstance(address, int):
        return socket.create_connection(("127.0.0.1", address), timeout)
    found = socket.socket(socket.AF_UNIX)
    found.settimeout(timeout)
    found.connect(address)
    return found


class Peer:
    """Asks at an address; a connection for each request."""

    def __init__(self, address: str | int, **headers: str) -> None:
        self.address, self.headers = address, headers

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request. A body that is not bytes goes as JSON. ``_`` in names of headers is ``-``."""
        with self.asked(method, path, body, **headers) as answer:
            return _reply(answer, answer.read())

    @contextlib.contextmanager
    def asked(self, method: str, path: str, body: Any = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """The answer while it comes."""
        connection = _Connection(self.address, 30.0)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in {**self.headers, **headers}.items()}
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **named})
            with contextlib.closing(connection.getresponse()) as answer:
                yield answer
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        """GET."""
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        """POST."""
        return self.ask("POST", path, body, **headers)

    def stream(self, path: str, body: dict[str, Any], step: int = 0) -> list[Any]:
        """The events of a stream; the last is ``[DONE]`` or an error. ``step``: bytes read at a time."""
        with self.asked("POST", path, {**body, "stream": True}) as answer:
            if answer.status != 200:
                raise AssertionError(answer.read())
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            return list(events(iter(lambda: answer.read(step) if step else answer.read1(), b"")))

    def raw(self, data: bytes, *, end: bool = False) -> list[Reply]:
        """Send bytes as they are, read until the daemon closes; the answers. ``end``: we close our side."""
        with connect(self.address) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
                if end:
                    connection.shutdown(socket.SHUT_WR)
            return replies(connection)


def replies(connection: socket.socket) -> list[Reply]:
    """Answers until the daemon closes."""
    file, found = connection.makefile("rb"), []
    with contextlib.suppress(ConnectionResetError):
        while file.peek(1):
            answer = http.client.HTTPResponse(_File(file))  # type: ignore[arg-type]
            answer.begin()
            found.append(_reply(answer, answer.read()))
    return found


class _File:
    """What HTTPResponse asks of a socket."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def makefile(self, *_: Any) -> Any:
        return _Open(self._file)


class _Open:
    """A file that stays open for the next answer."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def close(self) -> None:
        """Not yet."""


def _reply(answer: http.client.HTTPResponse, body: bytes) -> Reply:
    return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, body)


def events(parts: Iterator[bytes]) -> Iterator[Any]:
    """Server-sent events in bytes that come split anyhow."""
    held = b""
    for part in parts:
        held += part
        while b"\n\n" in held:
            event, _, held = held.partition(b"\n\n")
            assert event.startswith(b"data: "), event
            yield "[DONE]" if event == b"data: [DONE]" else json.loads(event[6:])
    assert held == b""
