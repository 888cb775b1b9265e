"""The clients against the daemon: many at once, cancelled, resumed, and with mistakes."""

import asyncio
import random
import socket
import threading
import time

import psutil
import pytest
from daemons import Daemon, write_plugin
from relay import Relay

from edge_rt.daemon.client import AsyncClient, Client
from edge_rt.daemon.client.protocol import ClientProtocol
from edge_rt.daemon.protocol import pack
from edge_rt.errors import DaemonError
from edge_rt.types import Delta, Done

LONG = {"max_tokens": 3500, "ignore_eos": True}


SLOW = {"max_tokens": 800, "ignore_eos": True}  # more than what socket buffers take


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("daemon")
    write_plugin(folder)
    config = "resume_within = 1\nkeep_sessions = 0.5\nlimits.requests_per_second = 0\n"
    with Daemon(folder, config=config, model=str(random_model()), delay=0.001) as found:
        found.ready().close()
        yield found


def text(events):
    return "".join(event.text for event in events if isinstance(event, Delta))


def ask(client, prompt, **options):
    return text(client.generate(prompt, **{"temperature": 0, "max_tokens": 20, "ignore_eos": True, **options}))


def quiet(client, seconds=5.0):
    """Wait until the daemon has nothing to do."""
    until = time.monotonic() + seconds
    while client.status()["server"]["requests"]:
        assert time.monotonic() < until, client.status()
        time.sleep(0.01)


def in_threads(works):
    errors = []

    def run(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


class Raw:
    """A connection without the client's flow control, after hello."""

    def __init__(self, daemon):
        self.protocol, self.socket = ClientProtocol(), socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(daemon.socket))
        hello = self.request("hello", versions=[1])
        self.receive(lambda: hello.over)

    def request(self, op, **fields):
        reply = self.protocol.request(op, fields)
        self.flush()
        return reply

    def flush(self):
        self.socket.sendall(self.protocol.to_send())

    def receive(self, done):
        while not done():
            self.protocol.feed(self.socket.recv(1 << 16))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


def test_hello_says_what_there_is(client):
    assert client.hello["version"] == 1
    assert [op in client.hello["capabilities"] for op in ("generate", "embed", "sing")] == [True, True, False]
    status = client.status()
    assert (status["worker"]["state"], status["model"]["engine"]) == ("ready", "null")


def test_concurrent_sessions_get_what_they_get_alone_and_nothing_of_each_other(daemon, client):
    chance = random.Random(1)
    prompts = {n: [f"canary {n} {chance.random()} " * chance.randrange(1, 6) for _ in range(4)] for n in range(8)}
    alone = {n: [ask(client, "".join(said[: i + 1])) for i in range(4)] for n, said in prompts.items()}
    got = {n: [] for n in prompts}

    def converse(n):
        with daemon.client() as mine, mine.session() as session:
            for i in range(4):
                prompt = "".join(prompts[n][: i + 1])
                if i == 2:  # what was cloned and what was saved go on as the original would
                    session.save(f"s{n}")
                    other = session.clone() if n % 2 else mine.restore(f"s{n}")
                    got[n].append(text(other.generate(prompt, temperature=0, max_tokens=20, ignore_eos=True)))
                else:
                    got[n].append(text(session.generate(prompt, temperature=0, max_tokens=20, ignore_eos=True)))

    in_threads([lambda n=n: converse(n) for n in prompts])
    assert got == alone


def test_a_generation_is_cancelled_and_the_connection_stays(client):
    socket_before = client._socket
    events = client.generate("a", **LONG)
    got = []
    for event in events:
        got.append(event)
        if len(got) == 4:
            events.cancel()
    assert (got[-1].reason, len(got) < 200) == ("cancelled", True)
    events.cancel()  # of what is over, nothing happens
    early = client.generate("a", **LONG)
    early.cancel()
    assert [event.reason for event in early if isinstance(event, Done)] == ["cancelled"]
    assert ask(client, "b")
    assert client._socket is socket_before
    client.close()
    early.cancel()  # nor without a connection


def test_another_thread_cancels(daemon, client):
    """While the events are waited for: the prompt takes some seconds."""
    events, got = client.generate("k" * 4000, **LONG, resumable=True), []
    reading = threading.Thread(target=lambda: got.extend(events))
    with daemon.client() as other:
        reading.start()
        while not other.status()["server"]["requests"]:
            time.sleep(0.01)
        events.cancel()
        reading.join(30)
    assert (got[-1].reason, got[-1].usage.completion_tokens < 100) == ("cancelled", True)
    assert ask(client, "b")


def test_leaving_one_of_two_generations_leaves_the_other(client):
    expected = ask(client, "two", max_tokens=60)
    left, kept = client.generate("one", **LONG), client.generate("two", max_tokens=60, ignore_eos=True, temperature=0)
    got = [next(left), next(kept), next(left), next(kept)][1::2]
    left.close()
    assert client.status()["server"]["requests"] == 1
    assert text([*got, *kept]) == expected


def test_a_stream_that_is_not_acknowledged_ends_when_it_is_cancelled(daemon, client):
    with Raw(daemon) as raw:
        reply = raw.request("generate", prompt="h", options=LONG, resumable=True)
        raw.receive(lambda: reply.seq >= client.hello["limits"]["credits"])
        expected = text(reply.events)
        raw.socket.sendall(pack({"id": 99, "op": "cancel", "request": reply.request}))
        quiet(client)  # it has ended, and what was not acknowledged is still held
    with Raw(daemon) as raw:
        again = raw.request("resume", stream=reply.stream, after=0)
        raw.receive(lambda: again.over)
        assert text(again.events).startswith(expected)
        assert (again.events[-1].reason, again.result()) == ("cancelled", {})


def test_a_slow_reader_stalls_nobody_and_costs_little(daemon, client):
    before = psutil.Process(daemon.process.pid).memory_info().rss
    slow = []
    for n in range(8):
        raw = Raw(daemon)
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.append((raw, raw.request("generate", prompt=f"e{n}", options=SLOW)))
    for n in range(10):
        assert len(ask(client, f"quick {n}")) > 5
    time.sleep(0.3)
    assert psutil.Process(daemon.process.pid).memory_info().rss - before < 8 << 20
    assert client.status()["server"]["requests"] == 8
    raw, reply = slow[0]  # what it has not read, it can read later
    raw.receive(lambda: reply.over)
    assert reply.events[-1].usage.completion_tokens == SLOW["max_tokens"]
    for raw, _ in slow:
        raw.socket.close()
    quiet(client)


def breaking(client, chance):
    """Break the client's connection now and then, as a network does."""
    receive = client._receive

    def sometimes():
        if chance.random() < 0.03:
            client._socket.shutdown(socket.SHUT_RDWR)
        receive()

    client._receive = sometimes


@pytest.mark.parametrize("seed", range(2))
def test_a_stream_goes_on_after_drops(daemon, client, seed):
    expected = ask(client, f"resume {seed}", max_tokens=300)
    with daemon.client() as mine:
        breaking(mine, random.Random(seed))
        before = client.call("metrics")["requests"].get("resume", 0)
        assert ask(mine, f"resume {seed}", max_tokens=300, resumable=True) == expected
        assert client.call("metrics")["requests"].get("resume", 0) > before
        mine.close()
    quiet(client)


def test_an_answer_that_is_whole_is_not_lost_with_the_connection(daemon):
    with daemon.client() as client:
        events = client.generate("whole", max_tokens=5, ignore_eos=True, resumable=True)
        next(events)
        time.sleep(0.3)  # the rest, and the answer, have come
        while not isinstance(next(events), Done):
            pass
        client._socket.shutdown(socket.SHUT_RDWR)
        assert list(events) == []


def test_a_stream_is_its_users_and_ends_if_nobody_comes(daemon, client):
    with Raw(daemon) as raw:
        reply = raw.request("generate", prompt="f", options=LONG, resumable=True)
        raw.receive(lambda: reply.stream)
    for stream, after, code in (("x" * 22, 0, "no_such_stream"), (reply.stream, 10**6, "bad_request")):
        with pytest.raises(DaemonError) as caught:
            client.call("resume", stream=stream, after=after)
        assert caught.value.code == code
    assert client.status()["server"]["requests"] == 1
    quiet(client)  # resume_within is 1 second
    with pytest.raises(DaemonError, match="no such stream"):
        client.call("resume", stream=reply.stream, after=0)


@pytest.mark.parametrize(("keep", "reason"), [(True, "max_tokens"), (False, "cancelled")])
def test_a_stream_in_a_session_goes_on_if_the_session_does(daemon, client, keep, reason):
    with Raw(daemon) as raw:
        opened = raw.request("open_session", keep=keep)
        raw.receive(lambda: opened.over)
        options = {"max_tokens": 40, "ignore_eos": True}
        reply = raw.request("generate", prompt="j", session=opened.result()["session"], options=options, resumable=True)
        raw.receive(lambda: reply.stream)
    with Raw(daemon) as raw:
        again = raw.request("resume", stream=reply.stream, after=reply.seq)
        raw.receive(lambda: again.over)
    assert (again.events[-1].reason if "ok" in again.answer else again.answer["error"]["code"]) == reason
    quiet(client)


def test_a_stream_that_goes_on_elsewhere_says_so_where_it_was(daemon, client):
    with Raw(daemon) as first, Raw(daemon) as second:
        reply = first.request("generate", prompt="g", options={"max_tokens": 200, "ignore_eos": True}, resumable=True)
        first.receive(lambda: reply.stream)
        again = second.request("resume", stream=reply.stream, after=reply.seq)
        first.receive(lambda: reply.over)
        assert reply.answer["error"]["code"] == "moved"
        again.stream = reply.stream  # it acknowledges from now on
        second.receive(lambda: second.flush() or again.over)
        assert isinstance(again.events[-1], Done)
    quiet(client)


def test_sessions_that_are_kept(daemon):
    with daemon.client() as one:
        kept, left = one.session(keep=True).id, one.session().id
    with daemon.client() as two:
        assert ask(two, "a", session=type("S", (), {"id": kept})()) == ask(two, "a")
        with pytest.raises(DaemonError) as caught:
            list(two.generate("a", session=type("S", (), {"id": left})()))
        assert caught.value.code == "no_such_session"
    time.sleep(0.8)
    with daemon.client() as three, pytest.raises(DaemonError, match="no such session"):
        three.call("close_session", session=kept)


@pytest.mark.parametrize(
    ("op", "fields", "code"),
    [
        ("sing", {}, "unknown_op"),
        ("embed", {"text": "x"}, "bad_request"),
        ("generate", {}, "bad_request"),
        ("generate", {"prompt": "x", "messages": []}, "bad_request"),
        ("generate", {"prompt": 3}, "bad_request"),
        ("generate", {"prompt": "x", "colour": 3}, "bad_request"),
        ("generate", {"prompt": "x", "options": {"colour": 3}}, "option"),
        ("generate", {"prompt": "x", "options": {"temperature": -5}}, "option"),
        ("generate", {"prompt": "x", "priority": "top"}, "option"),
        ("generate", {"prompt": "x", "options": {"post": ["moons"]}}, "plugin"),
        ("generate", {"prompt": "x", "session": "y"}, "no_such_session"),
        ("generate", {"prompt": "x", "options": {"context": 9999}}, "option"),
        ("save_session", {"session": "y", "name": "../x"}, "option"),
        ("restore_session", {"name": "none"}, "session_file"),
        ("restore_session", {"name": "/etc/passwd"}, "option"),
        ("reload_rules", {}, "option"),
        ("hello", {"versions": [1]}, "bad_request"),
        ("load_model", {"model": "nowhere.gguf"}, "model_file"),
        ("load_model", {"model": "x", "options": {"progress": 1}}, "option"),
    ],
)
def test_mistakes_have_codes_and_do_no_harm(client, op, fields, code):
    with pytest.raises(DaemonError) as caught:
        client.call(op, **fields)
    assert caught.value.code == code
    assert client.status()["server"]["requests"] == 0


def test_the_async_client_cancels_resumes_and_fails_as_the_other(daemon, client):
    expected = ask(client, "later", max_tokens=200)

    async def work():
        async with AsyncClient(str(daemon.socket)) as mine:
            async for event in mine.generate("a", **LONG):
                if isinstance(event, Delta):
                    break
            with pytest.raises(DaemonError) as caught:
                await mine.call("sing")
            assert caught.value.code == "unknown_op"
            got = ""
            async for event in mine.generate("later", temperature=0, max_tokens=200, ignore_eos=True, resumable=True):
                got += event.text if isinstance(event, Delta) else ""
                if len(got) in (20, 70, 120):
                    mine._writer.transport.abort()
            return got

    assert asyncio.run(work()) == expected
    quiet(client)


@pytest.mark.parametrize("last_words", [{"code": "limit", "message": "full"}, None])
def test_a_daemon_that_takes_no_one_any_more_is_not_besieged(daemon, tmp_path, monkeypatch, last_words):
    monkeypatch.setattr("edge_rt.daemon.client.async_.PAUSES", (0.01, 0.01))
    connections = []

    def down(pieces):
        connections.append(None)
        if len(connections) > 1:
            yield b"" if last_words is None else pack({"id": None, "error": last_words})
            return
        for count, data in enumerate(pieces):
            yield data
            if count == 10:
                return

    async def work():
        async with AsyncClient(str(tmp_path / "r.sock")) as mine:
            async for _ in mine.generate("a", **LONG, resumable=True):
                pass

    with Relay(tmp_path / "r.sock", daemon.socket, down), pytest.raises(DaemonError) as caught:
        asyncio.run(asyncio.wait_for(work(), 10))
    assert (caught.value.code, len(connections)) == (("limit", 2) if last_words else ("disconnected", 4))
    with daemon.client() as client:
        quiet(client)


def test_a_model_is_loaded_and_unloaded_when_asked(tmp_path, random_model):
    write_plugin(tmp_path)
    with Daemon(tmp_path) as found, found.client() as client:
        status = client.status()
        assert (status["worker"]["state"], status["model"]) == ("none", None)
        with pytest.raises(DaemonError) as caught:
            list(client.generate("x"))
        assert caught.value.code == "no_model"
        options = {"engine": "null", "device": "null", "context": 128}
        client.call("load_model", model=str(random_model()), options=options)
        session = client.session()
        assert client.status()["model"]["context"] == 128
        events = client.generate("x", **LONG)
        next(events)
        with pytest.raises(DaemonError) as caught:
            client.call("unload_model")
        assert caught.value.code == "busy"
        events.close()
        client.call("unload_model")
        assert client.status()["worker"]["state"] == "none"
        client.call("load_model", model=str(random_model()), options=options)
        with pytest.raises(DaemonError) as caught:
            list(session.generate("x"))
        assert caught.value.code == "session_lost"
        assert ask(client, "x")


def test_no_daemon(tmp_path):
    with pytest.raises(DaemonError, match="no daemon answers at unix:") as caught:
        Client(str(tmp_path / "none.sock"))
    assert caught.value.code == "disconnected"
