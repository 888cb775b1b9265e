"""A checkout's edge-rt from outside: its commands, its daemon, and what any client says to that. Nothing of edge_rt is imported here, so
that one process can ask two checkouts, and moves of modules change nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE = 120.0
_MAIN = "import sys; from edge_rt.cli.main import main; sys.exit(main())"


def command(*words: str) -> list[str]:
    """`edge-rt WORDS` with this Python, of the checkout on PYTHONPATH."""
    return [sys.executable, "-c", _MAIN, *words]


def environment(tree: Path, *before: Path, **more: str) -> dict[str, str]:
    """In which Python imports edge_rt from a checkout, and what lies in ``before`` first."""
    kept = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, before), str(tree), *([kept] if kept else [])]), **more}


def default_model(tree: Path) -> Path:
    """SmolLM2, as a checkout fetches it. Raises RuntimeError."""
    done = subprocess.run(command("pull", "smollm2"), env=environment(tree), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the model cannot be fetched: {done.stderr.strip()[-400:]}")
    return Path(done.stdout.strip())


class Ran(NamedTuple):
    """A command that has ended: seconds to its first byte and to its end, its output, and its peak memory in bytes."""

    first: float
    end: float
    output: bytes
    peak: int


def run(words: Sequence[str], env: Mapping[str, str]) -> Ran:
    """Run a program to its end. Raises RuntimeError with its last words if it fails, or writes nothing."""
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL) as process,
    ):
        assert process.stdout is not None, "a pipe"
        output = os.read(process.stdout.fileno(), 1)
        first = time.perf_counter() - started
        output += process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        end = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not output:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            raise RuntimeError(f"{words[-1]} failed with status {process.returncode}: {said[-400:]}")
    return Ran(first, end, output, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


class Daemon:
    """`edge-rt serve` of a checkout, with sockets for the protocol and for HTTP; a context manager, in which its model is open."""

    def __init__(self, model: Path, env: Mapping[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="edge-rt-"))
        self.socket, self.http = self._folder / "d.sock", self._folder / "h.sock"
        config = self._folder / "daemon.toml"
        config.write_text("limits.requests_per_second = 0\n")
        self._words = command("serve", "--config", str(config), "--listen", str(self.socket), "--http", str(self.http), "-m", str(model))
        self._env = {**env, "EDGE_RT_STATE": str(self._folder / "state")}

    def __enter__(self) -> Daemon:
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(self._words, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        """Of the daemon, whose worker has another."""
        return self._process.pid

    def _wait(self) -> None:
        """Until the model is open. Raises RuntimeError."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError), Wire(self.socket) as wire:
                state = wire.call("status")["worker"]["state"]
                if state == "ready":
                    return
                if state == "failed":
                    break
            time.sleep(0.02)
        raise RuntimeError(f"the daemon is not ready: {(self._folder / 'log').read_text(errors='replace').strip()[-400:]}")


class Wire:
    """A connection in docs/protocol.md's words; a context manager. Raises OSError, and RuntimeError for what the daemon refuses."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        try:
            self._socket.connect(str(path))
            self._file = self._socket.makefile("rb")
            self._number = 0
            self.call("hello", versions=[1])
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask, and take the answer; events before it are passed over."""
        self.ask(op, **fields)
        for message in self.answers():
            if "ok" in message:
                found: dict[str, Any] = message["ok"]
        return found

    def ask(self, op: str, **fields: Any) -> None:
        """Write a request."""
        import msgpack

        self._number += 1
        body = msgpack.packb({"id": self._number, "op": op, **fields})
        self._socket.sendall(struct.pack(">I", len(body)) + body)

    def answers(self) -> Iterator[dict[str, Any]]:
        """What comes to the last request, its answer included."""
        import msgpack

        while True:
            head = self._file.read(4)
            if len(head) < 4:
                raise ConnectionError("the daemon has closed the connection")
            message = msgpack.unpackb(self._file.read(struct.unpack(">I", head)[0]))
            if "error" in message:
                raise RuntimeError(f"the daemon refuses: {message['error']['message']}")
            if message.get("id") == self._number:
                yield message
                if "event" not in message:
                    return


class Web(http.client.HTTPConnection):
    """HTTP at a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        """To the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))

    def first_chunk(self, **fields: Any) -> float:
        """Seconds from a request for a stream to the first of it; all of it is read. Raises RuntimeError."""
        body = json.dumps({**fields, "stream": True})
        started = time.perf_counter()
        self.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = self.getresponse()
        line = response.readline()
        seconds = time.perf_counter() - started
        rest = response.read()
        if response.status != 200 or not line.startswith(b"data:"):
            raise RuntimeError(f"the daemon refuses: {response.status} {(line + rest)[:400]!r}")
        return seconds
