"""A daemon that serves a model over HTTP while a test asks it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from edge_rt_distill.sandbox.endpoint import Endpoint
from edge_rt_distill.sandbox.items import Message

from edge_rt.hooks import EdgeError


@contextmanager
def serving(model: Path, folder: Path, *words: str, first: Sequence[Message], tokens: int = 1) -> Iterator[str]:
    """The address of a daemon that has answered the messages ``first`` with so many tokens. ``words``: further options of `serve`."""
    pytest.importorskip("h11", reason="the daemon speaks HTTP with h11; pip install 'edge-rt[http]'")
    url, where = f"unix:{folder / 'h.sock'}", ["--listen", str(folder / "d.sock"), "--http", str(folder / "h.sock")]
    command = [sys.executable, "-m", "edge_rt.cli.main", "serve", "-m", str(model), "--threads", "1", *where, *words]
    environment = {**os.environ, "EDGE_RT_STATE": str(folder / "state")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    Endpoint(url).answer(first, tokens)
                    break
                except EdgeError:
                    assert time.monotonic() < until
                    assert process.poll() is None
                    time.sleep(0.1)
            yield url
        finally:
            process.terminate()
