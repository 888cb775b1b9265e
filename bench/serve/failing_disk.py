"""Saves onto a disk that is full, and into a folder that is gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench.results import Result, Settings
from bench.serve.served import NO_RATE, Served, say, wait_for, worker
from bench.serve.tally import Tally
from edge_rt.daemon.client import Client
from edge_rt.errors import DaemonError

_PROMPT = "Once upon a time"
_SPACE = 4 << 20
"""Bytes of the small disk: room for one saved session, and not for a second."""


def run(model: Path, settings: Settings) -> list[Result]:
    """Each fault is typed, hurts the one save, and goes away when its cause does."""
    return [_full(model), _gone(model)]


def _code(client: Client, op: str, **fields: object) -> str:
    """The code of an answer: ``ok``, or the error's."""
    try:
        client.call(op, **fields)
    except DaemonError as error:
        return error.code
    return "ok"


def _full(model: Path) -> Result:
    tally = Tally()
    with Served(model, "-c", "1024", config=NO_RATE + 'state = "disk"\n') as daemon, contextlib.ExitStack() as stack:
        folder = daemon.folder / "disk"
        folder.mkdir(exist_ok=True)  # the daemon may have made it
        how = stack.enter_context(_small_disk(folder))
        if how is None:
            return Result("disk full when a session is saved", "", "failures", [], shown="skipped", notes=["no disk can be mounted here"])
        client = stack.enter_context(daemon.ready())
        with client.session() as small, client.session() as large:
            expected = say(client, _PROMPT, 20, session=small).text
            say(client, "far away " * 400, 8, session=large)
            tally.check("a save that fits", (code := _code(client, "save_session", session=small.id, name="one")) == "ok", code)
            for _ in range(3):
                code = _code(client, "save_session", session=large.id, name="one")
                tally.check("typed error", code == "failed", code)
            left = [path.name for path in folder.rglob("*") if path.is_file()]
            tally.check("nothing half written", left == ["one.session"], str(left))
            with client.restore("one") as earlier:
                answer = say(client, _PROMPT, 20, session=earlier)
                tally.check("the earlier save holds", answer.text == expected, repr(answer.text))
            tally.check("others are answered", say(client, _PROMPT, 20).text == expected)
            _remount(folder, 64 << 20)
            tally.check("saved once there is room", (code := _code(client, "save_session", session=large.id, name="one")) == "ok", code)
        tally.check("worker alive", worker(client)["deaths"] == 0)
    return tally.result("disk full when a session is saved", "all right", list(tally.counts), [how])


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[str | None]:
    """Mount one at a folder; None where that may not be done."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={_SPACE}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield f"a file system of {_SPACE >> 20} MiB in memory"
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _remount(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def _gone(model: Path) -> Result:
    tally = Tally()
    with Served(model, "-c", "1024", config=NO_RATE) as daemon, daemon.ready() as client, client.session() as session:
        expected = say(client, _PROMPT, 20, session=session).text
        session.save("kept")
        shutil.rmtree(daemon.state)
        code = _code(client, "restore_session", name="kept")
        tally.check("what is gone is said to be", code == "session_file", code)
        os.kill(worker(client)["pid"], 9)
        wait_for(lambda: worker(client)["deaths"] == 1, 30, "the death is not known")
        tally.check("next answer right", say(client, _PROMPT, 20).text == expected)
        code = ""
        try:
            say(client, _PROMPT, 20, session=session)
        except DaemonError as error:
            code = error.code
        tally.check("a session without its save is lost", code == "session_lost", code or "it was answered")
        with client.session() as other:
            text = say(client, _PROMPT, 20, session=other).text
            code = _code(client, "save_session", session=other.id, name="kept")
            tally.check("saved again", (text, code) == (expected, "ok"), code)
            with client.restore("kept") as again:
                tally.check("restored again", say(client, _PROMPT, 20, session=again).text == expected)
        tally.check("daemon alive", daemon.alive and worker(client)["deaths"] == 1)
    return tally.result("folder of saved sessions removed while the daemon runs", "all right", list(tally.counts))
