"""Recording around the daemon: configuration, --check, both ways in, requests that were refused, and a daemon that was killed."""

import json
import subprocess
import sys
import time

import pytest
from daemons import Daemon
from edge_rt_distill.replay.trace import read_trace
from http_peer import Peer

from edge_rt.cli import main as cli
from edge_rt.cli import serve
from edge_rt.cli.options import parse
from edge_rt.daemon import config as configuration
from edge_rt.daemon.config import RecordConfig
from edge_rt.errors import DaemonError, RuleError

pytest.importorskip("h11", reason="the daemon speaks HTTP with h11; pip install 'edge-rt[http]'")

CHAT = "/v1/chat/completions"
MAIL = "ada@example.org"
HELLO = [{"role": "user", "content": f"Hello {MAIL}"}]
ANSWER = {"max_tokens": 6, "temperature": 0, "edge_rt": {"ignore_eos": True}}


def settled(client, count):
    """The state of the recording when so many requests came to an end, one way or the other."""
    until = time.monotonic() + 10
    while True:
        found = client.status()["recording"]
        if sum(value for name, value in found.items() if name.startswith(("recorded", "left", "dropped"))) >= count:
            return found
        assert time.monotonic() < until, found
        time.sleep(0.01)


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_a_configuration(tmp_path):
    path = tmp_path / "d.toml"
    path.write_text('[record]\nfile = "t.jsonl"\n')
    assert configuration.read_config(path).record == RecordConfig(tmp_path / "t.jsonl", 1.0, False, None, 64 << 20, 4)
    path.write_text('[record]\nfile = "/x/t"\nsample = 0.1\nanswers = true\nrules = "r.toml"\nmax_bytes = "1 MB"\nkeep = 2\n')
    assert configuration.read_config(path).record == RecordConfig(type(path)("/x/t"), 0.1, True, tmp_path / "r.toml", 1 << 20, 2)
    path.write_text("")
    assert configuration.read_config(path).record is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[record]\n", "record has no file; give a text"),
        ("[record]\nfile = ''\n", "line 2: record has no file"),
        ("[record]\nfile = 'x'\nsample = 1.5\n", "line 3: sample is 1.5; give 0.0 to 1.0"),
        ("[record]\nfile = 'x'\nmax_bytes = 9\n", "line 3: max_bytes is 9; give 65536 or more"),
        ("[record]\nfile = 'x'\nkeep = 0\n", "line 3: keep is 0; give 1 to 1000"),
        ("[record]\nfile = 'x'\nsampel = 1\n", "line 3: record has no rule sampel; did you mean sample"),
    ],
)
def test_configurations_that_are_wrong(tmp_path, text, message):
    (tmp_path / "d.toml").write_text(text)
    with pytest.raises(RuleError, match=message):
        configuration.read_config(tmp_path / "d.toml")


def test_the_command_line_names_the_file_and_keeps_the_other_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert serve.configured(parse("serve", serve.ServeCommand, ["--record", "t"])).record == RecordConfig(tmp_path / "t")
    (tmp_path / "d.toml").write_text("[record]\nfile = 'x'\nsample = 0.5\n")
    found = serve.configured(parse("serve", serve.ServeCommand, ["--config", "d.toml", "--record", "t"]))
    assert found.record == RecordConfig(tmp_path / "t", 0.5)


def test_check_says_what_would_be_recorded_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "d.toml").write_text("[record]\nfile = 't.jsonl'\nsample = 0.25\n")
    words = ["serve", "--listen", str(tmp_path / "s"), "--config", str(tmp_path / "d.toml"), "--check"]
    assert cli.main(words) == 0
    said = capsys.readouterr().err
    assert f"would record 25 % of the requests without their answers in {tmp_path / 't.jsonl'}" in said
    assert "would redact what is recorded: redaction by the usual rules, version " in said
    assert not (tmp_path / "t.jsonl").exists()
    (tmp_path / "t.jsonl").write_text("notes")
    (tmp_path / "t.jsonl").chmod(0o600)
    assert cli.main(words) == 1
    assert "is something else than recorded traffic" in capsys.readouterr().err


def test_a_daemon_that_cannot_record_does_not_start_and_leaves_no_socket(tmp_path):
    (tmp_path / "r.toml").write_text("[punctuation]\n")
    (tmp_path / "d.toml").write_text("[record]\nfile = 't.jsonl'\nrules = 'r.toml'\n")
    words = [sys.executable, "-m", "edge_rt.cli.main", "serve", "--listen", tmp_path / "s", "--config", tmp_path / "d.toml"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, "has no rules that conceal anything" in ended.stderr) == (1, True)
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "t.jsonl").exists()


def test_without_recording_the_daemon_imports_no_plugins():
    program = (
        "import sys, edge_rt.daemon.server, edge_rt.daemon.http.connection\n"
        "from edge_rt.daemon.server import Server\nfrom edge_rt.daemon.config import default_config\n"
        "assert Server(default_config()).status()['recording'] is None\n"
        "print([name for name in sys.modules if name.startswith(('edge_rt.plugins', 'edge_rt.daemon.recording', "
        "'edge_rt.plugin_host.registry'))])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "[]\n"


# ---- both ways in ----------------------------------------------------------------------------------------------------


@pytest.fixture
def path(folder):
    return folder / "t.jsonl"


def started(folder, model, more="", **options):
    config = f'limits.requests_per_second = 0\n{more}\n[record]\nfile = "t.jsonl"\nanswers = true\n'
    words = ("--http", str(folder / "h.sock"), "--policy", "strict")
    return Daemon(folder, *words, config=config, model=str(model), delay=0.001, **options)


def test_both_ways_in_are_recorded_and_ask_the_same_again(folder, path, random_model):
    with started(folder, random_model()) as daemon, daemon.ready() as client:
        peer = Peer(str(folder / "h.sock"))
        assert client.status()["recording"]["recorded"] == 0
        whole = peer.post(CHAT, {"messages": HELLO, **ANSWER}).json
        *_, last = peer.stream(CHAT, {"messages": HELLO, **ANSWER, "edge_rt": {**ANSWER["edge_rt"], "session": "mine"}})
        assert last == "[DONE]"
        list(client.generate(f"Mail {MAIL}", max_tokens=6, temperature=0, ignore_eos=True))
        client.embed(["texts to embed are not recorded"])
        generation = client.generate("x", max_tokens=100_000, ignore_eos=True)
        next(generation)
        generation.close()
        with pytest.raises(DaemonError):
            list(client.generate("x", grammar="root ::= ["))
        found = settled(client, 5)
        assert (found["recorded"], found["file"], found["paused"]) == (5, str(path), "")
        assert 'edge_rt_recording_total{result="recorded"} 5' in peer.get("/metrics").body.decode()
        assert client.call("metrics")["recording"]["recorded"] == 5

        text = path.read_text()
        assert MAIL not in text
        assert "mine" not in text
        first, second, third, fourth, fifth = read_trace(path).requests
        assert first.body == {"messages": [{"role": "user", "content": "Hello [EMAIL]"}], **ANSWER}
        assert (first.seen.status, first.seen.finish_reason, first.seen.completion_tokens) == ("ok", "length", 6)
        assert first.seen.prompt_tokens == whole["usage"]["prompt_tokens"]
        assert (second.session, second.body["messages"], first.session) == ("s1", first.body["messages"], None)
        assert (third.path, third.body["prompt"]) == ("/v1/completions", "Mail [EMAIL]")
        assert (fourth.seen.status, fourth.cancel_after > 0) == ("cancelled", True)
        assert (fifth.seen.status, fifth.seen.code) == ("error", "constraint")

        again = peer.post(first.path, dict(first.body)).json
        assert again["choices"][0]["finish_reason"] == "length"
        settled(client, 6)
    *_, last = read_trace(path).requests
    assert last.body == first.body


def test_a_client_that_goes_away_and_one_that_is_refused(folder, path, random_model):
    with started(folder, random_model(), "limits.requests_per_user = 1") as daemon, daemon.ready() as client:
        peer = Peer(str(folder / "h.sock"))
        long = {"messages": HELLO, "max_tokens": 3500, "edge_rt": {"ignore_eos": True}, "stream": True}
        with peer.asked("POST", CHAT, long) as answer:
            answer.readline()
            assert peer.post(CHAT, {"messages": HELLO, **ANSWER}).code == "rate_limit_exceeded"
        settled(client, 2)
    gone, refused = read_trace(path).requests
    assert (gone.seen.status, gone.seen.finish_reason, gone.cancel_after > 0) == ("cancelled", "", True)
    assert (refused.seen.status, refused.seen.code, refused.seen.first_token) == ("error", "limit", None)


def test_a_daemon_that_was_killed_and_started_again_goes_on_in_the_file(folder, path, random_model):
    for _ in range(2):
        with started(folder, random_model()) as daemon, daemon.ready() as client:
            list(client.generate(HELLO, max_tokens=2, ignore_eos=True))
            settled(client, 1)
            daemon.process.kill()
    trace = read_trace(path)
    assert [one.client for one in trace.requests] == ["c1", "c1.2"]
    assert trace.requests[1].at > trace.requests[0].at
    assert trace.about["redacted"] is True
    assert [json.loads(line).get("edge_rt_trace") for line in path.read_text().splitlines()] == [1, None, 1, None]


def test_what_is_under_way_when_the_daemon_ends_is_recorded(folder, path, random_model):
    with started(folder, random_model(), "drain_seconds = 0.2") as daemon, daemon.ready() as client:
        generation = client.generate("x", max_tokens=100_000, ignore_eos=True)
        next(generation)
        daemon.process.terminate()
        daemon.process.wait(30)
    (request,) = read_trace(path).requests
    assert (request.seen.status, request.cancel_after) == ("cancelled", None)
