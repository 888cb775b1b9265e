"""Connections: limits, streams of events, and clients that are hostile or broken and hurt only themselves."""

import os
import random
import select
import socket
import struct
import time
from types import SimpleNamespace

import psutil
import pytest
from daemons import Daemon, write_plugin
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.daemon.address import parse
from edge_rt.daemon.client import connect_socket
from edge_rt.daemon.connection import EventStream, TokenBucket
from edge_rt.daemon.protocol import MAX_BYTES, FrameReader, pack, pack_answer, unpack
from edge_rt.errors import DaemonError, ProtocolError
from edge_rt.types import Delta, record


@given(st.floats(0.5, 1000), st.floats(1, 50), st.lists(st.floats(0, 2), max_size=200))
def test_no_more_are_taken_than_come_and_are_there(rate, most, pauses):
    bucket, now, taken = TokenBucket(rate, most, 0.0), 0.0, 0
    for pause in pauses:
        now += pause
        wait = bucket.take(now)
        taken += not wait
        assert taken <= most + rate * now + 1e-6
        if wait:
            assert TokenBucket.take(bucket, now + wait * 1.001) == 0, "after that time there is one"
            taken += 1
            now += wait * 1.001


@given(st.floats(0.5, 1000), st.lists(st.floats(0, 0.01), max_size=300), st.floats(0.1, 2))
def test_what_is_owed_adds_up_to_a_limit(rate, pauses, longest):
    bucket, now = TokenBucket(rate, 1, 0.0), 0.0
    for number, pause in enumerate(pauses):
        now += pause
        wait = bucket.overdraw(now, longest)
        assert 0 <= wait <= longest + 1e-6
        assert wait >= min(longest, number / rate - now) - 1e-6


CREDITS = 16


def worker(credit):
    """A model whose worker is given credits."""
    return SimpleNamespace(supervisor=SimpleNamespace(tell=lambda command: credit(command["events"])))


def test_a_stream_goes_on_only_after_what_is_still_there():
    stream = EventStream(1, worker(lambda events: None), CREDITS, resumable=True)
    for text in "abcdef":
        stream.add(record(Delta(text)))
    stream.acknowledge(3)
    for seq in (2, 7):
        with pytest.raises(ProtocolError, match="can be resumed after 3 to 6"):
            stream.events_after(seq)
    assert [message["text"] for message in stream.events_after(4)] == ["e", "f"]


def test_credits_of_a_plain_stream_come_back_when_it_was_written():
    given = []
    stream = EventStream(1, worker(given.append), CREDITS, resumable=False)
    for _ in range(10):
        stream.on_written()
    assert (given, stream.token, stream.held) == ([4, 4], None, 0)


CONFIG = """
[limits]
hello_seconds = 0.5
frame_seconds = 0.5
requests_per_second = 0
requests_per_connection = 4
connections = 100
connections_per_user = 90
frame_bytes = 100_000
held_bytes = 300_000
sessions_per_user = 3
saved_per_user = 2
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("hostile")
    write_plugin(folder)
    with Daemon(folder, config=CONFIG, model=str(random_model())) as found:
        found.ready().close()
        yield found


@pytest.fixture(autouse=True)
def unhurt(daemon):
    """After each test the daemon is as it was, and was all the time."""
    process = psutil.Process(daemon.process.pid)
    before, files = process.memory_info().rss, process.num_fds()
    yield
    with daemon.client() as client:
        *_, done = client.generate("still there?", max_tokens=5, ignore_eos=True)
        assert done.usage.completion_tokens == 5
        until = time.monotonic() + 5
        while (server := client.status()["server"])["connections"] > 1 or server["requests"] or server["held_bytes"]:
            assert time.monotonic() < until, server
            time.sleep(0.02)
        assert (server["sessions"], client.status()["worker"]["deaths"]) == (0, 0)
    while process.num_fds() > files:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert process.memory_info().rss - before < 16 << 20


HELLO = pack({"id": 1, "op": "hello", "versions": [1]})


def connect(daemon, greet=False):
    connection = connect_socket(parse(str(daemon.socket)), 10)
    if greet:
        connection.sendall(HELLO)
        assert "ok" in read(connection)[0]
    return connection


def read(connection, most=1):
    """Messages until there are some, or the end."""
    frames, found = FrameReader(), []
    while len(found) < most:
        try:
            data = connection.recv(1 << 16)
        except ConnectionResetError:
            break
        if not data:
            break
        found += frames.feed(data)
    return found


def ended(connection):
    """The code of the last words, if there were any, after which the daemon has closed the connection."""
    found = read(connection, 1 << 20)
    connection.close()
    return found[-1]["error"]["code"] if found else None


def send(connection, data):
    """Send what the daemon takes: it may have closed already."""
    try:
        connection.sendall(data)
    except OSError:
        return


def test_random_bytes(daemon):
    chance = random.Random(1)
    for turn in range(150):
        connection = connect(daemon, greet=turn % 3 == 0)
        data = chance.randbytes(chance.randrange(1, 300))
        if turn % 2:
            data = struct.pack(">I", len(data)) + data
        send(connection, data)
        if turn % 5 == 0:
            ended(connection)
        else:
            connection.close()


@pytest.mark.parametrize("greet", [False, True])
def test_giant_lengths_and_deep_nesting(daemon, greet):
    for data, code in (
        (struct.pack(">I", 2**32 - 1), "frame_too_long"),
        (struct.pack(">I", 100_001), "frame_too_long"),
        (struct.pack(">I", 3000) + b"\x91" * 3000, "bad_frame"),
        (struct.pack(">I", 3) + b"\x81\xa1a", "bad_frame"),
    ):
        connection = connect(daemon, greet)
        send(connection, data)
        assert ended(connection) == code


def test_before_hello_nothing_is_taken(daemon):
    connection = connect(daemon)
    send(connection, pack({"id": 1, "op": "status"}))
    assert ended(connection) == "bad_request"
    connection = connect(daemon)
    send(connection, struct.pack(">I", 5000))
    assert ended(connection) == "frame_too_long"


@pytest.mark.parametrize("greet", [False, True])
def test_who_sends_byte_by_byte_is_sent_away(daemon, greet):
    connection = connect(daemon, greet)
    data = pack({"id": 2, "op": "tokenize", "text": "x" * 1000})
    started = time.monotonic()
    for byte in data[:200]:
        send(connection, bytes([byte]))
        if select.select([connection], [], [], 0.02)[0]:
            break
    assert ended(connection) == "limit"
    assert 0.4 < time.monotonic() - started < 4


def test_who_closes_half_of_it_has_left(daemon):
    connection = connect(daemon, greet=True)
    send(connection, pack({"id": 2, "op": "generate", "prompt": "x", "options": {"max_tokens": 4000, "ignore_eos": True}}))
    connection.shutdown(socket.SHUT_WR)
    read(connection, 1 << 20)
    connection.close()


def test_who_vanishes_mid_stream_is_not_complained_of(tmp_path, random_model):
    """A log that nobody reads fills its pipe in the end, and then who writes to it stands still."""
    write_plugin(tmp_path)
    with Daemon(tmp_path, config=CONFIG, model=str(random_model())) as found:
        found.ready().close()
        for number in range(100):
            connection = connect(found, greet=True)
            send(connection, pack({"id": 2, "op": "generate", "prompt": "x", "options": {"max_tokens": 4000, "ignore_eos": True}}))
            read(connection, 2 + number % 7)
            connection.close()
        with found.client() as client:
            assert client.status()["worker"]["deaths"] == 0
        assert not select.select([found.process.stderr], [], [], 0)[0], found.line()


def test_too_many_connections(daemon):
    connections = []
    for _ in range(300):
        connections.append(connect(daemon))
        send(connections[-1], HELLO)
    kept = [read(one)[0] for one in connections]
    assert sum("ok" in one for one in kept) == 90
    assert {one["error"]["code"] for one in kept if "error" in one} == {"limit"}
    for one in connections:
        one.close()


def test_who_asks_and_does_not_read(daemon):
    with connect(daemon, greet=True) as connection:
        connection.setblocking(False)
        sent, data, until = 0, pack({"id": 2, "op": "status"}) * 100, time.monotonic() + 2
        while time.monotonic() < until and sent < 50 << 20:
            try:
                sent += connection.send(data)
            except BlockingIOError:
                time.sleep(0.01)
        assert sent < 10 << 20, "it reads on and on"
        with daemon.client() as other:
            assert other.status()


def test_requests_under_way_and_bytes_of_them_are_limited(daemon):
    with connect(daemon, greet=True) as connection:
        options = {"max_tokens": 4000, "ignore_eos": True}
        for number in range(2, 8):
            send(connection, pack({"id": number, "op": "generate", "prompt": "x", "options": options}))
        codes = [one["error"]["code"] for one in read(connection, 8) if "error" in one]
        assert codes == ["limit", "limit"]
    connections = [connect(daemon, greet=True) for _ in range(5)]
    for one in connections:
        send(one, struct.pack(">I", 99_000) + b"\x00" * 98_000)
    time.sleep(0.2)
    with daemon.client() as client:
        assert client.status()["server"]["held_bytes"] <= 300_000
    for one in connections:
        one.close()


def test_an_answer_too_long_for_a_frame_is_an_error(daemon):
    with connect(daemon, greet=True) as connection:
        send(connection, pack({"id": 2, "op": "detokenize", "tokens": [1] * 90_000}))
        assert "ok" in read(connection)[0]
    assert unpack(pack_answer({"id": 2, "ok": {"text": "x" * MAX_BYTES}})[4:])["error"]["code"] == "limit"


def test_another_user_is_not_let_in(tmp_path):
    with Daemon(tmp_path, config=f'users = ["{os.getuid() + 1}"]\n') as found:
        connection = connect(found)
        send(connection, HELLO)
        assert ended(connection) == "not_allowed"
        with pytest.raises(DaemonError, match="you may not use this daemon") as caught:
            found.client()
        assert caught.value.code == "not_allowed"


def test_a_tcp_port_takes_only_who_has_the_key(tmp_path):
    (tmp_path / "key").write_text("0123456789abcdef\n")
    (tmp_path / "key").chmod(0o600)
    config = 'key_file = "key"\nlisten = ["tcp:127.0.0.1:0"]\n'
    found = Daemon(tmp_path, config=config)
    found.words = [word for word in found.words if word not in ("--listen", str(found.socket))]
    with found:
        text = found.said.decode()
        port = int(text.rsplit(":", 1)[1])
        for key, code in ((None, "not_allowed"), ("0123456789abcdeX", "not_allowed"), ("0123456789abcdef", None)):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(pack({"id": 1, "op": "hello", "versions": [1], **({"key": key} if key else {})}))
                (answer,) = read(connection)
                assert answer.get("error", {}).get("code") == code
                if code is None:
                    connection.sendall(pack({"id": 2, "op": "unload_model"}))
                    assert read(connection)[0]["error"]["code"] == "not_permitted"


def test_who_asks_nothing_is_sent_away_and_who_waits_is_not(tmp_path, random_model):
    write_plugin(tmp_path)
    with Daemon(tmp_path, config="limits.idle_seconds = 0.5\n", model=str(random_model()), delay=0.7) as found:
        until = time.monotonic() + 30
        found.ready().close()
        connection = connect(found, greet=True)
        send(connection, pack({"id": 2, "op": "generate", "prompt": "x", "options": {"max_tokens": 2, "ignore_eos": True}}))
        while True:
            (*_, last) = read(connection)
            if "ok" in last:
                break
            assert time.monotonic() < until
        started = time.monotonic()
        assert ended(connection) == "limit"
        assert 0.3 < time.monotonic() - started < 5


def test_who_is_refused_again_and_again_is_not_heard_for_a_while_and_others_are(daemon):
    connection = connect(daemon, greet=True)
    connection.setblocking(False)
    asked, answered, frames = 1500, 0, FrameReader()
    data = b"".join(pack({"id": number + 2, "op": "nonsense"}) for number in range(asked))
    sent = connection.send(data)
    assert sent == len(data), "they fit the socket"
    until = time.monotonic() + 10
    while answered < 100:
        assert time.monotonic() < until
        if select.select([connection], [], [], 1)[0]:
            answered += sum(1 for _ in frames.feed(connection.recv(1 << 20)))
    with daemon.client() as client:
        assert client.status()["server"]["connections"] == 2
        refused = client.call("metrics")["errors"]["bad_request"]
        time.sleep(0.1)
        later = client.call("metrics")["errors"]["bad_request"]
    assert refused < asked, "not all of them were looked at"
    assert later - refused < asked / 4
    connection.close()
