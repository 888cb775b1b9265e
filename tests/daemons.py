"""Daemons for tests: the real program with the null engine, which can be made to die or to hang by what it reads."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PLUGIN = """
import os, signal, time
from edge_rt.testing.null_device import NullEngine, NullEngineFactory, NullPlugin
from edge_rt.hooks import hookimpl

EDGE_RT_API = NullPlugin.EDGE_RT_API
DELAY = float(os.environ.get("TEST_STEP_SECONDS", "0"))
DEADLY = {1: signal.SIGKILL, 2: signal.SIGSEGV, 3: signal.SIGABRT, 4: signal.SIGBUS}

class Engine(NullEngine):
    def tell(self, moved):
        self.moved = moved

    def step(self, parts):
        self.suffer(parts)
        return super().step(parts)

    def hidden(self, parts):
        self.suffer(parts)
        return super().hidden(parts)

    def suffer(self, parts):
        for part in parts:
            for token in part.tokens:
                if token in DEADLY and len(part.tokens) > 1:
                    os.kill(os.getpid(), DEADLY[token])
                if token == 5 and len(part.tokens) > 1:
                    time.sleep(1000)
                if token == 6 and len(part.tokens) > 1:
                    for _ in range(20):
                        time.sleep(0.1)
                        self.moved()
        time.sleep(DELAY)

class Factory(NullEngineFactory):
    def open(self, model, options):
        found = super().open(model, options)
        found.__class__ = Engine
        return found

@hookimpl
def edge_rt_devices():
    return NullPlugin().edge_rt_devices()

@hookimpl
def edge_rt_engines():
    return [Factory()]
"""


def write_plugin(folder: Path) -> None:
    """Install the plugin in a folder that is to be on the path."""
    info = folder / "nulls-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nulls\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edge_rt]\nnulls = plugin_nulls\n")
    (folder / "plugin_nulls.py").write_text(PLUGIN)


class Daemon:
    """`edge-rt serve` as a process; a context manager."""

    def __init__(
        self, folder: Path, *words: str, config: str = "", delay: float = 0.0, model: str | None = None, **environment: str
    ) -> None:  # fmt: skip
        self.folder, self.socket = folder, folder / "d.sock"
        (folder / "daemon.toml").write_text(config)
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {**os.environ, "PYTHONPATH": path, "TEST_STEP_SECONDS": str(delay), "EDGE_RT_STATE": str(folder / "state")}
        self.environment |= environment
        given = ["-m", model, "--engine", "null", "--device", "null"] if model is not None else []
        self.words = [sys.executable, "-m", "edge_rt.cli.main", "serve", "--listen", str(self.socket)]
        self.words += ["--config", str(folder / "daemon.toml"), *given, *words]
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Daemon:
        self.process = subprocess.Popen(self.words, env=self.environment, stderr=subprocess.PIPE, bufsize=0)
        self.said = self.line()
        assert b"listens at" in self.said or b"worker starting" in self.said, self.said
        return self

    def line(self, seconds: float = 30.0) -> bytes:
        """The next line of its standard error."""
        assert self.process.stderr is not None
        assert select.select([self.process.stderr], [], [], seconds)[0], "it says nothing"
        return self.process.stderr.readline()

    def client(self, **options: Any) -> Any:
        """A client of it."""
        from edge_rt.daemon.client import Client

        return Client(str(self.socket), **{"timeout": 30.0, **options})

    def ready(self) -> Any:
        """A client, once the model is open."""
        client = self.client()
        until = time.monotonic() + 30
        while client.status()["worker"]["state"] != "ready":
            assert time.monotonic() < until, client.status()
            time.sleep(0.02)
        return client

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            assert self.process.stderr is not None
            said = self.process.stderr.read()
            self.process.stderr.close()
        assert b"Traceback" not in said, said.decode()
