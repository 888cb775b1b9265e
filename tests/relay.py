"""A way to a daemon on which something happens to what it says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path


class Relay:
    """Listens at a path, and hands what comes on to the daemon behind and back; a context manager.

    ``down`` is called for each connection with the bytes that the daemon says, in pieces, and gives those that the client is to hear.
    When it ends before the daemon has, the connection breaks.
    """

    def __init__(self, path: Path | str, behind: Path | str, down: Callable[[Iterator[bytes]], Iterable[bytes]]) -> None:
        self._behind, self._down = str(behind), down
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return  # the test is over
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._behind)
            threading.Thread(target=self._pump, args=(near, far, iter), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, self._down), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, to: socket.socket, through: Callable[[Iterator[bytes]], Iterable[bytes]]) -> None:
        with suppress(OSError):  # one of them has left
            for data in through(iter(lambda: source.recv(1 << 16), b"")):
                to.sendall(data)
        with suppress(OSError):
            to.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            source.shutdown(socket.SHUT_RD)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
