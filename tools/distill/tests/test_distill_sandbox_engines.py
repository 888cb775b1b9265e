"""Whoever can be evaluated: a daemon says what the same model says in process, other servers say what they can; judges, weights, YAML."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
from edge_rt_distill.cli import add_commands
from edge_rt_distill.data.answers import Answer
from edge_rt_distill.evaluate.evaluator import Context, load_evaluator
from edge_rt_distill.model.load import load
from edge_rt_distill.model.rows import TokenSequence
from edge_rt_distill.sandbox.endpoint import Endpoint
from edge_rt_distill.sandbox.engines import Engine, InProcess, open_engine
from edge_rt_distill.sandbox.evaluator import InTraining, Sandbox
from edge_rt_distill.sandbox.judges import ByLikelihood, judged, opened, validate
from edge_rt_distill.sandbox.metrics import METRICS
from edge_rt_distill.sandbox.running import Results, read_results, run, write_results
from edge_rt_distill.sandbox.scores import compare, fails, notes
from edge_rt_distill.sandbox.suites import Suite, read_suite
from edge_rt_distill.sandbox.weights import read_weights
from serving import serving
from typer.testing import CliRunner

from edge_rt.hooks import DataError, EdgeError, OptionError, UserError

ASK = [{"role": "user", "content": "Which?"}]
OPTIONS = ["the red one", "the blue one", "none"]
SUITE = """
- {id: a, metric: grammar, language: en, form: choice, source: here, licence: ours, text: "It ", options: [is so., are so.], right: 0}
- {id: b, metric: grammar, language: en, form: choice, source: here, licence: ours, text: "They ", options: [are., is.], right: 0}
- id: c
  metric: concise
  language: en
  form: answer
  source: here
  licence: ours
  messages: [{role: user, content: Name one.}]
  checks: [{kind: contains, all: [one]}]
  good: [one]
  bad: [two]
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    path = tmp_path_factory.mktemp("suite") / "mine.yaml"
    path.write_text(SUITE)
    return read_suite(path)


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    add_commands(app)
    return app


# ---- a daemon ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daemon(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a daemon that serves the tiny model over HTTP."""
    with serving(tiny, tmp_path_factory.mktemp("daemon"), "--ctx", "2048", first=ASK) as url:
        yield url


def test_a_daemon_says_what_the_model_says_in_process(daemon: str, tiny: Path, suite: Suite) -> None:
    with closing(open_engine(daemon)) as served, closing(InProcess(tiny)) as here:
        assert served.scores
        assert served.facts.template == here.facts.template != ""
        assert served.answer(ASK, 12) == here.answer(ASK, 12)
        for before in (ASK, "Take ", ""):
            assert served.likelihoods(before, OPTIONS) == pytest.approx(here.likelihoods(before, OPTIONS), rel=1e-3)
        ours, theirs = run(served, [suite]), run(here, [suite])
    assert [one.value for one in ours.outcomes] == [one.value for one in theirs.outcomes]
    assert (ours.left_out, notes(theirs, ours)) == (0, [])


def test_a_daemons_mistakes_are_told_in_its_words(daemon: str) -> None:
    with pytest.raises(OptionError, match="has no model nobody; it has tiny"):
        Endpoint(daemon, model="nobody")
    with closing(Endpoint(daemon)) as served, pytest.raises(UserError, match=r"answered 400: .*context"):
        served.answer([{"role": "user", "content": "x" * 10_000}], 10)
    with pytest.raises(UserError, match="is a server with OpenAI's API there"):
        Endpoint("unix:/nowhere/at/all.sock")


# ---- other servers -------------------------------------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """A server that answers in capitals; with ``echo`` letters are its tokens, each as likely as its place in the alphabet."""

    echo, template = False, False
    keys: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.keys.append(self.headers.get("Authorization"))
        self._say({"data": [{"id": "m", "owned_by": "somebody"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/chat/completions":
            self._say({"choices": [{"message": {"content": body["messages"][-1]["content"].upper()}, "finish_reason": "length"}]})
        elif self.path == "/apply-template" and self.template:
            self._say({"prompt": f"<{body['messages'][-1]['content']}>"})
        elif self.path == "/v1/completions" and self.echo:
            text = body["prompt"]
            logprobs = [None, *(-float(ord(letter) % 32) for letter in text[1:])]
            self._say({"choices": [{"text": text, "logprobs": {"token_logprobs": logprobs, "text_offset": list(range(len(text)))}}]})
        else:
            self._say({"error": {"message": "that is not done here"}}, 400)

    def _say(self, answer: Any, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def other(request: pytest.FixtureRequest) -> Iterator[str]:
    echo, template = getattr(request, "param", (False, False))
    kind = type("Kind", (Server,), {"echo": echo, "template": template, "keys": Server.keys})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_of_a_server_without_likelihoods_answers_are_asked(other: str, suite: Suite, tiny: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    with closing(open_engine(other, key_file=key)) as one:
        assert (one.scores, one.facts.template) == (False, "")
        found = run(one, [suite])
        with pytest.raises(DataError, match="nothing to ask"):
            run(one, [suite._replace(items=suite.items[:2])])
    assert Server.keys[-1] == "Bearer secret"
    assert ([outcome.item for outcome in found.outcomes], found.left_out) == (["c"], 2)
    with closing(InProcess(tiny)) as here:
        teacher = run(here, [suite])
    kept = compare(teacher, found, [suite])
    assert (list(kept.metrics), kept.whole.cells) == (["concise"], 1)
    assert any("2 items are left out" in note for note in notes(teacher, found))


@pytest.mark.parametrize("other", [(True, True)], indirect=True)
def test_a_server_with_echo_tells_likelihoods(other: str) -> None:
    with closing(open_engine(other)) as one:
        assert one.scores
        assert one.likelihoods("ab", ["c", "dd"]) == [-3.0, -8.0]
        assert one.likelihoods([{"role": "user", "content": "?"}], ["a"]) == [-1.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"target": "http://127.0.0.1:9", "engine": "llama_cpp"}, "leave --engine"),
        ({"target": "some.gguf", "model": "m"}, "are of servers"),
        ({"target": "http://127.0.0.1:9", "key_file": Path("/nowhere/key")}, "cannot be read"),
    ],
)
def test_what_cannot_be_opened(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_engine(**words)


def test_a_teacher_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import tokenizers
    import torch

    words = ["<s>", "</s>", "<unk>", *"abcdefgh", "user", ":", "?", " "]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokeniser = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokeniser.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}:"
    tokeniser.save_pretrained(tmp_path)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(words)}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, bos_token_id=0, eos_token_id=1))
    model.save_pretrained(tmp_path)
    with closing(open_engine(str(tmp_path))) as one:
        first = one.answer([{"role": "user", "content": "ab?"}], 8)
        assert first == one.answer([{"role": "user", "content": "ab?"}], 8)
        found = one.likelihoods([{"role": "user", "content": "ab"}], ["c", "de"])
        row = torch.tensor([[words.index(letter) for letter in "ab:de"]])
        told = torch.log_softmax(model(row).logits[0].double(), -1)
        assert found[1] == pytest.approx(float(told[2, row[0, 3]] + told[3, row[0, 4]]), abs=1e-4)
        assert len(one.likelihoods("ab", ["c", "d"])) == 2


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="transformers"):
        open_engine(str(tmp_path))


# ---- in training ---------------------------------------------------------------------------------------------------------------------


def test_a_model_in_training_says_what_its_file_says(tiny: Path, suite: Suite) -> None:
    teacher = load(tiny)
    with closing(InProcess(tiny)) as here:
        one = InTraining(teacher.model, teacher.tokeniser)
        assert one.answer(ASK, 12) == here.answer(ASK, 12)
        for before in (ASK, "Take ", ""):
            mine, other = one.likelihoods(before, OPTIONS), here.likelihoods(before, OPTIONS)
            differences = [left - right for left, right in zip(mine, other, strict=True)]
            assert max(differences) - min(differences) < 0.05  # all up to what the options share, and rounding


def test_the_sandbox_scores_what_is_kept_and_asks_the_teacher_once(tiny: Path, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load(tiny)
    known = {"a": 1.0, "b": 0.0, "c": 1.0}
    asked: list[Any] = []

    def values(self: Sandbox, model: Any, tokeniser: Any) -> dict[tuple[str, str], float]:
        asked.append(model)
        return {("mine", item): value if model is teacher.model or item != "c" else 0.25 for item, value in known.items()}

    monkeypatch.setattr(Sandbox, "_values", values)
    context = Context([TokenSequence([1, 2, 3, 4, 5], [False, True, True, True, True])], tokeniser=teacher.tokeniser)
    judge, student = Sandbox(suites=[suite]), load(tiny).model
    assert judge.score(teacher.model, teacher.model, context).value == pytest.approx(1.0)
    score = judge.score(student, teacher.model, context)
    assert score.parts["sandbox"] == pytest.approx(1.25 / 2)
    assert score.value == pytest.approx((1 + 1.25 / 2) / 2)
    assert asked == [teacher.model, teacher.model, student]
    with pytest.raises(OptionError, match="no tokeniser"):
        judge.score(student, teacher.model, Context([]))
    known.update(a=0.0, c=-0.5)
    with pytest.raises(OptionError, match="above chance in no item"):
        Sandbox(suites=[suite]).score(student, teacher.model, context)


def test_the_sandbox_chooses_of_every_metric_and_nothing_that_is_sealed() -> None:
    judge = load_evaluator("sandbox")
    assert isinstance(judge, Sandbox)
    chosen = [item for suite in judge._suites for item in suite.items]
    assert {item.split for item in chosen} == {"steer"}
    assert {item.metric for item in chosen} == set(METRICS)
    assert (sum(bool(item.options) for item in chosen), sum(not item.options for item in chosen)) == (96, 32)


# ---- suites in YAML, weights, judges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {id: a", "is not YAML"),
        ("id: a", "has no list of items"),
        ("- id: a\n- id: b", "line 1: metric is None"),
        (SUITE + "- {id: c, metric: nonsense}", "line 14: language is None"),
        ("", "has no list of items"),
        ("- !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_mistakes_in_yaml_are_told_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_suite(path)


def _results(suite: Suite, values: Sequence[float]) -> Results:
    from edge_rt_distill.sandbox.engines import Facts
    from edge_rt_distill.sandbox.running import Outcome, digest

    outcomes = tuple(Outcome(suite.name, item.id, value, ("one",)) for item, value in zip(suite.items, values, strict=True))
    return Results(Facts("m", "e", "t"), {suite.name: digest(suite)}, outcomes, 1.0)


def test_weights_say_what_counts(tmp_path: Path, suite: Suite) -> None:
    many = suite._replace(items=tuple(item._replace(id=f"{item.id}-{at}") for at in range(5) for item in suite.items))
    teacher, student = _results(many, [1, 1, 1] * 5), _results(many, [1, 1, 0] * 5)
    path = tmp_path / "weights.toml"
    path.write_text("[metrics]\nconcise = 3\n[floors]\nconcise = 0.5\n")
    given = read_weights(path, ["mine"])
    plain, weighted = compare(teacher, student, [many]), compare(teacher, student, [many], given.of)
    assert plain.whole.retention is not None
    assert plain.whole.retention.value == pytest.approx(0.5)
    assert weighted.whole.retention is not None
    assert weighted.whole.retention.value == pytest.approx(0.25)
    assert any("concise, whose floor is 50%" in reason for reason in fails(weighted, 0.1, given.floors))
    assert not any("concise" in reason for reason in fails(plain, 0.1))
    wrong = {"[metrics]\ntaste = 1": "no taste", "[domains]\nspace = 1": "no space", "[floors]\nsafety = 2": "give 0", "[x]": "x"}
    for text, message in wrong.items():
        path.write_text(text)
        with pytest.raises(EdgeError, match=message):
            read_weights(path, ["mine"])


class Likes:
    """An engine for which a grade is the likelier the more often the answer says one."""

    scores = True

    def __init__(self) -> None:
        from edge_rt_distill.sandbox.engines import Facts

        self.facts = Facts("likes", "test", "")

    def likelihoods(self, before: Any, options: Sequence[str]) -> list[float]:
        answer = before[0]["content"].split("The answer to grade:\n")[1]
        return [0.0 if (option == "5") == ("one" in answer.split("\n\n")[0]) else -5.0 for option in options]

    def answer(self, messages: Any, tokens: int) -> Answer:
        raise AssertionError("a judge is asked for grades")

    def close(self) -> None:
        """Nothing is held."""


def test_a_judge_grades_answers_and_leaves_choices(suite: Suite, tmp_path: Path) -> None:
    judge = ByLikelihood(Likes())
    before = _results(suite, [1.0, 0.0, 0.0])
    after = judged(before, [suite], judge)
    assert [one.value for one in after.outcomes][:2] == [1.0, 0.0]
    assert after.outcomes[2].value > 0.9
    assert after.judge == "likes in test"
    assert validate([suite], judge) == (1, 1)
    write_results(tmp_path / "r.json", after)
    assert read_results(tmp_path / "r.json") == after
    with pytest.raises(DataError, match="same judge"):
        compare(before, after, [suite])
    assert any("graded by likes" in note for note in notes(after, after))


def test_a_judge_of_ones_own_and_a_model_as_one(tiny: Path, app: typer.Typer, suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SUITE)
    write_results(tmp_path / "r.json", _results(suite, [1.0, 0.0, 0.0]))
    words = ["eval", "judge", str(tmp_path / "r.json"), "--by", str(tiny), "--suite", str(tmp_path / "mine.yaml")]
    words += ["-o", str(tmp_path / "j.json")]
    told = CliRunner().invoke(app, [*words, "--validate"], catch_exceptions=False)
    assert "of 1 items' good answers" in told.output
    CliRunner().invoke(app, words, catch_exceptions=False)
    assert 0 < read_results(tmp_path / "j.json").outcomes[2].value < 1
    with pytest.raises(OptionError, match=r"has no nobody"), opened("edge_rt_distill.sandbox.judges:nobody"):
        pass


def test_engines_keep_to_the_protocol(tiny: Path) -> None:
    with closing(InProcess(tiny)) as one:
        engine: Engine = one
        assert engine.scores
