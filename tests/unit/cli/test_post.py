"""`edge-rt post`, `edge-rt rules check`, and what they share with `run` and `chat`."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from unittest.mock import patch

import pytest

from edge_rt.cli import main as cli
from edge_rt.cli.post import _Stream
from edge_rt.plugin_host.registry import Registry
from edge_rt.postprocess.rules import Ruleset

CODE = """
from edge_rt.hooks import PostProcessorFactory, hookimpl

EDGE_RT_API = 1

class Stars:
    def __init__(self, sign):
        self.sign, self.held, self.counts = sign, "", {"digits": 0}

    def feed(self, text):
        if "!" in text:
            raise ValueError("no shouting")
        text, self.held = self.held + text, ""
        while text[-1:].isdigit():
            text, self.held = text[:-1], text[-1] + self.held
        return self._starred(text)

    def _starred(self, text):
        self.counts["digits"] += sum(c.isdigit() for c in text)
        return "".join(self.sign if c.isdigit() else c for c in text)

    def flush(self):
        text, self.held = self.held, ""
        return self._starred(text)

    def cut(self, following):
        self.held = ""
        return "<cut>"

def compile_rules(rules):
    sign = rules.text("sign", "*")
    return lambda: Stars(sign)

@hookimpl
def edge_rt_post_processors():
    return [PostProcessorFactory("stars", compile_rules, "hides digits")]
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder with an installed plugin, current, and on the path of processes too."""
    info = tmp_path / "stars-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stars\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edge_rt]\nstars = plugin_stars\n")
    (tmp_path / "plugin_stars.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("edge_rt.plugins").level
    yield tmp_path
    logging.getLogger("edge_rt.plugins").setLevel(level)  # doctor silences it
    sys.modules.pop("plugin_stars", None)


@pytest.fixture
def call(site, capfdbinary):
    """``call(*words)``: (status, standard output, standard error)."""

    def run(*words):
        status = cli.main(list(words))
        out, err = capfdbinary.readouterr()
        return status, out.decode("utf-8", "surrogateescape"), err.decode()

    return run


def test_a_file(call, site):
    (site / "t.txt").write_bytes("a1 你2 \udcff3".encode("utf-8", "surrogateescape"))
    assert call("post", "t.txt", "--post", "stars") == (0, "a* 你* \udcff*", "")
    status, out, err = call("post", "t.txt", "--rule", 'stars.sign="#"', "--counts")
    assert (status, out, json.loads(err)) == (
        0,
        "a# 你# \udcff#",
        {"rules": json.loads(err)["rules"], "post": [{"name": "stars", "counts": {"digits": 3}, "most_held": 1}]},
    )
    assert re.fullmatch("[0-9a-f]{8}", json.loads(err)["rules"])


def test_lines_are_texts_of_their_own(call, site):
    (site / "t.txt").write_text("a1\n2b\nx!3\n4")
    status, out, err = call("post", "t.txt", "--post", "stars", "--lines", "--counts")
    assert (status, out) == (0, "a*\n*b\nx!3\n*")
    note, counts = err.splitlines()
    assert note == "note: post-processor stars failed and was left out from there on: ValueError: no shouting"
    assert json.loads(counts)["post"] == [{"name": "stars", "counts": {"digits": 3}, "most_held": 1}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["post", "t.txt"], "there is nothing to do; name post-processors with --post, as --post redaction, or give --rules"),
        (["post", "none.txt", "--post", "stars"], "cannot read none.txt: no such file or directory; check the name"),
        (["post", "t.txt", "--post", "stars,"], "--post takes names with commas between them, as redaction,punctuation"),
        (["post", "t.txt", "--post", "moons"], "no post-processor named moons, there is .*stars.*"),
        (["post", "t.txt", "--rules", "r.toml"], "r.toml, line 2: stars has no rule sing; did you mean sign?"),
        (["rules", "check", "r.toml"], "r.toml, line 2: stars has no rule sing; did you mean sign?"),
        (["rules", "chekc", "r.toml"], "edge-rt rules has no action 'chekc'; write edge-rt rules check FILE"),
        (["run", "--rules", "r.toml", "hi"], "r.toml, line 2: stars has no rule sing; did you mean sign?"),
        (["run", "--rule", "stars.sign=3", "hi"], "sign is a whole number; give a text"),
    ],
)
def test_mistakes(call, site, words, message):
    (site / "t.txt").write_text("1")
    (site / "r.toml").write_text('[stars]\nsing = "x"\n')
    status, out, err = call(*words)
    assert (status, out) == (1, "")
    assert re.fullmatch(f"error: {message.replace('?', '[?]')}\n", err)


def test_rules_that_are_right(call, site):
    (site / "r.toml").write_text('[stars]\nsign = "x"\non_failure = "stop"\n')
    status, out, err = call("rules", "check", "r.toml")
    assert (status, err) == (0, "")
    head, *rows = out.splitlines()
    assert re.fullmatch(r"r\.toml is right, version [0-9a-f]{8}, compiled in [\d.]+ ms\.", head)
    assert rows == ["POST-PROCESSOR  IF IT FAILS", "stars           the stream stops"]
    found = json.loads(call("rules", "check", "r.toml", "--json")[1])
    assert (found["ok"], found["pipeline"], found["files"]) == (True, [{"name": "stars", "if_it_fails": "the stream stops"}], [])
    (site / "r.toml").write_text("[stars]\nsign = 3\n")
    status, out, err = call("rules", "check", "r.toml", "--json")
    assert (status, err) == (1, "")
    assert json.loads(out) == {
        "file": "r.toml",
        "ok": False,
        "line": 2,
        "reason": "sign is a whole number; give a text",
        "message": "r.toml, line 2: sign is a whole number; give a text",
    }


def test_doctor_looks_at_rules(call, site):
    (site / "r.toml").write_text("[stars]\nsign = 3\n")
    status, out, _ = call("doctor", "--rules", "r.toml")
    assert status == 1
    assert "Rules\n  wrong  r.toml, line 2: sign is a whole number; give a text\n" in out
    (site / "r.toml").write_text('[stars]\nsign = "x"\n')
    found = json.loads(call("doctor", "--rules", "r.toml", "--json")[1])
    assert found["rules"]["ok"]
    assert found["problems"] == []


def test_nothing_of_a_long_text_or_line_is_kept(site):
    for lines in (False, True):
        stream, written = _Stream(Ruleset({"stars": {}}, Registry.load()), ()), 0

        def count(data):
            nonlocal written
            written += len(data)

        with patch("edge_rt.cli.post.write_bytes", count):
            process = stream.feed_lines if lines else stream.feed
            process("a" * 1000)
            tracemalloc.start()
            for _ in range(1000):
                process("b" * 1000)
            kept, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert written == 1_001_000  # as it came
            assert kept < 50_000


def test_lines_that_end_are_all_there_are(site):
    stream, written = _Stream(Ruleset({"stars": {}}, Registry.load()), ()), []
    with patch("edge_rt.cli.post.write_bytes", written.append):
        stream.feed_lines("")
        stream.close(cut=False)
    assert (stream.rules, stream.counts) == ("", {})  # no text was begun for what follows the last line
    assert written == []


# ---- as a process ----------------------------------------------------------------------------------------------------


def start(*words):
    program = [sys.executable, "-m", "edge_rt.cli.main", "post", "-", *words]
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


def read_until(stream, end):
    found = b""
    while not found.endswith(end):
        byte = stream.read(1)
        assert byte, found
        found += byte
    return found


def test_text_comes_out_as_it_goes_in(site):
    with start("--post", "stars") as process:
        for text, out in (("ab1", b"ab"), ("2c", b"**c"), ("你", "你".encode())):
            process.stdin.write(text.encode())
            assert read_until(process.stdout, out) == out
        process.stdin.write(b"3")
        process.stdin.close()
        assert (process.stdout.read(), process.wait(20)) == (b"*", 0)


def test_ctrl_c_cuts_the_text(site):
    with start("--post", "stars", "--counts") as process:
        process.stdin.write(b"a2b1")
        assert read_until(process.stdout, b"b") == b"a*b"
        process.send_signal(signal.SIGINT)
        assert (process.stdout.read(), process.wait(20)) == (b"<cut>", 130)
        assert json.loads(process.stderr.read())["post"] == [{"name": "stars", "counts": {"digits": 1}, "most_held": 1}]


def test_rules_change_between_lines(site):
    rules = site / "r.toml"
    rules.write_text('[stars]\nsign = "x"\n')
    with start("--rules", "r.toml", "--lines") as process:
        process.stdin.write(b"1\n")
        assert read_until(process.stdout, b"\n") == b"x\n"
        rules.write_text('[stars]\nsign = "yy"\n')
        assert read_until(process.stderr, b"\n") == b"note: the rules were exchanged\n"
        process.stdin.write(b"1\n")
        assert read_until(process.stdout, b"\n") == b"yy\n"
        rules.write_text("[stars]\nsign = 3\n")
        assert read_until(process.stderr, b"\n").endswith(b"r.toml, line 2: sign is a whole number; give a text\n")
        process.stdin.write(b"1\n")
        process.stdin.close()
        assert (process.stdout.read(), process.wait(20)) == (b"yy\n", 0)


def test_a_reader_that_leaves_ends_it(site):
    with start("--post", "stars") as process:
        process.stdout.close()
        deadline = time.monotonic() + 20
        try:
            while process.poll() is None and time.monotonic() < deadline:
                process.stdin.write(b"text " * 1000)
        except BrokenPipeError:
            pass
        assert (process.wait(20), process.stderr.read()) == (141, b"")
