"""Grammars and JSON schemas on libllama: what they force, and that no text given as a grammar can hurt the process."""

import json
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from edge_rt.core.generate.sampler import Sampler
from edge_rt.errors import ConstraintError, OptionError
from edge_rt.native.llama import Vocab
from edge_rt.structured.grammar import compile_constraint
from edge_rt.types import SamplingParams


@pytest.fixture(scope="module")
def vocab(smollm2):
    return Vocab.load(smollm2)


def write(vocab, grammar=None, schema=None, seed=0, limit=400, params=None):
    """A text the constraint allows, chosen by random logits that like short tokens and to come to an end."""
    rng = np.random.default_rng(seed)
    liked = np.zeros(vocab.n_tokens, np.float32)
    liked[[vocab.tokenize(c)[0] for c in '"}],:0123456789']] = 6
    liked[list(vocab.eog_tokens())] = 9
    sampler = Sampler(vocab, params or SamplingParams(seed=seed), compile_constraint(vocab, grammar, schema))
    text = b""
    for _ in range(limit):
        token = sampler.sample(rng.normal(0, 2, vocab.n_tokens).astype(np.float32) + liked)
        sampler.accept(token)
        if vocab.is_eog(token):
            sampler.close()
            return text.decode()
        text += vocab.piece(token)
    raise AssertionError(f"no end after {limit} tokens: {text!r}")


def takes(vocab, grammar, text):
    """Does a grammar allow exactly this text, token by token and then the end?"""
    constraint = compile_constraint(vocab, grammar, None)
    for token in vocab.tokenize(text):
        if not constraint.allows(token):
            return False
        constraint.accept(token)
    return constraint.allows(vocab.eos)


def test_no_constraint(vocab):
    assert compile_constraint(vocab, None, None) is None
    with pytest.raises(OptionError, match="one of them"):
        compile_constraint(vocab, "root ::= x", {})


def test_a_grammar_forces_its_texts(vocab):
    assert {write(vocab, 'root ::= "yes" | "no"', seed=seed) for seed in range(8)} <= {"yes", "no"}
    assert write(vocab, 'root ::= "exactly this 日本 🙂\\n"') == "exactly this 日本 🙂\n"
    assert write(vocab, 'root ::= ""') == ""


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(temperature=0, repeat_penalty=1.5), SamplingParams(seed=3, typical_p=0.5)]
)
def test_with_every_kind_of_sampling(vocab, params):
    text = write(vocab, "root ::= [a-c] [0-9]{2,3}", params=params)
    assert text[0] in "abc"
    assert text[1:].isdigit()


def test_what_a_grammar_takes(vocab):
    assert takes(vocab, 'root ::= [a-z]+ (" " [a-z]+)*', "some words here")
    assert not takes(vocab, 'root ::= [a-z]+ (" " [a-z]+)*', "Some words")
    assert not takes(vocab, 'root ::= "abc" "d"', "abc")
    assert takes(vocab, 'root ::= [^\\n]+ "\\n"', "é 日本 🙂\n")
    assert takes(vocab, "root ::= .{3}", "🙂日é")
    assert not takes(vocab, "root ::= .{3}", "🙂日éx")


def test_control_tokens_in_grammars(vocab):
    constraint = compile_constraint(vocab, "root ::= <|im_start|> <[5]>", None)
    start = vocab.tokenize("<|im_start|>", special=True)[0]
    assert constraint.allows(start)
    constraint.accept(start)
    assert constraint.allows(5)
    with pytest.raises(ConstraintError, match="not one token"):
        compile_constraint(vocab, "root ::= <two words>", None)
    constraint = compile_constraint(vocab, 'root ::= <|im_start|> "word" <repo_name> (!<repo_name>){2}', None)
    for token in (start, *vocab.tokenize("word<repo_name>", special=True), 500, start):
        assert constraint.allows(token)
        constraint.accept(token)
    assert constraint.allows(vocab.eos)


@pytest.mark.parametrize(
    "grammar", ['root ::= "a" !<|im_end|>', "root ::= [^x] <|im_end|>", 'root ::= "a" <[5]>', 'root ::= (<|im_end|> "<")+']
)
def test_tokens_after_characters_are_refused_where_libllama_aborts(vocab, grammar):
    with pytest.raises(ConstraintError, match="right after characters"):
        compile_constraint(vocab, grammar, None)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", 'b"c']}, "minItems": 1, "maxItems": 3},
        "score": {"type": "number", "minimum": -1, "maximum": 1},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "tags"],
}


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_forces_valid_json(vocab, seed):
    value = json.loads(write(vocab, schema=SCHEMA, seed=seed))
    assert set(value) <= set(SCHEMA["properties"])
    assert len(value["name"]) <= 12
    assert 0 <= value["age"] <= 150
    assert 1 <= len(value["tags"]) <= 3
    assert set(value["tags"]) <= {"a", 'b"c'}
    assert -1 <= value.get("score", 0) <= 1


def test_any_json(vocab):
    for seed in range(3):
        json.loads(write(vocab, schema={"type": "object"}, seed=seed, limit=2000))


def test_one_constraint_serves_many_samplers(vocab):
    constraint = compile_constraint(vocab, 'root ::= "ab" "cd"', None)
    first, second = (Sampler(vocab, SamplingParams(temperature=0), constraint) for _ in range(2))
    row = np.zeros(vocab.n_tokens, np.float32)
    token = first.sample(row)
    first.accept(token)
    assert second.sample(row) == token  # still at the start
    copy = first.clone()
    assert copy.sample(row) == first.sample(row)
    first.reset()
    assert first.sample(row) == token


def test_prompt_tokens_do_not_move_the_grammar(vocab):
    sampler = Sampler(vocab, SamplingParams(temperature=0), compile_constraint(vocab, 'root ::= "x"', None))
    sampler.accept(500, prompt=True)
    assert vocab.piece(sampler.sample(np.zeros(vocab.n_tokens, np.float32))) == b"x"


def test_a_token_against_the_grammar_is_refused_not_fatal(vocab):
    """libllama aborts the process here."""
    sampler = Sampler(vocab, SamplingParams(temperature=0), compile_constraint(vocab, 'root ::= "x"', None))
    for token in (vocab.tokenize("y")[0], vocab.eos, vocab.bos):
        with pytest.raises(ConstraintError, match="does not fit"):
            sampler.accept(token)
    sampler.accept(vocab.tokenize("x")[0])
    sampler.accept(vocab.eos)


def test_a_dead_end_is_an_error_not_an_abort(vocab):
    sampler = Sampler(vocab, SamplingParams(), compile_constraint(vocab, 'root ::= "a" [\\U0010FFFF] "\\x00"', None))
    row = np.zeros(vocab.n_tokens, np.float32)
    with pytest.raises(ConstraintError):  # noqa: PT012  # at which token depends on the vocabulary
        for _ in range(10):
            sampler.accept(sampler.sample(row))
    banned = Sampler(vocab, SamplingParams(), compile_constraint(vocab, 'root ::= ""', None), ban_eog=True)
    with pytest.raises(ConstraintError, match="banned"):
        banned.sample(row)


# ---- grammars that are wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("", "empty"),
        (" \n# only a comment\n", "empty"),
        ('x ::= "a"', "no rule named root"),
        ("root ::= other", "'other' is not defined.*line 1, column 10"),
        ('root ::= "a', 'this " is never closed at line 1, column 10'),
        ("root ::= [a", r"this \[ is never closed"),
        ("root ::= (a", r"this \( is never closed"),
        ('root ::= "a")', "expecting the end of the line at line 1, column 13"),
        ('root = "a"', "expecting ::= at line 1, column 6"),
        ('root ::= "a"\nb := "c"', "line 2, column 3"),
        ('root ::= root "a" | "b"', "'root'.*begin with itself"),
        ("root ::= a\na ::= root", "begin with itself"),
        ('root ::= a root "x" | "y"\na ::= b\nb ::= "" | "z"', "begin with itself"),
        ("root ::= root", "begin with itself"),
        ('root ::= "a"{3,2}', "at least 3 repetitions but at most 2"),
        ('root ::= "a"{99999}', "more than 2000"),
        ('root ::= ("a" "b"){900}{900}', "more than 2000"),
        ('root ::= "a"{99999999999999999999}', "more than 2000"),
        ("root ::= *", "nothing to repeat"),
        ('root ::= "\\q"', r"escape \\q"),
        ('root ::= "\\u12"', "incomplete escape"),
        ('root ::= "\\', "never closed|escape"),
        ("root ::= [z-a]", "backwards"),
        ("root ::= []", "class is empty"),
        ('root ::= "a"\nroot ::= "b"', "second time"),
        ('root ::= "a\0b"', "NUL"),
        ('root ::= "\ud800"', "surrogate"),
        ("root ::= <x", "never closed"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
        ('root ::= "' + "a" * 1000 + '"{2000}', "grows"),
        ("root ::= " + '"a" ' * 400_000, "long|grows"),
        ("\n".join(f'r{i} ::= r{i + 1} "a" | r{i + 1} "b"' for i in range(60)) + '\nr60 ::= "x"\nroot ::= r0', "too many ways"),
        ('root ::= "a" root "b" | "a" root "c" | "a"', "ambiguous"),
        ("root ::= (.? | [a-z]?){30}", "ambiguous"),
    ],
    ids=range(34),
)
def test_bad_grammars_are_constraint_errors(vocab, capfd, grammar, message):
    with pytest.raises(ConstraintError, match=message):
        compile_constraint(vocab, grammar, None)
    assert capfd.readouterr() == ("", "")  # libllama prints its complaints; it has seen none of these


def test_bad_schemas_are_constraint_errors(vocab):
    for schema in ([], {"type": "nope"}, {"$ref": "https://example.com/x"}, {"$ref": "#"}, {"type": "string", "pattern": "["}):
        with pytest.raises(ConstraintError):
            compile_constraint(vocab, None, schema)


PARTS = (
    '"a"', '"ab"', "[a-z]", "[^a]", ".", "(", ")", "|", "*", "+", "?", "{2}", "{0,3}", "{1,}", "{3,1}", " ", "\n", "root", "b", "::=",
    "root ::= ", "b ::= ", '"\\x41"', "<[5]>", "!<|im_end|>", "<nope>", "# c\n", '"é"', '"', "[", "]", "-", "^", "\\", "{", "}", ",",
    "\r\n", '""', "1",
)  # fmt: skip


def random_grammar(rng):
    """Half of them soup, half of them nearly right."""
    if rng.random() < 0.5:
        return "root ::= " + "".join(rng.choice(PARTS) for _ in range(rng.randint(1, 10)))

    def expression(depth=0):
        kind = rng.random()
        if kind < 0.7 or depth > 2:
            part = rng.choice(['"a"', '"ab"', "[a-z]", "[^a]", ".", '"x" b', '"y" c', '""', '"é"', "<[5]>", "b", "c"])
        else:
            part = f"({alternatives(depth + 1)})"
        return part + (rng.choice(["*", "+", "?", "{2}", "{0,3}", "{1,}", "{0}", "{30}"]) if rng.random() < 0.3 else "")

    def alternatives(depth=0):
        return " | ".join(" ".join(expression(depth) for _ in range(rng.randint(0, 3))) for _ in range(rng.randint(1, 3)))

    return f"root ::= {alternatives()}\nb ::= {alternatives()}\nc ::= {alternatives()}\n"


def test_random_grammars_in_a_process_of_their_own(smollm2, tmp_path):
    """Whatever passes the check is parsed by libllama, and neither it nor a walk through its texts crashes or hangs."""
    rng = random.Random(20)
    (tmp_path / "grammars.json").write_text(json.dumps([random_grammar(rng) for _ in range(300)]))
    script = """
        import json, sys
        import numpy as np
        from edge_rt.structured.grammar import compile_constraint
        from edge_rt.core.generate.sampler import Sampler
        from edge_rt.errors import ConstraintError
        from edge_rt.native.llama import Vocab
        from edge_rt.types import SamplingParams

        vocab, rng = Vocab.load(sys.argv[1]), np.random.default_rng(0)
        passed = 0
        for grammar in json.load(open(sys.argv[2])):
            try:
                constraint = compile_constraint(vocab, grammar, None)
            except ConstraintError as error:
                assert "libllama refuses" not in str(error), grammar
                continue
            passed += 1
            sampler = Sampler(vocab, SamplingParams(seed=1, top_k=0, temperature=2), constraint)
            for _ in range(8):
                try:
                    token = sampler.sample(rng.normal(0, 3, vocab.n_tokens).astype(np.float32))
                except ConstraintError:
                    break
                sampler.accept(token)
                if vocab.is_eog(token):
                    break
            sampler.close()
        print(passed)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(smollm2), str(tmp_path / "grammars.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout) > 20
