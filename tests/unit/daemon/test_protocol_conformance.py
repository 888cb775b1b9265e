"""clients/conformance: our daemon passes, and what does not keep to the protocol is found."""

import sys
from pathlib import Path

import conformance
import pytest
from daemons import Daemon, write_plugin
from protocol_peer import Server
from relay import Relay

from edge_rt.daemon.protocol import FrameReader, pack

CHECKS = list(conformance.server_checks(Server("", None, 0)))
SCENARIOS = Path(__file__).parents[2] / "client_scenarios.py"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("daemon")
    write_plugin(folder)
    with Daemon(folder, config="credits = 16\n", model=str(random_model()), delay=0.001) as found:
        conformance.wait_until_ready(Server(str(found.socket), None, 30))
        yield found


@pytest.mark.parametrize("name", CHECKS)
def test_our_daemon(daemon, name):
    checks = conformance.server_checks(Server(str(daemon.socket), None, 30))
    assert list(conformance.run({name: checks[name]})) == [(name, None)]


def test_the_program(daemon, capsys):
    assert conformance.main([str(daemon.socket), "--only", "hello says"]) == 0
    assert capsys.readouterr().out == "ok      hello says what there is\n1 of 1 hold\n"
    assert conformance.main([str(daemon.socket), "--only", "no such check"]) == 1
    assert conformance.main(["/nowhere/d.sock"]) == 2


# ---- servers that do not keep to it ----------------------------------------------------------------------------------


def altered(alter):
    """Of each message of the daemon's, ``alter`` makes others, or more, or none."""

    def down(pieces):
        frames = FrameReader()
        for data in pieces:
            yield b"".join(pack(one) for message in frames.feed(data) for one in alter(message))

    return down


def changed(which, **fields):
    return lambda message: [{**message, **fields} if which(message) else message]


def without(message, part, name):
    return {**message, part: {key: value for key, value in message[part].items() if key != name}} if part in message else message


MISTAKES = [
    ("hello says what there is", lambda m: [without(m, "ok", "limits")]),
    ("without a common version the connection ends", lambda m: [without(m, "error", "supported")]),
    ("ids are whole numbers", changed(lambda m: m.get("id") == 2**53 - 1, id=2**53)),
    ("what is no message ends the connection", changed(lambda m: m.get("id", 0) is None, id=0)),
    ("what is not in the document is an error", changed(lambda m: "error" in m, error={"code": "bad_request", "message": ""})),
    ("a generation is told as events", lambda m: [] if m.get("event") == "delta" and m["text"] in "aeiou" else [m]),
    ("a generation is told as events", lambda m: [m, m] if m.get("event") == "done" else [m]),
    ("a stream is numbered and can be resumed at every number", lambda m: [m, m] if m.get("seq") == 3 else [m]),
    ("a stream is numbered and can be resumed at every number", changed(lambda m: m.get("seq") == 4, seq=5)),
    ("a stream breaks again and again", changed(lambda m: m.get("seq") == 7 and "text" in m, text="?")),
    ("cancelling ends a generation", changed(lambda m: m.get("event") == "done", reason="max_tokens")),
    ("sessions go on and are cloned", lambda m: [{**m, "usage": {**m["usage"], "reused_tokens": 0}} if "usage" in m else m]),
    ("many requests share a connection", changed(lambda m: m.get("event") == "delta" and m["id"] == 3, text="of another")),
]


@pytest.mark.parametrize(("name", "alter"), MISTAKES, ids=[f"{n} {name}" for n, (name, _) in enumerate(MISTAKES)])
def test_a_server_that_does_not_keep_to_it(daemon, tmp_path, name, alter):
    assert through(lambda message: [message], daemon, tmp_path / "a.sock", name, 10) is None
    assert through(alter, daemon, tmp_path / "b.sock", name, 1)


def through(alter, daemon, path, name, seconds):
    """What the check says of our daemon with messages altered."""
    with Relay(path, daemon.socket, altered(alter)):
        ((_, wrong),) = conformance.run({name: conformance.server_checks(Server(str(path), None, seconds))[name]})
    return wrong


def test_our_client_acknowledges_as_often_as_the_daemon_wants():
    name = "a daemon that waits for acknowledgements"
    checks = conformance.client_checks([sys.executable, str(SCENARIOS)], 20)
    assert list(conformance.run({name: checks[name]})) == [(name, None)]


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        ("forget_to_acknowledge", "a daemon that waits for acknowledgements"),
        ("resume_too_early", "a break at every event"),
        ("ask_anew", "a break at every event"),
    ],
)
def test_a_client_that_does_not_keep_to_it(mistake, name):
    checks = conformance.client_checks([sys.executable, str(SCENARIOS), mistake], 1)
    ((_, wrong),) = conformance.run({name: checks[name]})
    assert wrong
