"""HTTP connections: who may use them, hostile requests, limits, and the end of the daemon."""

import contextlib
import json
import os
import random
import signal
import socket
import threading
import time

import psutil
import pytest
from daemons import Daemon, write_plugin
from http_peer import Peer, connect, replies

KEY, OTHER = "a" * 20, "b" * 20


COMPLETION = "/v1/completions"


SHORT = {"prompt": "Once", "max_tokens": 5, "edge_rt": {"ignore_eos": True, "session": "mine"}}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("access")
    write_plugin(found)
    (found / "keys").write_text(f"{KEY}\n\n{OTHER}\n")
    (found / "keys").chmod(0o600)
    return found


@pytest.fixture(scope="module")
def daemon(folder, random_model):
    config = '[http]\nkey_file = "keys"\norigins = ["http://localhost:3000"]\nhosts = ["Box.local"]\n'
    port = free_port()
    with Daemon(folder, "--http", f"tcp:127.0.0.1:{port}", config=config, model=str(random_model())) as found:
        found.ready().close()
        found.port = port
        yield found


@pytest.fixture(scope="module")
def peer(daemon):
    return Peer(daemon.port, Authorization=f"Bearer {KEY}")


def test_keys(daemon, peer):
    stranger = Peer(daemon.port)
    for shown in (None, f"Bearer {KEY}x", KEY, f"Basic {KEY}", "Bearer"):
        headers = {} if shown is None else {"Authorization": shown}
        for path in (COMPLETION, "/v1/models", "/metrics"):
            reply = stranger.ask("POST" if path == COMPLETION else "GET", path, SHORT if path == COMPLETION else None, **headers)
            assert (reply.status, reply.code, reply.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert (stranger.get("/health").status, stranger.get("/").status) == (200, 200)
    assert peer.post(COMPLETION, SHORT).status == 200
    assert stranger.post(COMPLETION, SHORT, Authorization=f"bearer  {OTHER}").status == 200


def test_each_key_is_a_user_of_its_own(daemon, peer):
    """With sessions of its own, and nothing to be learnt from what was computed for others."""
    other = Peer(daemon.port, Authorization=f"Bearer {OTHER}")
    asked = {**SHORT, "prompt": "what was said before " * 3, "edge_rt": {"ignore_eos": True, "session": "twice"}}
    reused = [one.post(COMPLETION, asked).json["edge_rt"]["usage"]["reused_tokens"] for one in (peer, peer, other, other)]
    assert (reused[0], reused[2]) == (0, 0)
    assert reused[1] == reused[3] > 50
    alone = {**asked, "prompt": "another thing that was said " * 3, "edge_rt": {"ignore_eos": True}}
    reused = [one.post(COMPLETION, alone).json["edge_rt"]["usage"]["reused_tokens"] for one in (peer, peer, other, other)]
    assert (reused[0], reused[2]) == (0, 0)
    assert reused[1] == reused[3] > 50


def test_connections_are_counted_by_key(tmp_path, random_model):
    write_plugin(tmp_path)
    (tmp_path / "keys").write_text(f"{KEY}\n{OTHER}")
    (tmp_path / "keys").chmod(0o600)
    config = 'limits.connections_per_user = 3\n[http]\nkey_file = "keys"\n'
    with Daemon(tmp_path, "--http", str(tmp_path / "h.sock"), config=config) as daemon, contextlib.ExitStack() as stack:
        found = []
        for key in (KEY, KEY, KEY, OTHER, KEY):
            one = stack.enter_context(connect(str(daemon.folder / "h.sock")))
            one.sendall(f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
            found.append(int(one.recv(99).split()[1]))
        assert found == [200, 200, 200, 200, 429]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("127.0.0.1:9", 200), ("[::1]:80", 200), ("LOCALHOST:80", 200), ("box.local", 200), ("box.local:8080", 200),
        ("evil.example", 403), ("evil.example:8080", 403), ("localhost.evil.example", 403), ("", 403), ("127.0.0.1.evil.example", 403),
        ("localhost:80:80", 403), ("localhost:", 403),
    ],
)  # fmt: skip
def test_a_name_that_was_bound_anew_to_this_machine_is_refused(peer, host, status):
    for path in ("/health", "/v1/models"):
        reply = peer.get(path, Host=host)
        assert reply.status == status
        assert status == 200 or reply.code == "host_not_allowed"


def test_before_the_model_is_open_and_without_one(tmp_path, random_model):
    write_plugin(tmp_path)
    with Daemon(tmp_path, "--http", str(tmp_path / "h.sock")) as daemon:
        peer = Peer(str(tmp_path / "h.sock"))
        assert (peer.get("/health").status, peer.get("/health").json["status"]) == (503, "none")
        assert peer.get("/v1/models").json == {"object": "list", "data": []}
        reply = peer.post(COMPLETION, SHORT)
        assert (reply.status, reply.code, reply.headers["retry-after"]) == (503, "no_model", "1")
        with daemon.client() as client:
            client.call("load_model", model=str(random_model()), options={"engine": "null", "device": "null"})
        reply = peer.post(COMPLETION, SHORT)
        assert (reply.status, reply.code, reply.headers["retry-after"]) == (503, "model_loading", "1")
        assert peer.get("/health").json["status"] == "starting"
        daemon.ready().close()
        assert (peer.get("/health").status, peer.post(COMPLETION, SHORT).status) == (200, 200)


def test_what_is_under_way_comes_to_its_end_and_nothing_new_begins(tmp_path, random_model):
    write_plugin(tmp_path)
    with Daemon(tmp_path, "--http", str(tmp_path / "h.sock"), model=str(random_model()), delay=0.01) as daemon:
        daemon.ready().close()
        peer, found = Peer(str(tmp_path / "h.sock")), []
        asked = {"prompt": "Once", "max_tokens": 60, "edge_rt": {"ignore_eos": True}}
        with connect(peer.address) as kept:
            thread = threading.Thread(target=lambda: found.append(peer.post(COMPLETION, asked)))
            thread.start()
            time.sleep(0.2)
            os.kill(daemon.process.pid, signal.SIGTERM)
            time.sleep(0.1)
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            with kept.makefile("rb") as file:
                said = file.read()
            assert said.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b'"status":"draining"' in said
            assert b"\r\nConnection: close\r\n" in said
            thread.join(10)
        assert found[0].json["usage"]["completion_tokens"] == 60


def test_a_stream_that_is_broken_off_says_so(tmp_path, random_model):
    write_plugin(tmp_path)
    config = "drain_seconds = 0.2\n"
    with Daemon(tmp_path, "--http", str(tmp_path / "h.sock"), model=str(random_model()), delay=0.005, config=config) as daemon:
        daemon.ready().close()
        peer = Peer(str(tmp_path / "h.sock"))
        thread = threading.Timer(0.2, os.kill, (daemon.process.pid, signal.SIGTERM))
        thread.start()
        *_, last = peer.stream(COMPLETION, {"prompt": "Once", "max_tokens": 3000, "edge_rt": {"ignore_eos": True}})
        assert last["error"]["code"] == "draining"
        thread.join()


LIMITS = """
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
def limited(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("hostile")
    write_plugin(folder)
    with Daemon(folder, "--http", str(folder / "h.sock"), config=LIMITS, model=str(random_model())) as found:
        found.ready().close()
        yield found


@pytest.fixture(scope="module")
def limited_peer(limited):
    return Peer(str(limited.folder / "h.sock"))


@pytest.fixture(autouse=True)
def unhurt(limited, limited_peer):
    """After each test the limited is as it was, and was all the time."""
    process = psutil.Process(limited.process.pid)
    before, files = process.memory_info().rss, process.num_fds()
    yield
    until = time.monotonic() + 5
    with limited.client() as client:
        while (server := client.status()["server"])["connections"] > 1 or server["requests"] or server["held_bytes"]:
            assert time.monotonic() < until, server
            time.sleep(0.02)
        assert client.status()["worker"]["deaths"] == 0
    while process.num_fds() > files:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert limited_peer.ask("POST", "/v1/completions", BODY).json["usage"]["completion_tokens"] == 3
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
def test_what_is_no_request_is_answered_once_and_ends_the_connection(limited_peer, data, status):
    started = time.monotonic()
    found = limited_peer.raw(data + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    assert [reply.status for reply in found] == [status]
    assert found[0].json["error"]["message"]
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nA: ", b"GET /", b"a", HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;"])
def test_what_never_ends_is_refused_as_soon_as_it_is_too_long(limited_peer, data):
    started = time.monotonic()
    with connect(limited_peer.address) as connection:
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
def test_bodies_that_are_none(limited_peer, body):
    reply = limited_peer.ask("POST", "/v1/completions", body)
    assert (reply.status, reply.code) == (400, "malformed_json")


def test_slow_heads_and_bodies(limited_peer):
    """A byte now and then does not keep a connection."""
    for data, said in ((b"GET / HTTP/1.1\r\nHost: x\r\nA: ", True), (HEAD + b"Content-Length: 10\r\n\r\n", True), (b"", False)):
        started = time.monotonic()
        with connect(limited_peer.address) as connection:
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


def test_a_connection_that_asks_no_more_is_closed(limited_peer):
    with connect(limited_peer.address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        started = time.monotonic()
        assert [reply.status for reply in replies(connection)] == [200]
        assert 1 < time.monotonic() - started < 4


def test_too_many_requests_a_second(tmp_path):
    """With so few that none becomes due while all are looked at."""
    with Daemon(tmp_path, "--http", str(tmp_path / "h.sock"), config="limits.requests_per_second = 1\n"):
        asked = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 300 + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        found = Peer(str(tmp_path / "h.sock")).raw(asked)
    assert (len(found), found[0].status, found[-1].status) == (301, 200, 429)
    assert (found[-1].code, found[-1].headers["retry-after"]) == ("rate_limit_exceeded", "1")


def test_requests_behind_one_that_takes_long(limited, limited_peer):
    """What comes meanwhile waits in little memory, and is answered afterwards."""
    body = json.dumps({"prompt": "Once", "max_tokens": 200, "edge_rt": {"ignore_eos": True}}).encode()
    post = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    large = HEAD + b"Content-Length: 90000\r\n\r\n" + b"[" * 90_000
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert [reply.status for reply in limited_peer.raw(post + large * 5 + last)] == [200] + [400] * 5 + [200]


def test_http_1_0(limited_peer):
    (reply,) = limited_peer.raw(b"GET /health HTTP/1.0\r\n\r\n")
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    body = json.dumps({"prompt": "Once", "max_tokens": 3, "stream": True, "edge_rt": {"ignore_eos": True}}).encode()
    (reply,) = limited_peer.raw(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert reply.body.endswith(b"\n\ndata: [DONE]\n\n")
    assert "transfer-encoding" not in reply.headers


def test_a_client_that_asks_before_it_sends(limited_peer):
    with connect(limited_peer.address) as connection, connection.makefile("rb") as file:
        connection.sendall(HEAD + b"Content-Length: %d\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n" % len(BODY))
        assert (file.readline(), file.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")
        connection.sendall(BODY)
        assert file.readline() == b"HTTP/1.1 200 OK\r\n"
    (reply,) = limited_peer.raw(b"POST /no HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
    assert reply.status == 404


def test_begun_bodies_of_many_share_a_limit(limited_peer):
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            one = stack.enter_context(connect(limited_peer.address))
            one.sendall(HEAD + b"Content-Length: 90000\r\n\r\n" + b"x" * 70_000)
        time.sleep(0.2)
        reply = limited_peer.ask("POST", "/v1/completions", b"x" * 90_000)
        assert (reply.status, reply.code) == (429, "rate_limit_exceeded")


def test_random_bytes(limited_peer):
    source = random.Random(5)
    words = [b"GET ", b"POST ", b"/v1/completions", b" HTTP/1.1\r\n", b"Host: x\r\n", b"\r\n", b"Content-Length: 5",
             b"Transfer-Encoding: chunked", b"\0", b"\xff", b"5\r\n", b"0\r\n\r\n", b"{}", b"\n", b"Expect: 100-continue\r\n"]  # fmt: skip
    for _ in range(150):
        data = b"".join(source.choice(words) if source.random() < 0.9 else source.randbytes(9) for _ in range(source.randrange(1, 20)))
        for reply in limited_peer.raw(data, end=True):
            assert 200 <= reply.status < 600
            assert reply.status != 500


def test_pages_of_other_origins(daemon, peer):
    for origin in ("http://evil.example", "null", "http://localhost:3001", "https://localhost:3000"):
        reply = peer.post(COMPLETION, SHORT, Origin=origin)
        assert (reply.status, reply.code, "access-control-allow-origin" in reply.headers) == (403, "origin_not_allowed", False)
        assert peer.ask("OPTIONS", COMPLETION, Origin=origin, Access_Control_Request_Method="POST").status == 403
    assert peer.ask("OPTIONS", COMPLETION).status == 405
    own = peer.get("/health", Origin="http://localhost:1", Host="localhost:1")
    assert (own.status, "access-control-allow-origin" in own.headers) == (200, False)
    allowed = "http://localhost:3000"
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization, x-stainless-os"}
    reply = peer.ask("OPTIONS", COMPLETION, Origin=allowed, **asked)
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (204, allowed)
    assert reply.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    for one, status in ((peer, 200), (Peer(daemon.port), 401)):
        reply = one.post(COMPLETION, SHORT, Origin=allowed)
        assert (reply.status, reply.headers["access-control-allow-origin"], reply.headers["vary"]) == (status, allowed, "Origin")
