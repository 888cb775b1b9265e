"""Steps by turns, over real processes: one at a time, nobody twice while another waits, and the dead hold up nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edge_rt.daemon import turns
from edge_rt.daemon.turns import Turns

PROGRAM = """
import sys, time
from edge_rt.daemon.turns import Turns
turns, log, name, times = Turns(int(sys.argv[1])), open(sys.argv[2], "a", buffering=1), sys.argv[3], int(sys.argv[4])
for _ in range(times):
    with turns:
        log.write(f"{name} in\\n")
        time.sleep(0.002)
        log.write(f"{name} out\\n")
print(turns.crowded)
"""


def start(descriptor: int, log: Path, name: str, times: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, str(descriptor), str(log), name, str(times)]
    return subprocess.Popen(words, pass_fds=[descriptor], stdout=subprocess.PIPE, text=True)


def test_one_at_a_time_and_by_turns(tmp_path: Path) -> None:
    descriptor, log = turns.shared(), tmp_path / "log"
    assert descriptor is not None
    with Turns(descriptor):
        processes = [start(descriptor, log, name, 60) for name in "ab"]
        time.sleep(0.5)
        assert not log.exists() or log.read_text() == "", "we have the turn"
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert "True" in said, "who waited knows of the other"
    lines = log.read_text().split("\n")[:-1]
    assert [line.replace("out", "in") for line in lines[1::2]] == lines[::2], "nobody comes in while another is"
    names = [line[0] for line in lines[::2]]
    both = names[: max(i for i in range(len(names)) if len(set(names[i:])) == 2) + 1]
    first = next(i for i in range(len(names)) if len(set(names[: i + 1])) == 2)
    changes = sum(a != b for a, b in zip(both[first:], both[first + 1 :], strict=False))
    assert changes >= 0.8 * (len(both) - first - 1), "they alternate as long as both are there"
    os.close(descriptor)


def test_who_dies_with_the_turn_gives_it_back(tmp_path: Path) -> None:
    descriptor, log = turns.shared(), tmp_path / "log"
    assert descriptor is not None
    holder = start(descriptor, log, "a", 100_000)
    while not (log.exists() and log.read_text()):
        time.sleep(0.01)
    os.kill(holder.pid, signal.SIGSTOP)  # it may have it just now
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with Turns(descriptor) as _:
        pass
    os.close(descriptor)


def test_where_there_is_no_place_for_the_file_nobody_takes_turns(monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere at all")
    assert turns.shared() is None
    assert "do not compute by turns" in caplog.text
