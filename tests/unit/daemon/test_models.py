"""Models that are exchanged while others are there, and what becomes of sessions whose model left before they were used."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time

import pytest
from daemons import Daemon, write_plugin

from edge_rt.daemon.protocol import FrameReader, pack
from edge_rt.errors import DaemonError

OPTIONS = {"engine": "null", "device": "null", "context": 128}
NULL = 'engine = "null"\ndevice = "null"\n'


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_the_model_of_a_name_is_exchanged_and_not_one_whose_file_is_called_so(tmp_path, random_model):
    write_plugin(tmp_path)
    one, other = tmp_path / "one" / "m.gguf", tmp_path / "other" / "m.gguf"
    for path in (one, other):
        path.parent.mkdir()
        shutil.copy(random_model(), path)
    with Daemon(tmp_path, config=f'[models.code]\nfile = "{one}"\n{NULL}', model=str(other)) as daemon, daemon.ready() as client:
        first = client.status()["worker"]["pid"]
        client.call("load_model", model=str(other), options=OPTIONS)
        assert gone(first), "the worker of the model that was replaced"
        assert {model["name"] for model in client.status()["models"]} == {"code", "m"}
        assert list(client.generate("x", max_tokens=2))


def test_two_who_load_at_once_do_not_leave_a_worker_behind(tmp_path, random_model):
    write_plugin(tmp_path)
    asked = [{"op": "hello", "versions": [1]}, *[{"op": "load_model", "model": str(random_model()), "options": OPTIONS}] * 2]
    with Daemon(tmp_path) as daemon, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(daemon.socket))
        connection.sendall(b"".join(pack({"id": number, **message}) for number, message in enumerate(asked)))
        frames, found = FrameReader(), {}
        while len(found) < len(asked):
            found |= {message["id"]: message for message in frames.feed(connection.recv(1 << 16))}
        assert found[2]["error"]["code"] == "busy"
        assert "ok" in found[1]


def test_who_asks_for_facts_keeps_nobody_from_exchanging_a_model(tmp_path, random_model):
    write_plugin(tmp_path)
    http = tmp_path / "h.sock"
    with Daemon(tmp_path, "--http", str(http), model=str(random_model())) as daemon, daemon.ready() as client:
        os.kill(client.status()["worker"]["pid"], signal.SIGSTOP)  # it does not say what it holds
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(http))
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(0.1)
            client.call("unload_model")


def test_a_session_keeps_its_context_when_its_model_left_also_before_it_was_used(tmp_path, random_model):
    write_plugin(tmp_path)
    with Daemon(tmp_path, model=str(random_model())) as daemon, daemon.ready() as client:
        fresh, saved = client.session(context=24), client.session(context=24)
        assert allowed(saved, "ab") == 24
        saved.save("kept")
        for deaths in (1, 2):
            os.kill(client.status()["worker"]["pid"], signal.SIGKILL)
            until = time.monotonic() + 20
            while client.status()["worker"]["deaths"] < deaths:
                assert time.monotonic() < until
                time.sleep(0.02)
            assert allowed(saved, "abc") == 24
            if deaths == 1:
                assert allowed(fresh, "ab") == 24
                with pytest.raises(DaemonError) as caught:
                    client.session(context=1 << 40)
                assert caught.value.code == "option"
        with pytest.raises(DaemonError) as caught:
            allowed(fresh, "abc")
        assert caught.value.code == "session_lost", "it was used, and never saved"


def allowed(session, prompt):
    """Cells that a request in a session may use."""
    return list(session.generate(prompt, max_tokens=3, ignore_eos=True))[-1].context.allowed


def test_nothing_waits_for_memory_for_a_client_that_has_gone(tmp_path, random_model):
    write_plugin(tmp_path)
    config = 'memory = "110M"\n' + "".join(f'[models.{name}]\nfile = "{random_model()}"\n{NULL}' for name in ("a", "b"))
    with Daemon(tmp_path, config=config, delay=0.01) as daemon, daemon.client() as client:

        def state():
            return {one["name"]: one["worker"]["state"] for one in client.status()["models"]}["b"]

        events = client.generate("x", model="a", max_tokens=3000, ignore_eos=True)
        next(events)
        asked = [{"op": "hello", "versions": [1]}, {"op": "tokenize", "text": "x", "model": "b"}, {"op": "open_session", "model": "b"}]
        asked.append({"op": "generate", "prompt": "x", "model": "b"})
        with socket.socket(socket.AF_UNIX) as other:
            other.settimeout(30)
            other.connect(str(daemon.socket))
            other.sendall(b"".join(pack({"id": number, **message}) for number, message in enumerate(asked)))
            until = time.monotonic() + 20
            while state() != "waiting" or client.status()["server"]["requests"] < 4:
                assert time.monotonic() < until, client.status()
                time.sleep(0.02)
        while state() != "none":
            assert time.monotonic() < until, client.status()
            time.sleep(0.02)
        assert client.status()["server"]["requests"] == 1
        assert client.status()["server"]["sessions"] == 0
        events.close()
        assert list(client.generate("x", model="b", max_tokens=2))
