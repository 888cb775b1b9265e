"""`edge-rt context explain`: what it reads, what it writes, and that it needs no model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_rt.cli import main as cli
from edge_rt.cli.context import parse
from edge_rt.errors import OptionError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ask Tom Lind on 3 May."}]
HELLO = {"role": "user", "content": "Hello"}
PAGE = Path(__file__).parents[3] / "docs" / "context.md"


@pytest.fixture
def explain(tmp_path, capsys):
    """``explain(text, *options)``: (status, standard output, standard error)."""

    def call(text, *options):
        path = tmp_path / "talk"
        path.write_text(text, encoding="utf-8")
        return cli.main(["context", "explain", str(path), *options]), *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("text", "messages", "tools"),
    [
        (json.dumps(MESSAGES), MESSAGES, []),
        (json.dumps(MESSAGES, indent=2), MESSAGES, []),
        ("".join(json.dumps(message) + "\n" for message in MESSAGES), MESSAGES, []),
        (json.dumps(HELLO) + "\n", [HELLO], []),
        (json.dumps({"messages": MESSAGES, "tools": [{"name": "search"}]}), MESSAGES, [{"name": "search"}]),
        ("Hello", [HELLO], []),
        ("42", [{"role": "user", "content": "42"}], []),
        ("[brackets] are text too", [{"role": "user", "content": "[brackets] are text too"}], []),
        ('{"a": 1}\n2', [{"role": "user", "content": '{"a": 1}\n2'}], []),
        ("[" * 100_000, [{"role": "user", "content": "[" * 100_000}], []),
        ("", [{"role": "user", "content": ""}], []),
    ],
)
def test_what_a_file_may_be(text, messages, tools):
    assert parse(text) == (messages, tools)


@pytest.mark.parametrize("text", ['{"a": 1}', '{"messages": 1}', '{"messages": [], "tools": {"a": 1}}'])
def test_json_that_holds_no_messages(text):
    with pytest.raises(OptionError, match=r"^the conversation is JSON but no messages; give a list such as "):
        parse(text)


def test_text(explain):
    status, out, err = explain(json.dumps(MESSAGES))
    assert (status, err) == (0, "")
    first, second = out.splitlines()[:3], out.splitlines()[3:]
    assert re.fullmatch(r"0\.\d\d  message 0, system, system, characters 0 to 9; protected: system prompt", first[0])
    assert first[1:2] == ["      'Be brief.'"]
    assert re.fullmatch(r"0\.\d\d  message 1, user, message, characters 0 to 22; protected: newest part, current question", second[0])
    assert re.fullmatch(r"      (times|names) 1 \(\+0\.\d\d\), (names|times) 1 \(\+0\.\d\d\), words 6 \(\+0\.\d\d\)", second[2])


def test_json(explain):
    status, out, _ = explain(json.dumps({"messages": MESSAGES, "tools": [{"name": "search"}]}), "--json")
    assert status == 0
    schema, system, user = map(json.loads, out.splitlines())
    assert schema["protected"] == ["tool schema"]
    assert system["text"] == "Be brief."
    assert 0 < user["score"] < 1
    assert {"feature": "names", "value": 1, "points": pytest.approx(0.3, abs=0.3)} in user["features"]
    assert (user["message"], user["role"], user["kind"], user["start"], user["end"]) == (1, "user", "message", 0, 22)


def test_weights_and_graders_by_name(explain, tmp_path):
    weights = tmp_path / "w.ini"
    weights.write_text("[weight]\nnames = 0\n")
    assert "names 1 (+0.00)" in explain(json.dumps(MESSAGES), "--weights", str(weights))[1]
    assert explain("x", "--grader", "none") == (1, "", "error: no grader named none, there is content\n")
    status, _, err = explain("x", "--weights", str(tmp_path / "missing"))
    assert (status, err) == (1, f"error: cannot read weights from {tmp_path / 'missing'}: no such file or directory\n")


def test_what_is_shown_cannot_command_a_terminal(explain):
    assert not set("\x1b\x9b\u202e\r") & set(explain("\x1b[2J \x9b \u202e \r")[1])


def test_wrong_use(explain, capsys):
    assert cli.main(["context", "forget", "x"]) == 1
    assert capsys.readouterr().err == "error: edge-rt context has no action 'forget'; write edge-rt context explain FILE\n"
    assert explain('[{"role": "user", "content": 1}]')[::2] == (1, "error: message 0 has content of type int; give it as text\n")


def test_it_loads_neither_numpy_nor_llama_cpp(tmp_path):
    (tmp_path / "talk").write_text("Hello")
    code = f"import sys\nfrom edge_rt.cli.main import main\nmain(['context', 'explain', {str(tmp_path / 'talk')!r}])\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "edge_rt.core.context.grading" in loaded
    assert [name for name in ("numpy", "llama_cpp", "jinja2", "typer") if name in loaded] == []


def test_the_page_shows_what_the_command_prints(explain):
    page = PAGE.read_text(encoding="utf-8").partition("With `talk.json`")[2]
    conversation, transcript = re.findall(r"^```(?:json)?\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[:2]
    command, _, shown = transcript.partition("\n")
    assert command == "$ edge-rt context explain talk.json"
    assert explain(conversation)[1] == shown
