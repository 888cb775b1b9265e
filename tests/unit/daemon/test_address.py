"""Listening addresses: parsing, private sockets, locks, systemd."""

import os
import socket
import stat
import subprocess
import sys
import textwrap

import pytest

from edge_rt.daemon import address as addresses
from edge_rt.daemon.address import (
    Address,
    check_address,
    listen,
    notify_systemd,
    parse,
    peer_credentials,
    systemd_listeners,
)
from edge_rt.errors import OptionError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/run/x.sock", Address("unix", "/run/x.sock")),
        ("unix:/run/x.sock", Address("unix", "/run/x.sock")),
        ("/run/a:b.sock", Address("unix", "/run/a:b.sock")),
        ("abstract:edge", Address("abstract", "edge")),
        ("tcp:127.0.0.1:0", Address("tcp", "127.0.0.1", 0)),
        ("tcp:localhost:80", Address("tcp", "127.0.0.1", 80)),
        ("tcp:[::1]:80", Address("tcp", "::1", 80)),
    ],
)
def test_addresses(text, expected):
    assert parse(text) == expected


NONE = ["tcp:0.0.0.0:80", "tcp:127.0.0.1", "tcp:127.0.0.1:99999", "http:x", "unix:", "abstract:", "/" + "x" * 120]


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_address(text):
    with pytest.raises(OptionError):
        parse(text)


def test_a_socket_is_private(tmp_path):
    path = tmp_path / "run" / "d.sock"
    found = listen(Address("unix", str(path)))
    assert (stat.S_IMODE(path.parent.stat().st_mode), stat.S_IMODE(path.stat().st_mode)) == (0o700, 0o600)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        server, _ = found.socket.accept()
        with server:
            assert (peer_credentials(server).user, peer_credentials(server).group) == (os.getuid(), os.getgid())
    found.close()
    assert not path.exists()


def test_who_listens_is_not_pushed_aside_and_who_is_gone_is_replaced(tmp_path):
    path = tmp_path / "d.sock"
    code = f"""
        import os, sys
        from edge_rt.daemon.address import Address, listen
        kept = listen(Address("unix", {str(path)!r}))
        print("there", flush=True)
        sys.stdin.read()
        os._exit(9)  # nothing is cleaned up
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"there\n"
        for try_it in (listen, check_address):
            with pytest.raises(OptionError, match=r"^another daemon listens at unix:.*d\.sock; stop it, or choose another address"):
                try_it(Address("unix", str(path)))
        other.stdin.close()
        other.wait(20)
    assert path.exists()
    check_address(Address("unix", str(path)))
    assert path.exists()
    listen(Address("unix", str(path))).close()


def test_a_program_that_knows_no_lock_is_not_pushed_aside_either(tmp_path):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "d.sock"))
        other.listen()
        for try_it in (listen, check_address):
            with pytest.raises(OptionError, match="another daemon listens at"):
                try_it(Address("unix", str(tmp_path / "d.sock")))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "d.sock"))
    listen(Address("unix", str(tmp_path / "d.sock"))).close()


@pytest.mark.parametrize("text", ["abstract:edge-rt-test-{pid}", "tcp:127.0.0.1:0"])
def test_other_kinds_are_not_shared_either(text):
    if text.startswith("abstract") and not sys.platform.startswith("linux"):
        pytest.skip("abstract sockets are Linux's")
    found = listen(parse(text.format(pid=os.getpid())))
    assert found.address.port or found.address.kind == "abstract"
    for try_it in (listen, check_address):
        with pytest.raises(OptionError, match="another daemon listens at"):
            try_it(found.address)
    found.close()
    check_address(found.address)


def everything(folder):
    return sorted((path, path.lstat().st_mode) for path in folder.rglob("*"))


def test_folders_and_files_that_are_not_for_sockets(tmp_path):
    (tmp_path / "d.sock").write_text("precious")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (tmp_path / "e.sock.lock").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    wrong = {
        "d.sock": "exists and is no socket",
        "dangling": "exists and is no socket",
        "shared/d.sock": "others may write in the folder",
        "e.sock": "cannot listen at unix:.*e.sock: is a directory",
        "d.sock/x/d.sock": "the folder .* for the socket cannot be made: not a directory",
    }
    before = everything(tmp_path)
    for name, message in wrong.items():
        with pytest.raises(OptionError, match=message):
            check_address(Address("unix", str(tmp_path / name)))
    assert everything(tmp_path) == before
    for name, message in wrong.items():
        with pytest.raises(OptionError, match=message):
            listen(Address("unix", str(tmp_path / name)))
    assert (tmp_path / "d.sock").read_text() == "precious"


def test_folders_where_nothing_can_be_written(tmp_path, monkeypatch):
    """As for a user who is not root, whom the tests may not have."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OptionError, match=r"cannot listen at unix:.*d\.sock: permission denied"):
        check_address(Address("unix", str(tmp_path / "d.sock")))
    with pytest.raises(OptionError, match="run for the socket cannot be made: permission denied"):
        check_address(Address("unix", str(tmp_path / "run" / "d.sock")))


def test_sockets_of_systemd(tmp_path, monkeypatch):
    code = """
        import os, socket
        from edge_rt.daemon.address import systemd_listeners
        given = socket.socket(socket.AF_UNIX); given.bind("s.sock"); given.listen()
        os.dup2(given.fileno(), 3)
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
        (found,) = systemd_listeners()
        print(found.address, found.lock, sorted(name for name in os.environ if name.startswith("LISTEN")), systemd_listeners())
    """
    program = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "unix:s.sock None [] []\n", done.stderr
    monkeypatch.setenv("LISTEN_PID", "1")
    assert systemd_listeners() == []


def test_systemd_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify_systemd("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "n"))
        told.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        notify_systemd("READY=1")
        assert told.recv(100) == b"READY=1"
    notify_systemd("STOPPING=1")  # nobody is there any more
    assert addresses.MAX_PATH == 107
