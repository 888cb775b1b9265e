"""--power and --celsius of the real programs, with a device of an installed plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon

PLUGIN = """
import time
from edge_rt.hooks import Health, Offer, hookimpl

EDGE_RT_API = 1

class Meter:
    name = "metered"

    def __init__(self):
        self.at, self.used, self.power = time.monotonic(), time.process_time(), 2.0

    def probe(self):
        return Offer(0, "a meter, for tests", 1 << 40, basis="simulated")

    def health(self):
        now, used = time.monotonic(), time.process_time()
        if now - self.at > 0.02:
            self.power = 2.0 + 20.0 * (used - self.used) / (now - self.at)
            self.at, self.used = now, used
        return Health(temperature=50.0, power=self.power)

@hookimpl
def edge_rt_devices():
    return [Meter()]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    info = tmp_path / "meters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: meters\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edge_rt]\nmeters = plugin_meters\n")
    (tmp_path / "plugin_meters.py").write_text(PLUGIN)
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "edge_rt.cli.main", "run", *words]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False)


def test_run_says_what_came_of_a_cap(folder: Path, random_model: Callable[..., Path]) -> None:
    words = [
        "-m",
        str(random_model("llama")),
        "--raw",
        "--device",
        "metered",
        "--power",
        "500",
        "-n",
        "300",
        "--ignore-eos",
        "-c",
        "512",
        "Hello",
    ]
    done = run(folder, "-v", *words)
    assert done.returncode == 0, done.stderr
    assert "[limit 500 W; " in done.stderr
    events: list[dict[str, Any]] = [json.loads(line) for line in run(folder, "--json", *words).stdout.splitlines()]
    assert events[-1]["event"] == "sustained"
    assert events[-1]["cap"] == 500.0
    assert events[-1]["problem"] == ""


def test_run_refuses_what_cannot_be_held(folder: Path, random_model: Callable[..., Path]) -> None:
    done = run(folder, "-m", str(random_model("llama")), "--device", "metered", "--power", "0", "Hello")
    assert done.returncode == 1
    assert "a power cap of 0 W is out of range" in done.stderr


def test_the_daemon_tells_what_came_of_a_cap(folder: Path, random_model: Callable[..., Path]) -> None:
    config = '[model]\ndevice = "metered"\nthreads = 1\ncontext = 512\npower = 8.0\n'
    with Daemon(folder, "-m", str(random_model("llama")), config=config) as daemon, daemon.ready() as client:
        assert client.status()["models"][0]["sustained"] is None or client.status()["models"][0]["sustained"]["cap"] == 8.0
        until, found = time.monotonic() + 60, None
        while time.monotonic() < until and not (found and found["tokens_per_second"] and found["seconds"] > 1):
            with client.session() as session:
                list(session.generate("Once upon a time", max_tokens=200, ignore_eos=True))
            found = client.status()["models"][0]["sustained"]
        assert found is not None
        assert found["cap"] == 8.0
        assert found["power"] > 0
        assert found["problem"] == ""
