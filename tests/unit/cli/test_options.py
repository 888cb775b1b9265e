"""Reading the command line: without typer where it is plainly right, and then exactly as typer would."""

import json
from importlib import import_module
from typing import get_type_hints

import pytest

from edge_rt import model_hub
from edge_rt.cli import chat, pull, run
from edge_rt.cli.generation import generate_options
from edge_rt.cli.main import COMMANDS
from edge_rt.cli.options import CONVERTERS, GenerationOptions, check, quick_parse, specs
from edge_rt.cli.typer_app import ANNOTATIONS, parse
from edge_rt.errors import ConstraintError, OptionError
from edge_rt.types import GenerateOptions, SamplingParams

GOOD = [
    ("run", ["Hello"]),
    ("run", []),
    ("run", ["-"]),
    ("run", ["--", "--not-an-option"]),
    ("run", ["--raw", "a b", "--json", "-v"]),
    ("run", ["-m", "x.gguf", "-n", "5", "-c", "64", "-t", "2", "--temp", "0", "hi"]),
    ("run", ["--model=x.gguf", "--max-tokens=5", "--temp=1e-3", "--stop=a=b", "--stop", "", "hi"]),
    ("run", ["--stop", "a", "--stop", "--b", "-l", "4+1", "-l", "5-inf", "hi"]),
    ("run", ["--repeat-last-n", "-1", "--presence-penalty", "-0.5", "hi"]),
    ("run", ["-n", "1", "-n", "2", "hi"]),
    ("run", ["--grammar", 'root ::= "a"', "--json-schema", "{}", "--key-type", "q8_0", "--memory", "1.5G", "--no-pack"]),
    ("run", ["--seed", " 7 ", "--session", "s.bin", "--logprobs", "3", "--post", "a,b", "--speculate", "8", "--ignore-eos", "-f", "p.txt"]),
    ("chat", ["--system", "Be brief", "--load", "talk.json"]),
    ("chat", ["--tools", "tools.json"]),
    ("embed", []),
    ("embed", ["one", "--pooling", "last", "two", "--no-normalize", "--", "-3"]),
    ("pull", ["smollm2"]),
    ("pull", ["--sha256", "00", "https://example.org/x.gguf"]),
    ("models", ["--json"]),
    ("inspect", ["x.gguf", "--tensors"]),
    ("context", ["explain", "-", "--json", "--grader", "content"]),
    ("plugins", []),
    ("doctor", ["--json"]),
    ("doctor", ["--probe"]),
    ("bench", ["-p", "64", "-n", "8", "-r", "1", "-m", "x", "--json"]),
]
WRONG = [
    ("run", ["--nonsense"]),
    ("run", ["-n"]),
    ("run", ["-n", "many"]),
    ("run", ["--temp", "hot"]),
    ("run", ["one", "two"]),
    ("run", ["--raw=yes", "hi"]),
    ("pull", []),
    ("inspect", ["--json"]),
    ("context", ["explain"]),
    ("chat", ["hello"]),
    ("embed", ["one", "-2"]),
]


@pytest.mark.parametrize(("command", "words"), GOOD)
def test_both_ways_of_reading_agree(command, words):
    module = import_module(COMMANDS[command])
    quick = quick_parse(module.Options, words)
    assert quick is not None, "this line should need no typer"
    parsed = parse([command, *words], COMMANDS)
    assert not isinstance(parsed, int)
    assert parsed[0] is module
    assert vars(quick) == vars(parsed[1])


@pytest.mark.parametrize(("command", "words"), WRONG)
def test_a_wrong_line_is_left_to_typer_which_refuses_it(command, words, capsys):
    assert quick_parse(import_module(COMMANDS[command]).Options, words) is None
    assert parse([command, *words], COMMANDS) == 2
    assert "Error" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["-n5", "hi"], ["-h"], ["--help"]])
def test_what_only_typer_understands_is_left_to_it(words, capsys):
    assert quick_parse(run.Options, words) is None
    parsed = parse(["run", *words], COMMANDS)
    if words[0] == "-n5":
        assert parsed[1].max_tokens == 5
    else:
        assert parsed == 0
        assert "Examples:" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_defines_its_options_completely(command):
    module = import_module(COMMANDS[command])
    assert module.HELP.strip().splitlines()[0].endswith(".")
    assert "Examples:" in module.HELP
    flags = [flag for spec, _ in specs(module.Options).values() for flag in spec.flags]
    assert len(flags) == len(set(flags))
    for name, (spec, annotation) in specs(module.Options).items():
        assert annotation in ANNOTATIONS
        assert annotation == "bool" or annotation in CONVERTERS, name
        assert spec.help.endswith("."), name
        assert spec.metavar or annotation == "bool", name


def test_defaults_are_those_of_the_python_interface():
    assert generate_options(quick_parse(run.Options, [])) == GenerateOptions()


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
    request = generate_options(quick_parse(run.Options, [*words, "--ignore-eos"]), logprobs=2)
    default = GenerateOptions()
    changed = {name for name in SamplingParams._fields if getattr(request.sampling, name) != getattr(default.sampling, name)}
    assert changed == set(SamplingParams._fields)
    assert request.sampling.logit_bias == {4: 1.5}
    assert (request.max_tokens, request.stop, request.grammar, request.speculate) == (7, ("a", "b"), 'root ::= "ä"', 6)
    assert (request.logprobs, request.post, request.ignore_eos, request.json_schema) == (2, ("x", "y"), True, None)


def test_a_schema_from_text_and_from_a_file(tmp_path):
    schema = {"type": "object", "title": "中"}
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    for text in (json.dumps(schema), f"@{path}"):
        assert generate_options(quick_parse(run.Options, ["--json-schema", text])).json_schema == schema
    assert generate_options(quick_parse(run.Options, ["--grammar-file", str(path)])).grammar == json.dumps(schema)
    tools = [{"type": "function", "function": {"name": "now"}}]
    path.write_text(json.dumps(tools))
    assert generate_options(quick_parse(run.Options, ["--tools", str(path)])).tools == tools


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
        (["--post", ""], OptionError, "--post takes"),
        (["-l", "five"], OptionError, "--logit-bias takes a token id"),
        (["-l", "+5"], OptionError, "--logit-bias takes a token id"),
    ],
)
def test_requests_that_make_no_sense(words, error, message):
    with pytest.raises(error, match=message):
        generate_options(quick_parse(run.Options, words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "0"], "--max-tokens takes a number of at least 1 and not 0"),
        (["-c", "0"], "--ctx takes a number of at least 1 and not 0"),
        (["-c", "-5"], "--ctx takes a number of at least 1 and not -5"),
        (["-t", "0"], "--threads"),
        (["--temp", "-1"], "--temp takes a number of at least 0 and not -1.0"),
        (["--temp", "nan"], "--temp takes a finite number and not nan"),
        (["--dry-base", "inf"], "--dry-base takes a finite number"),
        (["--top-p", "1.5"], "--top-p takes a number from 0 to 1 and not 1.5"),
        (["--seed", "-1"], "--seed takes a number from 0"),
        (["--key-type", "q4_0"], "--key-type takes f16 or q8_0 and not 'q4_0'"),
        (["--logprobs", "1000"], "--logprobs takes a number from 0 to 100"),
    ],
)
def test_values_outside_their_limits(words, message):
    with pytest.raises(OptionError) as raised:
        check(quick_parse(run.Options, words))
    assert message in str(raised.value)


def test_defaults_are_within_their_limits():
    for path in COMMANDS.values():
        kind = import_module(path).Options
        check(quick_parse(kind, ["x"] * sum(not spec.flags for spec, _ in specs(kind).values())))


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


def test_a_missing_argument_or_an_unknown_option_is_a_bug_of_the_caller():
    with pytest.raises(TypeError, match="name is required"):
        pull.Options()
    with pytest.raises(TypeError, match="no such option: colour"):
        chat.Options(colour=1)


def test_options_are_typed_as_their_values():
    assert get_type_hints(GenerationOptions)["temp"] is float
