"""Who may use the daemon over HTTP: keys, names of hosts, origins of pages; and the configuration of it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from daemons import Daemon, write_plugin
from http_peer import Peer, connect

from edge_rt.cli import main as cli
from edge_rt.daemon import config as configuration
from edge_rt.daemon.address import Address
from edge_rt.daemon.config import HttpConfig
from edge_rt.errors import RuleError

pytest.importorskip("h11", reason="the daemon speaks HTTP with h11; pip install 'edge-rt[http]'")

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


def test_pages_of_other_origins_are_refused(peer):
    for origin in ("http://evil.example", "null", "http://localhost:3001", "https://localhost:3000"):
        reply = peer.post(COMPLETION, SHORT, Origin=origin)
        assert (reply.status, reply.code) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in reply.headers
        assert peer.ask("OPTIONS", COMPLETION, Origin=origin, Access_Control_Request_Method="POST").status == 403
    assert peer.ask("OPTIONS", COMPLETION).status == 405
    own = peer.get("/health", Origin="http://localhost:1", Host="localhost:1")
    assert (own.status, "access-control-allow-origin" in own.headers) == (200, False)


def test_pages_that_may_ask(daemon, peer):
    origin = "http://localhost:3000"
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization, x-stainless-os"}
    reply = Peer(daemon.port).ask("OPTIONS", COMPLETION, Origin=origin, **asked)
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == origin
    assert reply.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    for reply in (peer.post(COMPLETION, SHORT, Origin=origin), Peer(daemon.port).post(COMPLETION, SHORT, Origin=origin)):
        assert (reply.headers["access-control-allow-origin"], reply.headers["vary"]) == (origin, "Origin")
    assert reply.status == 401


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_a_configuration(folder):
    (folder / "c.toml").write_text('[http]\nkey_file = "keys"\norigins = ["https://a.example", "http://[::1]:3"]\nhosts = ["A"]\n')
    found = configuration.read_config(folder / "c.toml").http
    assert found == HttpConfig((Address("tcp", "127.0.0.1", 8080),), (KEY, OTHER), False, ("https://a.example", "http://[::1]:3"), ("a",))
    (folder / "c.toml").write_text('[http]\nlisten = ["/run/h.sock"]\nopen = true\n')
    assert configuration.read_config(folder / "c.toml").http == HttpConfig((Address("unix", "/run/h.sock"),), open=True)
    (folder / "c.toml").write_text("")
    assert configuration.read_config(folder / "c.toml").http is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[http]\norigins = ['*']", r"line 2: '\*' is no origin"),
        ("[http]\norigins = ['http://a/']", "line 2: 'http://a/' is no origin"),
        ("[http]\nlisten = ['tcp:0.0.0.0:80']", "line 2: 'tcp:0.0.0.0:80' is no address"),
        ("[http]\nkeys = ['x']", "line 2: http has no rule keys"),
        ("[http]\nkey_file = 'short'", "line 2: the key has fewer than 16 characters"),
        ("key_file = 'keys'", "line 1: there are several keys"),
        ("[http]\nkey_file = 'empty'", "line 2: the key has fewer than 16 characters"),
    ],
)
def test_configurations_that_are_wrong(folder, text, message):
    for name, keys in (("short", f"{KEY}\nshort"), ("empty", "\n")):
        (folder / name).write_text(keys)
        (folder / name).chmod(0o600)
    (folder / "c.toml").write_text(text)
    with pytest.raises(RuleError, match=message):
        configuration.read_config(folder / "c.toml")


def test_check(tmp_path, capsys):
    words = ["serve", "--check", "--listen", str(tmp_path / "d.sock"), "--config", str(tmp_path / "c.toml")]
    (tmp_path / "c.toml").write_text("[http]\n")
    assert cli.main(words) == 1
    assert "HTTP on a TCP port is open to every process of this machine; give a path, or set key_file, or open" in capsys.readouterr().err
    port = free_port()
    (tmp_path / "c.toml").write_text("[http]\nopen = true\n")
    assert cli.main([*words, "--http", f"tcp:127.0.0.1:{port}", "--http", str(tmp_path / "h.sock")]) == 0
    said = capsys.readouterr().err
    assert f"would listen at http at tcp:127.0.0.1:{port}\nwould listen at http at unix:{tmp_path}/h.sock\n" in said


def test_without_h11(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["serve", "--check", "--listen", str(tmp_path / "d.sock"), "--http", str(tmp_path / "h.sock")]) == 1
    assert "HTTP needs the package h11; pip install 'edge-rt[http]'" in capsys.readouterr().err


def test_a_socket_of_systemd_named_http(tmp_path, random_model):
    """systemd hands its sockets over by number; one that is named so speaks HTTP, and needs keys as any other."""
    write_plugin(tmp_path)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "activated.sock"))
        unix.listen()
        unix.set_inheritable(True)
        daemon = Daemon(tmp_path, "--http", str(tmp_path / "not-used.sock"), model=str(random_model()))
        code = (
            "import os, sys; fd = int(sys.argv[1]); fd == 3 or os.dup2(fd, 3); os.set_inheritable(3, True);"
            "os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1', 'LISTEN_FDNAMES': 'http'};"
            "os.execv(sys.argv[2], sys.argv[2:])"
        )
        words = [sys.executable, "-c", code, str(unix.fileno()), *daemon.words]
        daemon.process = subprocess.Popen(words, env=daemon.environment, stderr=subprocess.PIPE, bufsize=0, pass_fds=[unix.fileno()])
        try:
            assert f"http at unix:{tmp_path}/activated.sock".encode() in daemon.line()
            assert Peer(str(tmp_path / "activated.sock")).get("/").status == 200
            assert not (tmp_path / "not-used.sock").exists()
        finally:
            daemon.__exit__()


# ---- the beginning and the end ---------------------------------------------------------------------------------------


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
