"""HTTP from clients that mean harm, or are broken: each hurts itself alone, and the daemon's memory stays small."""

import contextlib
import json
import random
import time

import psutil
import pytest
from daemons import Daemon, write_plugin
from http_peer import Peer, connect, replies

pytest.importorskip("h11", reason="the daemon speaks HTTP with h11; pip install 'edge-rt[http]'")

CONFIG = """
[limits]
hello_seconds = 0.5
frame_seconds = 0.7
idle_seconds = 1.5
requests_per_second = 50
connections = 60
connections_per_user = 50
frame_bytes = 100_000
held_bytes = 300_000
"""
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
BODY = json.dumps({"prompt": "Once", "max_tokens": 3, "edge_rt": {"ignore_eos": True}}).encode()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("hostile")
    write_plugin(folder)
    with Daemon(folder, "--http", str(folder / "h.sock"), config=CONFIG, model=str(random_model())) as found:
        found.ready().close()
        yield found


@pytest.fixture(scope="module")
def peer(daemon):
    return Peer(str(daemon.folder / "h.sock"))


@pytest.fixture(autouse=True)
def unhurt(daemon, peer):
    """After each test the daemon is as it was, and was all the time."""
    process = psutil.Process(daemon.process.pid)
    before, files = process.memory_info().rss, process.num_fds()
    yield
    until = time.monotonic() + 5
    with daemon.client() as client:
        while (server := client.status()["server"])["connections"] > 1 or server["requests"] or server["held_bytes"]:
            assert time.monotonic() < until, server
            time.sleep(0.02)
        assert client.status()["worker"]["deaths"] == 0
    while process.num_fds() > files:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert peer.ask("POST", "/v1/completions", BODY).json["usage"]["completion_tokens"] == 3
    assert process.memory_info().rss - before < 16 << 20


@pytest.mark.parametrize(
    ("data", "status"),
    [
        # no HTTP
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nBad Name: 1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: 1\r\n\0: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        # too much
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 9_000 + b"\r\n", 431),
        (HEAD + b"Content-Length: 100001\r\n\r\n", 413),
        (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", 413),
        (HEAD + b"Content-Length: 1000000\r\n\r\n" + b"x" * 1_000_000, 413),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 20, 413),
        # how long it is, said in two ways
        (HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde", 400),
        (HEAD + b"Content-Length: 4, 5\r\n\r\nabcde", 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: +4\r\n\r\nabcd", 400),
        (HEAD + b"Content-Length: 0x4\r\n\r\nabcd", 400),
        (HEAD + b"Content-Length: 999999999999999999999\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (HEAD + b"Transfer-Encoding: identity\r\n\r\n", 501),
        (HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        # chunks that are none
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 70_000 + b"\0", 400),
    ],
)
def test_what_is_no_request_is_answered_once_and_ends_the_connection(peer, data, status):
    started = time.monotonic()
    found = peer.raw(data + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    assert [reply.status for reply in found] == [status]
    assert found[0].json["error"]["message"]
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nA: ", b"GET /", b"a", HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;"])
def test_what_never_ends_is_refused_as_soon_as_it_is_too_long(peer, data):
    started = time.monotonic()
    with connect(peer.address) as connection:
        for part in (data, *[b"a" * 4096] * 5):
            connection.sendall(part)
            time.sleep(0.01)
        (reply,) = replies(connection)
    assert (reply.status, time.monotonic() - started < 0.4) == (431, True)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", b'{"prompt": "x", "edge_rt": {"prune": ' + b'{"a":' * 30 + b"1" + b"}" * 32,
        b'{"prompt": "\\ud800"}', b'{"prompt": "x", "seed": 1' + b"0" * 30 + b"}", b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "seed": 1' + b"0" * 5_000 + b"}", b'{"prompt": "\xff"}',
        b'{"\\udc00": 1}', b"\xef\xbb\xbf{}", b"null", b'{"prompt": "x"} {}',
    ],
)  # fmt: skip
def test_bodies_that_are_none(peer, body):
    reply = peer.ask("POST", "/v1/completions", body)
    assert (reply.status, reply.code) == (400, "malformed_json")


def test_slow_heads_and_bodies(peer):
    """A byte now and then does not keep a connection."""
    for data, said in ((b"GET / HTTP/1.1\r\nHost: x\r\nA: ", True), (HEAD + b"Content-Length: 10\r\n\r\n", True), (b"", False)):
        started = time.monotonic()
        with connect(peer.address) as connection:
            connection.sendall(data)
            for _ in range(20):
                time.sleep(0.1)
                try:
                    connection.sendall(b"a" if data else b"")
                except OSError:
                    break
                if time.monotonic() - started > 1:
                    break
            assert [reply.status for reply in replies(connection)] == ([408] if said else [])
        assert time.monotonic() - started < 3


def test_a_connection_that_asks_no_more_is_closed(peer):
    with connect(peer.address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        started = time.monotonic()
        assert [reply.status for reply in replies(connection)] == [200]
        assert 1 < time.monotonic() - started < 4


def test_too_many_requests_a_second(folder):
    """With so few that none becomes due while all are looked at."""
    with Daemon(folder, "--http", str(folder / "h.sock"), config="limits.requests_per_second = 1\n"):
        asked = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 300 + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        found = Peer(str(folder / "h.sock")).raw(asked)
    assert (len(found), found[0].status, found[-1].status) == (301, 200, 429)
    assert (found[-1].code, found[-1].headers["retry-after"]) == ("rate_limit_exceeded", "1")


def test_requests_behind_one_that_takes_long(daemon, peer):
    """What comes meanwhile waits in little memory, and is answered afterwards."""
    body = json.dumps({"prompt": "Once", "max_tokens": 200, "edge_rt": {"ignore_eos": True}}).encode()
    post = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    large = HEAD + b"Content-Length: 90000\r\n\r\n" + b"[" * 90_000
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert [reply.status for reply in peer.raw(post + large * 5 + last)] == [200] + [400] * 5 + [200]


def test_http_1_0(peer):
    (reply,) = peer.raw(b"GET /health HTTP/1.0\r\n\r\n")
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    body = json.dumps({"prompt": "Once", "max_tokens": 3, "stream": True, "edge_rt": {"ignore_eos": True}}).encode()
    (reply,) = peer.raw(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert reply.body.endswith(b"\n\ndata: [DONE]\n\n")
    assert "transfer-encoding" not in reply.headers


def test_a_client_that_asks_before_it_sends(peer):
    with connect(peer.address) as connection, connection.makefile("rb") as file:
        connection.sendall(HEAD + b"Content-Length: %d\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n" % len(BODY))
        assert (file.readline(), file.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")
        connection.sendall(BODY)
        assert file.readline() == b"HTTP/1.1 200 OK\r\n"
    (reply,) = peer.raw(b"POST /no HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
    assert reply.status == 404


def test_upgrades_and_tunnels(peer):
    upgrade = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    close = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert [reply.status for reply in peer.raw(upgrade + close)] == [200, 200]
    assert peer.raw(b"CONNECT a:80 HTTP/1.1\r\nHost: x\r\n\r\n", end=True)[0].status == 404


def test_many_connections(daemon, peer):
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(connect(peer.address)) for _ in range(80)]
        time.sleep(0.1)
        found[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert [reply.status for reply in replies(found[0])] == [200]
        (refused,) = replies(found[-1])
        assert (refused.status, refused.code) == (429, "rate_limit_exceeded")


def test_begun_bodies_of_many_share_a_limit(peer):
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            one = stack.enter_context(connect(peer.address))
            one.sendall(HEAD + b"Content-Length: 90000\r\n\r\n" + b"x" * 70_000)
        time.sleep(0.2)
        reply = peer.ask("POST", "/v1/completions", b"x" * 90_000)
        assert (reply.status, reply.code) == (429, "rate_limit_exceeded")


def test_random_bytes(peer):
    source = random.Random(5)
    words = [b"GET ", b"POST ", b"/v1/completions", b" HTTP/1.1\r\n", b"Host: x\r\n", b"\r\n", b"Content-Length: 5",
             b"Transfer-Encoding: chunked", b"\0", b"\xff", b"5\r\n", b"0\r\n\r\n", b"{}", b"\n", b"Expect: 100-continue\r\n"]  # fmt: skip
    for _ in range(150):
        data = b"".join(source.choice(words) if source.random() < 0.9 else source.randbytes(9) for _ in range(source.randrange(1, 20)))
        for reply in peer.raw(data, end=True):
            assert 200 <= reply.status < 600
            assert reply.status != 500
