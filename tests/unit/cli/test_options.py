"""Command lines: what is read from them, what is refused, and the request that becomes of them."""

import json
from typing import get_type_hints

import pytest

from edge_rt import model_hub
from edge_rt.cli.generation import generate_options
from edge_rt.cli.main import COMMANDS, command_class
from edge_rt.cli.options import REQUIRED, GenerationOptions, help_text, parse, specs
from edge_rt.cli.run import RunCommand
from edge_rt.errors import ConstraintError, OptionError
from edge_rt.types import GenerateOptions, SamplingParams


def read(command, *words):
    """The options of a command line that differ from their defaults."""
    kind = command_class(command)
    values = vars(parse(command, kind, words))
    assert values.keys() == specs(kind).keys()
    return {name: value for name, value in values.items() if value != specs(kind)[name][0].default}


def request(*words, logprobs=0):
    return generate_options(parse("run", RunCommand, words), logprobs)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["run"], {}),
        (["run", "Hello"], {"prompt": "Hello"}),
        (["run", ""], {"prompt": ""}),
        (["run", "-"], {"prompt": "-"}),
        (["run", "--", "--not-an-option"], {"prompt": "--not-an-option"}),
        (["run", "--", "--"], {"prompt": "--"}),
        (["run", "größe 中", "--raw", "--json", "-v"], {"prompt": "größe 中", "raw": True, "json": True, "verbose": True}),
        (["run", "-m", "x.gguf", "-n", "5", "hi", "-c", "64"], {"model": "x.gguf", "max_tokens": 5, "prompt": "hi", "ctx": 64}),
        (["run", "-mx.gguf", "-n5", "-vt2"], {"model": "x.gguf", "max_tokens": 5, "verbose": True, "threads": 2}),
        (["run", "-ma=b", "-vn", "3"], {"model": "a=b", "verbose": True, "max_tokens": 3}),
        (["run", "--n-predict=5", "--temp=1e-3", "--stop=a=b", "--stop", ""], {"max_tokens": 5, "temperature": 1e-3, "stop": ("a=b", "")}),
        (["run", "--temp=0", "--model="], {"temperature": 0.0, "model": ""}),
        (["run", "--stop", "a", "--stop", "--b", "--stop", "--", "-l", "4+1", "-l", "5-inf"],
         {"stop": ("a", "--b", "--"), "logit_bias": ("4+1", "5-inf")}),
        (["run", "--repeat-last-n", "-1", "--presence-penalty", "-0.5"], {"repeat_last_n": -1, "presence_penalty": -0.5}),
        (["run", "-n", "1", "-n", "2"], {"max_tokens": 2}),
        (["run", "--system", "two words -n 5", "-f", "@p.txt"], {"system": "two words -n 5", "file": "@p.txt"}),
        (["run", "--seed", " 7 "], {"seed": 7}),
        (["embed", "one", "--pooling", "last", "two", "--", "-3", "--x"], {"texts": ("one", "two", "-3", "--x"), "pooling": "last"}),
        (["pull", "--sha256", "00", "https://example.org/x.gguf"], {"sha256": "00", "name": "https://example.org/x.gguf"}),
        (["context", "explain", "--", "--"], {"action": "explain", "file": "--"}),
        (["context", "explain", "--json", "-", "--grader", "x"], {"action": "explain", "file": "-", "json": True, "grader": "x"}),
        (["bench", "-p", "64", "-r", "1", "-m", "x"], {"prompt_tokens": 64, "repeat": 1, "model": "x"}),
    ],
)  # fmt: skip
def test_a_line_that_is_right(line, expected):
    assert read(*line) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["run", "--modle", "x"], "No such option: --modle (Possible options: --model"),
        (["run", "--mode"], "No such option: --mode"),
        (["run", "--max", "5"], "No such option: --max"),
        (["run", "-x=5"], "No such option: -x"),
        (["run", "-n"], "Option '-n' requires an argument."),
        (["run", "-n", "many"], "argument -n/--max-tokens/--n-predict: 'many' is not a valid integer"),
        (["run", "-n", "1.5"], "'1.5' is not a valid integer"),
        (["run", "--temp", "hot"], "argument --temp: 'hot' is not a valid number"),
        (["run", "one", "two"], "unrecognized arguments: two"),
        (["run", "--raw=yes", "hi"], "Option '--raw' does not take a value."),
        (["pull"], "the following arguments are required: NAME|URL"),
        (["context", "explain"], "the following arguments are required: FILE"),
        (["embed", "one", "-2"], "No such option: -2"),
    ],
)
def test_wrong_usage(line, message, capsys):
    with pytest.raises(SystemExit) as raised:
        read(*line)
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    usage, hint, empty, error = err.splitlines()
    assert (out, empty) == ("", "")
    assert usage.startswith(f"Usage: edge-rt {line[0]} ")
    assert hint == f"Try 'edge-rt {line[0]} -h' for help."
    assert error.startswith("Error: ")
    assert message in error


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_completely_described(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # wider than help may become
    kind = command_class(command)
    assert help_text(kind).splitlines()[0] == COMMANDS[command][2]
    with pytest.raises(SystemExit) as raised:
        parse(command, kind, ["--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    assert "Examples:\n  edge-rt" in shown
    flags = [flag for spec, _ in specs(kind).values() for flag in spec.flags]
    assert len(flags) == len(set(flags))
    assert all(flag in shown for flag in flags)
    for name, (spec, annotation) in specs(kind).items():
        assert spec.help.endswith("."), name
        assert spec.metavar or annotation == "bool", name
        assert max(map(len, (line for line in shown.splitlines() if "  -" in line))) <= 80
    words = ["x"] * sum(spec.default is REQUIRED for spec, _ in specs(kind).values())
    parse(command, kind, words)  # defaults are within their limits


def test_help_names_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit):
        parse("run", RunCommand, ["-h"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--top-k N Choose among the N likeliest tokens; 0: all. [default: 40]" in shown
    assert "--seed N Seed; a fresh one if left out, which --json and -v show. -l" in shown
    assert "to a share as 25%." in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "0"], "--max-tokens takes a number of at least 1 and not 0"),
        (["-c", "-5"], "--ctx takes a number of at least 1 and not -5"),
        (["--temp", "-1"], "--temp takes a number of at least 0 and not -1.0"),
        (["--temp", "nan"], "--temp takes a finite number and not nan"),
        (["--dry-base", "inf"], "--dry-base takes a finite number and not inf"),
        (["--top-p", "1.5"], "--top-p takes a number from 0 to 1 and not 1.5"),
        (["--seed", "-1"], "--seed takes a number from 0 to 4294967294 and not -1"),
        (["--key-type", "q4_0"], "--key-type takes f16 or q8_0 and not 'q4_0'"),
    ],
)
def test_values_outside_their_limits(words, message):
    with pytest.raises(OptionError) as raised:
        parse("run", RunCommand, words)
    assert str(raised.value) == message


def test_options_are_typed_as_their_values():
    assert get_type_hints(GenerationOptions)["temperature"] is float


def test_defaults_are_those_of_the_python_interface():
    assert request() == GenerateOptions()


def test_every_field_of_a_request_can_be_set(tmp_path):
    grammar = tmp_path / "g.gbnf"
    grammar.write_text('root ::= "ä"', encoding="utf-8")
    numbers = {
        "--temp": 0.5, "--top-k": 3, "--top-p": 0.5, "--min-p": 0.25, "--typical": 0.5, "--repeat-penalty": 1.5, "--repeat-last-n": 9,
        "--frequency-penalty": 0.25, "--presence-penalty": -0.5, "--dry-multiplier": 0.75, "--dry-base": 2.0, "--dry-allowed-length": 4,
        "--dry-penalty-last-n": 32, "--seed": 11,
    }  # fmt: skip
    words = [word for flag, value in numbers.items() for word in (flag, str(value))]
    words += ["-n", "7", "--stop", "a", "--stop", "b", "-l", "4+1.5", "--grammar", f"@{grammar}", "--speculate", "6", "--post", "x, y"]
    found = request(*words, "--ignore-eos", logprobs=2)
    default = GenerateOptions()
    changed = {name for name in SamplingParams._fields if getattr(found.sampling, name) != getattr(default.sampling, name)}
    assert changed == set(SamplingParams._fields)
    assert found.sampling.logit_bias == {4: 1.5}
    assert (found.max_tokens, found.stop, found.grammar, found.speculate) == (7, ("a", "b"), 'root ::= "ä"', 6)
    assert (found.logprobs, found.post, found.ignore_eos, found.json_schema) == (2, ("x", "y"), True, None)


def test_a_schema_from_text_and_from_a_file(tmp_path):
    schema = {"type": "object", "title": "中"}
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    for text in (json.dumps(schema), f"@{path}"):
        assert request("--json-schema", text).json_schema == schema
    assert request("--grammar-file", str(path)).grammar == json.dumps(schema)
    tools = [{"type": "function", "function": {"name": "now"}}]
    path.write_text(json.dumps(tools))
    assert request("--tools", str(path)).tools == tools


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--grammar", "a", "--grammar-file", "b"], OptionError, "contradict"),
        (["--grammar", "a", "--json-schema", "{}"], OptionError, "contradict"),
        (["--json-schema", "{"], ConstraintError, "--json-schema is not JSON"),
        (["--json-schema", "[]"], ConstraintError, "not a JSON object"),
        (["--grammar", "@/nowhere/g"], OptionError, "cannot read the grammar from /nowhere/g"),
        (["--stop", ""], OptionError, "--stop takes a text that is not empty"),
        (["--post", "a,,b"], OptionError, "--post takes"),
        (["-l", "five"], OptionError, "--logit-bias takes a token id"),
        (["-l", "+5"], OptionError, "--logit-bias takes a token id"),
    ],
)
def test_requests_that_make_no_sense(words, error, message):
    with pytest.raises(error, match=message):
        request(*words)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("500M", 500 << 20), ("1.5G", 3 << 29), ("64 MiB", 64 << 20), ("2gb", 2 << 30), ("1k", 1024), ("1T", 1 << 40)],
)
def test_sizes(text, size):
    assert model_hub.parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "0", "-1G", "M", "lots", "1X", "nan", "inf", "1e99", "1 000M", "0.0001"])
def test_sizes_that_are_none(text):
    with pytest.raises(OptionError, match="--memory takes a size as 500M"):
        model_hub.parse_size(text, "--memory")
