"""The daemon with a real model: its own answers to many at once, through faults, and a program that knows only the document."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import edge_rt
from edge_rt.daemon.client import AsyncClient
from edge_rt.errors import DaemonError
from edge_rt.types import Delta

QUESTIONS = [[{"role": "user", "content": f"Name {thing}."}] for thing in ("three colours", "a river in Africa", "two planets", "a poet")]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def alone(smollm2):
    """What the model answers without a daemon, by question: after it has read the question for itself, as kernels depend on how many
    tokens they get at once, and so on what else is asked.
    """
    with edge_rt.open(smollm2, context=1024) as model:
        answers = []
        for question in QUESTIONS:
            with model.session() as session:
                list(session.generate(question, temperature=0, max_tokens=1))
                answers.append(text(session.generate(question, **GREEDY)))
        return answers


def text(events):
    return "".join(event.text for event in events if isinstance(event, Delta))


def test_one_after_another_and_all_at_once(daemon, alone):
    async def one(client, question, session, **options):
        return text([event async for event in client.generate(question, session=session, **{**GREEDY, **options})])

    async def work():
        async with AsyncClient(str(daemon.socket)) as client:
            sessions = [(await client.call("open_session"))["session"] for _ in QUESTIONS]
            for question, session in zip(QUESTIONS, sessions, strict=True):
                await one(client, question, session, max_tokens=1)
            in_turn = [await one(client, question, session) for question, session in zip(QUESTIONS, sessions, strict=True)]
            at_once = await asyncio.gather(*(one(client, *asked) for asked in zip(QUESTIONS, sessions, strict=True)))
            return in_turn, at_once

    assert asyncio.run(work()) == (alone, alone)


def test_a_program_that_knows_only_the_document(daemon):
    program = Path(__file__).parent.parent / "peer_from_the_document.py"
    words = [sys.executable, "-I", "-S", program, daemon.socket, "Once upon a time"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with daemon.client() as client:
        expected = text(client.generate("Once upon a time", temperature=0, max_tokens=40, ignore_eos=True))
    assert json.loads(done.stdout) == [expected, expected]


def test_a_session_is_saved_and_goes_on_after_the_worker_was_killed(daemon, alone):
    with daemon.client() as client, client.session() as session:
        assert text(session.generate(QUESTIONS[0], **GREEDY)) == alone[0]
        session.save("colours")
        events = client.generate("Once upon a time", max_tokens=500, ignore_eos=True)
        next(events)
        os.kill(client.status()["worker"]["pid"], signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(DaemonError) as caught:
            list(events)
        assert (caught.value.code, time.monotonic() - started < 1) == ("worker_died", True)
        *events, done = session.generate(QUESTIONS[0], **GREEDY)
        assert text(events) == alone[0]
        assert done.usage.reused_tokens > 10
