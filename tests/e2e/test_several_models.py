"""Several models in one daemon, with the real one under three names: room for two, and for one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon

from edge_rt.errors import DaemonError
from edge_rt.types import Delta, Done

STORY = "Once upon a time"
"""So few tokens that what they give does not depend on how they are fed: nobody's company changes a bit."""
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


def config(model: Path, memory: int, more: str = "") -> str:
    names = "".join(f'[models.{name}]\nfile = "{model}"\ncontext = 1024\n' for name in ("first", "second", "third"))
    return f'memory = "{memory}M"\n{more}\n{names}'


def answered(events: Any) -> tuple[str, Done]:
    found = list(events)
    assert isinstance(found[-1], Done)
    return "".join(event.text for event in found if isinstance(event, Delta)), found[-1]


@pytest.fixture
def daemon_with(tmp_path: Path, smollm2: Path) -> Iterator[Callable[..., Daemon]]:
    running: list[Daemon] = []

    def start(memory: int, more: str = "") -> Daemon:
        running.append(Daemon(tmp_path, config=config(smollm2, memory, more)).__enter__())
        return running[-1]

    yield start
    for daemon in running:
        daemon.__exit__()


def models(client: Any) -> dict[str, Any]:
    return {one["name"]: one for one in client.status()["models"]}


def within_budget(client: Any) -> None:
    status = client.status()["server"]
    assert status["memory_free"] >= 0, client.status()


def test_one_leaves_for_another_and_its_sessions_come_back(daemon_with):
    with daemon_with(230).client() as client, client.session(model="first") as session:
        text, _ = answered(session.generate(STORY, **GREEDY))
        assert answered(client.generate(STORY, model="second", **GREEDY))[0] == text
        states = {name: one["worker"]["state"] for name, one in models(client).items()}
        assert states == {"first": "none", "second": "ready", "third": "none"}
        within_budget(client)
        _, done = answered(session.generate(f"{STORY}{text} And then", **GREEDY))
        assert done.usage.reused_tokens > len(text.split()), "what was computed came back with the session"
        states = {name: one["worker"]["state"] for name, one in models(client).items()}
        assert states == {"first": "ready", "second": "none", "third": "none"}
        with pytest.raises(DaemonError, match="the session is of the model first"):
            answered(session.generate(STORY, model="second"))
        with pytest.raises(DaemonError, match="no model fourth; name one of first, second, third"):
            answered(client.generate(STORY, model="fourth"))
        with pytest.raises(DaemonError, match="names no model"):
            answered(client.generate(STORY))


def test_two_at_once_are_two_workers_and_one_may_die(daemon_with):
    daemon = daemon_with(600)
    with daemon.client() as client:
        expected, _ = answered(client.generate(STORY, model="first", **GREEDY))
        answered(client.generate("x", model="second", max_tokens=1))
        with daemon.client() as other:
            events = other.generate(STORY, model="second", temperature=0, max_tokens=300, ignore_eos=True)
            for _ in range(3):
                next(events)
            os.kill(models(client)["second"]["worker"]["pid"], signal.SIGKILL)
            assert answered(client.generate(STORY, model="first", **GREEDY))[0] == expected
            with pytest.raises(DaemonError) as caught:
                list(events)
            assert caught.value.code == "worker_died"
            assert answered(other.generate(STORY, model="second", **GREEDY))[0] == expected
        assert models(client)["first"]["worker"]["deaths"] == 0
        within_budget(client)


def test_a_model_cools_down_and_answers_as_before(daemon_with):
    with daemon_with(300, "cool_after = 0.2").client() as client, client.session(model="first") as session:
        text, _ = answered(session.generate(STORY, **GREEDY))
        until = time.monotonic() + 30
        while not models(client)["first"]["cooled"]:
            assert time.monotonic() < until
            time.sleep(0.05)
        again, done = answered(session.generate(STORY, **GREEDY))
        assert again == text
        assert done.usage.reused_tokens > 0, "the session was parked, and not lost"
        assert not models(client)["first"]["cooled"]
