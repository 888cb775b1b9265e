"""Workers that die, hang or cannot start: pending requests fail at once, everything else continues."""

import asyncio
import os
import random
import signal
import threading
import time

import psutil
import pytest
from daemons import Daemon

from edge_rt.daemon import supervisor
from edge_rt.daemon.client import AsyncClient
from edge_rt.daemon.supervisor import Supervisor, WorkerSpec
from edge_rt.errors import DaemonError
from edge_rt.types import Delta, Done

SIGNALS = {signal.SIGKILL: "\x01", signal.SIGSEGV: "\x02", signal.SIGABRT: "\x03", signal.SIGBUS: "\x04"}


"""And what makes the worker of the tests end itself by them."""


@pytest.fixture
def start(folder, random_model):
    running = []

    def make(config="", **options):
        config = f"limits.requests_per_second = 0\n{config}"
        running.append(Daemon(folder, config=config, **{"model": str(random_model()), "delay": 0.002, **options}))
        return running[-1].__enter__()

    yield make
    for one in running:
        one.__exit__()


def ask(client, prompt, **options):
    events = client.generate(prompt, **{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **options})
    return "".join(event.text for event in events if isinstance(event, Delta))


def died(events):
    """Seconds until the error came, and the error."""
    started = time.monotonic()
    with pytest.raises(DaemonError) as caught:
        list(events)
    return time.monotonic() - started, caught.value


def test_a_worker_killed_mid_stream_again_and_again(start):
    client, chance = start().ready(), random.Random(3)
    expected = {prompt: ask(client, prompt) for prompt in ("one", "two")}
    for turn, number in enumerate(SIGNALS):
        pid = client.status()["worker"]["pid"]
        events = client.generate("long", max_tokens=3000, ignore_eos=True)
        for _ in range(chance.randrange(1, 30)):
            next(events)
        os.kill(pid, number)
        seconds, error = died(events)
        assert (error.code, number.name in str(error)) == ("worker_died", True)
        assert seconds < 1
        prompt = ("one", "two")[turn % 2]
        assert ask(client, prompt) == expected[prompt]
    status = client.status()
    assert (status["worker"]["deaths"], status["worker"]["state"], status["server"]["requests"]) == (4, "ready", 0)
    client.close()


@pytest.mark.parametrize("number", list(SIGNALS), ids=lambda number: number.name)
def test_a_request_that_kills_the_worker_fails_those_beside_it_and_nobody_later(start, number):
    daemon = start()
    client, errors = daemon.ready(), []

    def work():
        with daemon.client() as mine:
            errors.append(died(mine.generate("beside", max_tokens=3000, ignore_eos=True))[1])

    others = [threading.Thread(target=work) for _ in range(3)]
    for one in others:
        one.start()
    while client.status()["server"]["requests"] < 3:
        time.sleep(0.01)
    _, error = died(client.generate(SIGNALS[number] * 2))
    assert error.code == "worker_died"
    for one in others:
        one.join(5)
    assert [one.code for one in errors] == ["worker_died"] * 3
    assert ask(client, "next")
    client.close()


def test_a_hung_step_is_ended(start):
    client = start("hung_after = 1\n").ready()
    seconds, error = died(client.generate("\x05\x05"))
    assert error.code == "worker_hung"
    assert 1 < seconds < 5
    assert ask(client, "next")
    client.close()


def test_a_step_that_takes_long_and_says_that_it_goes_on_is_not_ended(start):
    client = start("hung_after = 1\n").ready()
    assert ask(client, "\x06\x06")  # four seconds and more
    assert client.status()["worker"]["deaths"] == 0
    client.close()


@pytest.mark.parametrize(
    ("expected", "seconds"), [(None, 120), (0.001, 10), (0.5, 50), (30, 120)], ids=["unknown", "small", "larger", "no more than that"]
)
def test_how_long_a_step_may_stand_still(expected, seconds):
    assert supervisor.hang_timeout(expected, 120) == seconds


def test_a_step_that_takes_much_longer_than_its_like_is_ended_soon(folder, random_model, monkeypatch):
    """And what takes long without being a step of the engine, or before there was any, is not."""
    monkeypatch.setattr(supervisor, "MIN_HANG_SECONDS", 0.5)
    for name, value in Daemon(folder, delay=0.002).environment.items():
        monkeypatch.setenv(name, value)

    async def work():
        found = Supervisor(60, lambda: None, lambda message: None, lambda: {"allowance": 1 << 40, "parked": None})
        found.load(WorkerSpec(str(random_model()), {"engine": "null", "device": "null"}))

        async def answer(prompt):
            end = asyncio.get_running_loop().create_future()
            options = {"max_tokens": 8, "ignore_eos": True}
            command = {"op": "generate", "prompt": prompt, "credits": 99, "options": options}
            found.call(command, lambda message: "event" in message or end.set_result(message))
            return await asyncio.wait_for(end, 30)

        assert "ok" in await answer("quick")
        hung = await answer("\x05\x05")
        await found.unload()
        return hung["error"]

    error = asyncio.run(work())
    assert error["code"] == "worker_hung"
    assert error["message"].startswith("nothing moved in the worker for ")


def test_a_worker_that_is_stopped_is_ended_too_and_a_paused_request_is_not(start):
    daemon = start("hung_after = 0.6\ncredits = 4\n")
    client = daemon.ready()
    events = client.generate("slow", max_tokens=2000, ignore_eos=True)
    next(events)
    with daemon.client() as other:
        other._send("generate", {"prompt": "unread", "options": {"max_tokens": 3000, "ignore_eos": True}, "resumable": True})
        time.sleep(1.5)
        assert other._socket is not None
        assert client.status()["worker"]["deaths"] == 0
    events.close()
    pid = client.status()["worker"]["pid"]
    events = client.generate("stopped", max_tokens=3000, ignore_eos=True)
    next(events)
    os.kill(pid, signal.SIGSTOP)
    assert died(events)[1].code == "worker_hung"
    client.close()


def test_sessions_after_the_worker_died(start):
    client = start().ready()
    saved, lost = client.session(), client.session()
    for session in (saved, lost):
        ask(client, "hello", session=session)
    saved.save("kept")
    os.kill(client.status()["worker"]["pid"], signal.SIGKILL)
    wait_for_death(client, 1)
    events = list(saved.generate("hello, world", max_tokens=4, ignore_eos=True))
    assert isinstance(events[-1], Done)
    assert events[-1].usage.reused_tokens >= len("hello")
    assert died(lost.generate("hello"))[1].code == "session_lost"
    lost.close()
    os.kill(client.status()["worker"]["pid"], signal.SIGKILL)
    wait_for_death(client, 2)
    assert ask(client, "hello", session=saved)
    client.close()


def test_a_worker_that_dies_while_it_restores_a_session_costs_no_more_than_the_answer(start):
    client = start().ready()
    session = client.session()
    ask(client, "hello", session=session)
    session.save("kept")
    os.kill(client.status()["worker"]["pid"], signal.SIGKILL)
    wait_for_death(client, 1)
    while client.status()["worker"]["state"] != "ready":
        time.sleep(0.01)
    pid = client.status()["worker"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    answers = client._send("generate", {"prompt": "hello", "session": session.id})
    client.status()  # the daemon has passed it on by now
    os.kill(pid, signal.SIGKILL)
    wait_for_death(client, 2)
    assert answers.over
    assert died(iter(answers.result, None))[1].code == "worker_died"
    events = list(session.generate("hello, world", max_tokens=4, ignore_eos=True))
    assert events[-1].usage.reused_tokens >= len("hello")
    client.close()


def wait_for_death(client, deaths):
    until = time.monotonic() + 5
    while client.status()["worker"]["deaths"] < deaths:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_waits_for_a_worker_can_be_cancelled(start):
    client = start().ready()
    os.kill(client.status()["worker"]["pid"], signal.SIGKILL)
    wait_for_death(client, 1)
    answers = client._send("generate", {"prompt": "a", "options": {"max_tokens": 3000, "ignore_eos": True}})
    assert client.call("cancel", request=answers.request) == {"found": True}
    with pytest.raises(DaemonError, match="cancelled before it began"):
        answers.result()
    assert client.status()["server"]["requests"] == 0
    assert ask(client, "a")
    client.close()


def test_a_daemon_that_is_gone_ends_streams_that_could_be_resumed(start, monkeypatch):
    monkeypatch.setattr("edge_rt.daemon.client.PAUSES", (0.05, 0.05))
    monkeypatch.setattr("edge_rt.daemon.client.async_.PAUSES", (0.05, 0.05))
    daemon = start()
    client = daemon.ready()
    events = client.generate("a", max_tokens=3000, ignore_eos=True, resumable=True)
    next(events)

    async def work():
        async with AsyncClient(str(daemon.socket)) as mine:
            others = mine.generate("b", max_tokens=3000, ignore_eos=True, resumable=True)
            await others.__anext__()
            daemon.process.kill()
            async for _ in others:
                pass

    with pytest.raises(DaemonError) as caught:
        asyncio.run(work())
    assert caught.value.code == "disconnected"
    assert died(events)[1].code == "disconnected"


def test_a_worker_that_dies_at_once_is_given_up_and_the_daemon_stays(start, folder):
    plugin = (folder / "plugin_nulls.py").read_text()
    (folder / "plugin_nulls.py").write_text("import os\nos.abort()\n")
    client = start().client()
    until = time.monotonic() + 20
    while (worker := client.status()["worker"])["state"] != "failed":
        assert worker["state"] in ("starting", "waiting")
        assert time.monotonic() < until
        time.sleep(0.05)
    assert worker["deaths"] == 5
    assert worker["reason"] == "the worker process was ended by SIGABRT"
    assert died(client.generate("a"))[1].code == "worker_died"
    (folder / "plugin_nulls.py").write_text(plugin)
    client.close()


def test_a_model_that_cannot_be_opened_fails_who_asks(start, folder):
    (folder / "bad.gguf").write_bytes(b"GGUF rubbish")
    client = start(model=str(folder / "bad.gguf")).client()
    until = time.monotonic() + 20
    while client.status()["worker"]["state"] != "failed":
        assert time.monotonic() < until
        time.sleep(0.05)
    assert died(client.generate("a"))[1].code == "model_file"
    assert client.status()["worker"]["deaths"] == 1
    client.close()


def test_the_worker_ends_with_the_daemon_however_that_ends(start):
    daemon = start()
    client = daemon.ready()
    pid = client.status()["worker"]["pid"]
    client._send("generate", {"prompt": "\x05\x05"})  # hangs
    time.sleep(0.1)
    daemon.process.kill()
    daemon.process.wait(5)
    until = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.02)
    client.close()
