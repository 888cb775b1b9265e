"""`edge-rt serve` as a process with a real model, seen from outside: its clients, its processes and their memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.processes import CONSOLE_SCRIPT
from edge_rt.daemon.client import Client
from edge_rt.daemon.protocol import FrameReader, pack
from edge_rt.errors import UserError
from edge_rt.types import Delta, Done, Event

GREEDY: Mapping[str, Any] = {"temperature": 0, "ignore_eos": True}
NO_RATE = "limits.requests_per_second = 0\n"
"""For benches that ask as fast as they can."""
_PATIENCE = 60.0


class Held(NamedTuple):
    """What a process holds: bytes of anonymous memory and swap, descriptors, threads."""

    anonymous: int
    descriptors: int
    threads: int


def held(pid: int) -> Held:
    """Of a process, from /proc. Raises RuntimeError where there is none, or the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        anonymous = sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))
        return Held(anonymous, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"]))
    except (OSError, KeyError) as error:
        raise RuntimeError(f"what process {pid} holds cannot be told: {error}") from error


def mapped(pid: int) -> int:
    """Bytes of files in a process's page table. Raises RuntimeError where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))
    except (OSError, StopIteration) as error:
        raise RuntimeError("this system does not say what a process has mapped") from error


def open_http(port: int) -> str:
    """A configuration by which a daemon speaks HTTP at a port of this machine, with whoever asks."""
    return f'[http]\nlisten = ["tcp:127.0.0.1:{port}"]\nopen = true\n'


def refused(config: str) -> str | None:
    """Why a configuration is none, None if it is one."""
    from edge_rt.daemon import config as configuration

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "daemon.toml"
        path.write_text(config)
        try:
            configuration.read_config(path)
        except UserError as error:
            return str(getattr(error, "reason", error))
    return None


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens at just now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


class Served:
    """The daemon; a context manager, in which it listens. ``asked`` is the time at which it was started (``time.perf_counter``)."""

    def __init__(self, model: Path | str, *words: str, config: str = "", http: bool = False, **environment: str) -> None:
        """``http``: at a socket too. ``config``: lines of the configuration file, whose paths are relative to ``folder``."""
        self.folder = Path(tempfile.mkdtemp(prefix="edge-rt-"))
        self.socket, self.http, self.state = self.folder / "d.sock", self.folder / "h.sock", self.folder / "state"
        (self.folder / "daemon.toml").write_text(config)
        self._environment = {**os.environ, "EDGE_RT_STATE": str(self.state), **environment}
        program = [str(CONSOLE_SCRIPT)] if CONSOLE_SCRIPT.exists() else [sys.executable, "-m", "edge_rt.cli.main"]
        self._words = [*program, "serve", "--listen", str(self.socket), "--config", str(self.folder / "daemon.toml"), "-m", str(model)]
        self._words += [*(["--http", str(self.http)] if http else []), *words]
        self._log = self.folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.asked = 0.0

    def __enter__(self) -> Served:
        with open(self._log, "wb") as log:
            self.asked = time.perf_counter()
            self._process = subprocess.Popen(self._words, env=self._environment, stdin=subprocess.DEVNULL, stderr=log)
        try:
            self._greet().close()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _greet(self) -> socket.socket:
        """A connection in which hello was answered; it is tried until the daemon listens. Raises RuntimeError if it has ended."""
        assert self._process is not None, "it was started"
        while True:
            with contextlib.suppress(OSError):
                made = socket.socket(socket.AF_UNIX)
                made.settimeout(_PATIENCE)
                made.connect(str(self.socket))
                made.sendall(pack({"id": 1, "op": "hello", "versions": [1]}) + pack({"id": 2, "op": "status"}))
                frames, found = FrameReader(), 0
                while found < 2 and (data := made.recv(1 << 16)):
                    found += len(list(frames.feed(data)))
                if found == 2:
                    self.answered = time.perf_counter() - self.asked
                    return made
            made.close()
            if self._process.poll() is not None:
                raise RuntimeError(f"the daemon ended at once: {self.log()[-400:]}")
            if time.perf_counter() - self.asked > _PATIENCE:
                raise RuntimeError("the daemon does not answer")
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def log(self) -> str:
        """What it has said on standard error."""
        return self._log.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether the daemon's process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the daemon."""
        assert self._process is not None, "it was started"
        return self._process.pid

    def client(self, **options: Any) -> Client:
        """A client of it, whose waits end."""
        return Client(str(self.socket), **{"timeout": _PATIENCE, **options})

    def ready(self, seconds: float = _PATIENCE) -> Client:
        """A client, once the model is open. Raises RuntimeError if it cannot be opened, or not in time."""
        client = self.client()
        wait_for(lambda: worker(client)["state"] in ("ready", "failed"), seconds, "the model is not open", 0.02)
        if worker(client)["state"] == "failed":
            raise RuntimeError(f"the model cannot be opened: {worker(client)['reason']}")
        return client


def worker(client: Client) -> dict[str, Any]:
    """The worker in the status."""
    found: dict[str, Any] = client.status()["worker"]
    return found


def wait_for(condition: Callable[[], bool], seconds: float, otherwise: str, every: float = 0.005) -> float:
    """Seconds until something is the case. Raises RuntimeError."""
    started = time.perf_counter()
    while not condition():
        if time.perf_counter() - started > seconds:
            raise RuntimeError(f"{otherwise} after {seconds:g} seconds")
        time.sleep(every)
    return time.perf_counter() - started


class Answer(NamedTuple):
    """A whole answer: its text, its last event, and when each of its pieces came (``time.perf_counter``)."""

    text: str
    done: Done
    times: list[float]


def listen(events: Iterator[Event]) -> Answer:
    """Take an answer to its end. Raises DaemonError."""
    text, times = "", []
    for event in events:
        if isinstance(event, Delta):
            text += event.text
            times.append(time.perf_counter())
    assert isinstance(event, Done), "it is the last of all answers"
    return Answer(text, event, times)


def say(client: Client, prompt: Any, tokens: int, **options: Any) -> Answer:
    """Ask for a greedy answer of so many tokens. Raises DaemonError."""
    return listen(client.generate(prompt, **{**GREEDY, "max_tokens": tokens, **options}))


def user(text: str) -> dict[str, str]:
    """A message of the user's."""
    return {"role": "user", "content": text}


def quantile(values: list[float], share: float) -> float:
    """The value that ``share`` of all do not exceed. Raises ValueError for no values."""
    if not values:
        raise ValueError("there is no quantile of nothing")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def milliseconds(values: list[float]) -> str:
    """Seconds in words: the median, the 99th in a hundred where there are so many, and the largest."""
    high = f"p99 {quantile(values, 0.99) * 1e3:.1f} ms, " if len(values) >= 100 else ""
    return f"p50 {median(values) * 1e3:.1f} ms, {high}max {max(values) * 1e3:.1f} ms"
