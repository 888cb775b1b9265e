"""Operations: quotas of users, errors of requests, models that clients load, and adapters."""

import struct
import time

import pytest
from daemons import Daemon, write_plugin
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.daemon.address import parse
from edge_rt.daemon.client import Client, connect_socket
from edge_rt.daemon.config import Limits
from edge_rt.daemon.operations import UserQuotas
from edge_rt.daemon.protocol import FrameReader, pack
from edge_rt.errors import DaemonError, ProtocolError

KEY = "0123456789abcdef"


LONG = {"max_tokens": 3500, "ignore_eos": True}


FEW = Limits(requests=5, requests_per_user=3, held_bytes=50, held_bytes_per_user=30)


def refused(work):
    with pytest.raises(ProtocolError) as caught:
        work()
    return caught.value.code


def test_one_user_leaves_room_for_others():
    shares = UserQuotas(FEW)
    for _ in range(3):
        shares.begin(1)
    assert refused(lambda: shares.begin(1)) == "limit"
    shares.begin(2)
    shares.begin(2)
    assert refused(lambda: shares.begin(3)) == "busy"
    shares.end(1)
    shares.begin(3)
    shares.hold(1, 30)
    assert refused(lambda: shares.hold(1, 1)) == "limit"
    shares.hold(2, 20)
    assert refused(lambda: shares.hold(3, 1)) == "limit"
    assert (shares.requests, shares.held) == (5, 50)


def test_bytes_that_turn_out_to_be_anothers_are_moved_or_stay():
    shares = UserQuotas(FEW)
    shares.hold(1, 20)
    shares.move(20, 1, 2)
    shares.hold(1, 30)
    assert refused(lambda: shares.move(30, 1, 2)) == "limit"
    assert refused(lambda: shares.hold(1, 1)) == "limit"
    shares.hold(2, -20)
    shares.move(30, 1, 2)
    shares.hold(1, 20)
    assert shares.held == 50


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), max_size=60))
def test_nothing_is_left_when_all_is_over(steps):
    shares, begun, held = UserQuotas(FEW), [], []
    for user, more in steps:
        try:
            shares.begin(user)
            begun.append(user)
            shares.hold(user, more)
            held.append((user, more))
        except ProtocolError:
            if begun:
                shares.end(begun.pop(0))
            if held:
                shares.hold(held[0][0], -held.pop(0)[1])
        assert shares.requests == len(begun) <= 5
        assert shares.held == sum(more for _, more in held) <= 50
        for one in range(3):
            assert begun.count(one) <= 3
            assert sum(more for user, more in held if user == one) <= 30
    for user in begun:
        shares.end(user)
    for user, more in held:
        shares.hold(user, -more)
    assert (shares.requests, shares.held, dict(shares._requests), dict(shares._held)) == (0, 0, {}, {})


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("shares")
    write_plugin(folder)
    (folder / "key").write_text(KEY + "\n")
    (folder / "key").chmod(0o600)
    config = f'key_file = "key"\nlisten = ["tcp:127.0.0.1:0", "{folder}/d.sock"]\n[limits]\nrequests = 5\nrequests_per_user = 3\n'
    config += "held_bytes = 300_000\nheld_bytes_per_user = 200_000\nrequests_per_second = 0\n"
    found = Daemon(folder, config=config, model=str(random_model()), delay=0.005)
    found.words = [word for word in found.words if word not in ("--listen", str(found.socket))]
    with found:
        found.port = int(found.said.decode().split("tcp:127.0.0.1:")[1].split(",")[0])
        found.ready().close()
        yield found


def other(daemon):
    """A client that is another user."""
    return Client(f"tcp:127.0.0.1:{daemon.port}", key=KEY, timeout=30.0)


def settled(client):
    until = time.monotonic() + 10
    while (server := client.status()["server"])["requests"] or server["held_bytes"]:
        assert time.monotonic() < until, server
        time.sleep(0.01)


def test_a_user_with_many_requests_under_way_does_not_keep_others_out(daemon):
    with daemon.client() as one, daemon.client() as same, other(daemon) as another:
        streams = [client.generate("x", **LONG) for client in (one, one, same)]
        for stream in streams:
            next(stream)
        with pytest.raises(DaemonError, match="a user may have 3 requests under way; wait for one") as caught:
            same.call("tokenize", text="x")
        assert caught.value.code == "limit"
        assert another.call("tokenize", text="x")["tokens"]
        more = [another.generate("y", **LONG) for _ in range(2)]
        for stream in more:
            next(stream)
        with pytest.raises(DaemonError) as caught:
            another.call("tokenize", text="x")
        assert caught.value.code == "busy", "its share is not used up, but there is no more of all"
        for stream in (*streams, *more):
            stream.close()
        settled(one)


def test_a_user_whose_requests_are_long_does_not_keep_others_out(daemon):
    hello = pack({"id": 1, "op": "hello", "versions": [1]})
    connections = []
    for _ in range(3):
        connections.append(connect_socket(parse(str(daemon.socket)), 10))
        connections[-1].sendall(hello)
        assert "ok" in next(iter(FrameReader().feed(connections[-1].recv(1 << 16))))
        connections[-1].sendall(struct.pack(">I", 99_000) + b"\x00" * 98_000)
    connections[-1].settimeout(10)
    (said,) = FrameReader().feed(connections[-1].recv(1 << 16))
    assert said["error"]["code"] == "limit"
    assert "a user may have 200,000 bytes" in said["error"]["message"]
    with other(daemon) as another:
        assert another.status()["server"]["held_bytes"] < 200_000
        assert len(another.call("tokenize", text="x" * 50_000)["tokens"]) > 10
    for one in connections:
        one.close()
    with daemon.client() as client:
        settled(client)
