"""Suites are sound, metrics tell crafted answers apart, and scores say what was kept: of engines that know all, nothing or some."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer
from edge_rt_distill.cli import add_commands
from edge_rt_distill.data.answers import Answer
from edge_rt_distill.data.samples import Sample, make_sample
from edge_rt_distill.data.splits import leaks
from edge_rt_distill.run.prepare import BUILT_IN
from edge_rt_distill.sandbox.engines import Facts, InProcess
from edge_rt_distill.sandbox.items import Item, parse
from edge_rt_distill.sandbox.judging import chance, comparable, judge_choice, judge_turns, judge_variants
from edge_rt_distill.sandbox.metrics import DOMAINS, METRICS
from edge_rt_distill.sandbox.report import render
from edge_rt_distill.sandbox.running import Outcome, Results, digest, read_results, run, write_results
from edge_rt_distill.sandbox.scores import compare, difference, fails, scaled, scores
from edge_rt_distill.sandbox.suites import Suite, built_in, examples, faults, read_suite
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edge_rt.hooks import DataError

KNOWN = {"id": "a-1", "language": "en", "source": "here", "licence": "Apache-2.0"}
CHOICE = {**KNOWN, "metric": "grammar", "form": "choice", "text": "It ", "options": ["is so.", "are so."], "right": 0}
ASK = [{"role": "user", "content": "Name one."}]
ANSWER = {
    **KNOWN, "metric": "concise", "form": "answer", "messages": ASK, "checks": [{"kind": "contains", "all": ["one"]}],
    "good": ["one"], "bad": [{"text": "two", "ended": False}],
}  # fmt: skip
TURNS = {
    **KNOWN, "metric": "coherence", "form": "turns",
    "turns": [{"content": "Yes or no?"}, {"content": "Sure?", "checks": [{"kind": "agrees", "turn": 0, "options": ["yes", "no"]}]}],
    "good": [["Yes.", "Yes."]], "bad": [["Yes.", "No."]],
}  # fmt: skip
VARIANTS = {**KNOWN, "metric": "paraphrase", "form": "variants", "asks": ["a?", "b?", "c?"], "options": ["x", "y", "z"], "right": 1}


@pytest.fixture(scope="module")
def suites() -> list[Suite]:
    return built_in()


class Oracle:
    """Answers as the item's author would: all, or with ``share`` only some of the items, the others as badly as can be."""

    def __init__(self, suites: Sequence[Suite], share: float = 1.0) -> None:
        self.facts, self.scores = Facts("oracle", "test", ""), True
        dice = random.Random(1)
        self.items = [(item, dice.random() < share) for suite in suites for item in suite.items]

    def answer(self, messages: Sequence[Any], tokens: int) -> Answer:
        asked = messages[-1]["content"]
        for item, knows in self.items:
            told = item.good if knows else item.bad
            if item.turns:
                turn = [place for place, one in enumerate(item.turns) if one.content == asked]
                if turn and sum(one["role"] == "user" for one in messages) == turn[0] + 1:
                    return told[0][turn[0]]
            elif told and list(item.messages) == list(messages):
                return told[0][0]
        raise AssertionError(asked)

    def likelihoods(self, before: Any, options: Sequence[str]) -> list[float]:
        item, knows = next((item, knows) for item, knows in self.items if list(item.options) == list(options))
        right = item.options[item.right]
        return [(-1.0 if (option == right) == knows else -2.0) * len(option.encode()) for option in options]


# ---- items and suites ----------------------------------------------------------------------------------------------------------------


def test_an_item_of_each_form() -> None:
    assert parse(CHOICE).options == ("is so.", "are so.")
    assert parse(ANSWER).bad == ((Answer("two", False),),)
    assert parse(TURNS).turns[1].checks[0]["turn"] == 0
    assert parse({**VARIANTS, "split": "sealed"}).split == "sealed"
    passage = {
        **ANSWER, "metric": "faithfulness", "passage": "It rained.", "messages": [{"role": "user", "content": "Sum up: {passage}"}],
        "checks": [{"kind": "supported"}],
    }  # fmt: skip
    item = parse(passage)
    assert item.messages[0]["content"] == "Sum up: It rained."
    assert item.checks == ({"kind": "supported", "passage": "It rained."},)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "a JSON object"),
        ({**CHOICE, "id": "A 1"}, "small letters"),
        ({**CHOICE, "metric": "taste"}, "metric is 'taste'; choose one of grammar"),
        ({**CHOICE, "form": "answer"}, "items of grammar are choice"),
        ({**CHOICE, "split": "train"}, "choose steer or sealed"),
        ({**CHOICE, "checks": []}, "has no 'checks'"),
        ({**CHOICE, "messages": ASK}, "one of them"),
        ({**CHOICE, "options": ["a", "a"]}, "all different"),
        ({**CHOICE, "right": 2}, "right is the number"),
        ({**CHOICE, "right": True}, "right is the number"),
        ({**CHOICE, "source": " "}, "source is ' '; give a text"),
        ({**ANSWER, "checks": []}, "give some"),
        ({**ANSWER, "checks": [{"kind": "none"}]}, "is not known"),
        ({**ANSWER, "good": []}, "good is a list of answers"),
        ({**ANSWER, "good": [5]}, "give a text, or an object"),
        ({**ANSWER, "tokens": 0}, "give 1 to 4096"),
        ({**ANSWER, "messages": [{"role": "assistant", "content": "Hi"}]}, "a user first and last"),
        ({**ANSWER, "passage": "Long."}, r"no message has \{passage\}"),
        ({**TURNS, "turns": TURNS["turns"][:1]}, "two or more"),
        ({**TURNS, "good": [["Yes."]]}, "a list of 2 answers"),
        ({**TURNS, "turns": [{"content": "a"}, {"content": "b"}]}, "no turn has checks"),
        ({**TURNS, "turns": [TURNS["turns"][1], TURNS["turns"][1]]}, "an earlier turn"),
        ({**VARIANTS, "asks": ["a", "b"]}, "three or more wordings"),
    ],
)  # fmt: skip
def test_what_is_no_item_is_refused_with_the_fault(record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(record)


def test_a_suite_is_read_with_the_line_of_its_first_mistake(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{json.dumps(CHOICE)}\n\n{json.dumps({**CHOICE, 'id': 'a-2', 'right': 7})}\n")
    with pytest.raises(DataError, match="line 3: right is the number"):
        read_suite(file)
    file.write_text(f"{json.dumps(CHOICE)}\n{{")
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_suite(file)
    file.write_text(f"{json.dumps(CHOICE)}\n{json.dumps(CHOICE)}")
    with pytest.raises(DataError, match="two items a-1"):
        read_suite(file)
    file.write_text("")
    with pytest.raises(DataError, match="no items"):
        read_suite(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_suite(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no suite is named shipping"):
        built_in(["shipping"])


def test_the_suites_that_ship_are_sound_and_cover_every_metric_in_two_languages(suites: list[Suite]) -> None:
    assert [suite.name for suite in suites] == list(DOMAINS)
    for suite in suites:
        assert faults(suite) == []
        count = Counter((item.metric, item.language) for item in suite.items)
        assert all(count[metric, language] >= 4 for metric in METRICS for language in ("en", "zh"))
        sealed = Counter(item.metric for item in suite.items if item.split == "sealed")
        assert all(sealed[metric] >= 2 for metric in METRICS)
    ids = [item.id for suite in suites for item in suite.items]
    assert len(set(ids)) == len(ids)


def test_the_suites_give_nothing_away_by_form(suites: list[Suite]) -> None:
    """Neither the place of the right option nor its length does."""
    choices = [item for suite in suites for item in suite.items if item.form == "choice" and item.messages]
    first = sum(item.right == 0 for item in choices) / len(choices)
    longest = sum(max(item.options, key=len) == item.options[item.right] for item in choices) / len(choices)
    assert abs(first - sum(1 / len(item.options) for item in choices) / len(choices)) < 0.06
    assert longest < 0.4


def test_every_metric_tells_crafted_answers_apart(suites: list[Suite]) -> None:
    found = [one for suite in suites for one in examples(suite.items)]
    assert {one.item.metric for one in found} >= {name for name, metric in METRICS.items() if set(metric.forms) & {"answer", "turns"}}
    assert all(one.good > one.bad + 0.25 for one in found)


def test_nothing_of_the_suites_is_in_what_students_learn_from_and_suites_share_instructions_at_most(suites: list[Suite]) -> None:
    def asked(item: Item) -> Sample:
        said = [*(one["content"] for one in item.messages), item.text, *item.options, *item.asks, *(turn.content for turn in item.turns)]
        return make_sample(text=" ".join(said))

    items = [(suite.name, item.split, asked(item)) for suite in suites for item in suite.items]
    for name in ("demo", "technical", "docstrings"):
        assert leaks(BUILT_IN[name](), [sample for _, _, sample in items]) == [], name
    for own in suites:
        others, mine = ([one for name, _, one in items if (name == own.name) == here] for here in (False, True))
        assert [leak for leak in leaks(others, mine) if leak.share > 0.2] == [], own.name
    steering = leaks(*([one for _, split, one in items if split == wanted] for wanted in ("steer", "sealed")))
    assert len([leak for leak in steering if leak.share > 0.2]) <= 3, "two of a domain may begin with the same system message"


# ---- judging and scores --------------------------------------------------------------------------------------------------------------


def test_choices_are_compared_by_sums_behind_a_text_and_by_bytes_behind_messages() -> None:
    text = parse(CHOICE)
    asked = text._replace(messages=tuple(ASK), text="")
    assert (comparable(text, "ab", -4.0), comparable(asked, "ab", -4.0)) == (-4.0, -2.0)
    assert (judge_choice(text, [-1.0, -2.0]), judge_choice(text, [-2.0, -1.0])) == (1.0, 0.0)
    assert judge_variants([1, 1, 0]) == pytest.approx(2 / 3)


def test_agreement_is_with_an_earlier_answer() -> None:
    item = parse(TURNS)
    said = [("No.", "no, really", 1.0), ("Yes", "No", 0.0), ("Perhaps", "Perhaps", 0.0)]
    assert [judge_turns(item, [Answer(a, True), Answer(b, True)]) for a, b, _ in said] == [value for _, _, value in said]


def test_chance_is_worth_nothing_and_a_perfect_answer_one() -> None:
    assert chance(parse(VARIANTS)) == pytest.approx((3 * 1 + 18 * 2 / 3 + 6 / 3) / 27)
    for record in (CHOICE, ANSWER, TURNS, VARIANTS):
        item = parse(record)
        assert scaled(item, chance(item)) == pytest.approx(0)
        assert scaled(item, 1.0) == 1.0


def test_an_engine_that_knows_all_has_all_and_one_that_knows_half_keeps_half(suites: list[Suite]) -> None:
    some = suites[:2]
    teacher, again, half = (run(Oracle(some, share), some, "all") for share in (1.0, 1.0, 0.5))
    assert teacher.outcomes == again.outcomes
    assert scores(teacher, some)["all"].value > 0.99
    same = compare(teacher, again, some)
    assert same.whole.retention == (1.0, 1.0, 1.0)
    assert fails(same, 0.95) == []
    kept = compare(teacher, half, some)
    assert kept.whole.retention is not None
    assert kept.whole.retention.low < kept.whole.retention.value < kept.whole.retention.high < 0.9
    assert fails(kept, 0.95)[0].startswith("kept ")
    assert any("of safety" in reason for reason in fails(kept, 0.95))
    assert difference(teacher, again, some) == (0.0, 0.0, 0.0)
    lacks = difference(half, teacher, some)
    assert lacks.value == pytest.approx(scores(teacher, some)["all"].value - scores(half, some)["all"].value)
    assert 0 < lacks.low < lacks.value < lacks.high
    with pytest.raises(DataError, match="different items"):
        difference(half, run(Oracle(some), some, "steer"), some)
    lost = compare(half, teacher, some, weights={"grammar": 0.0})
    assert "grammar" not in lost.metrics
    with pytest.raises(DataError, match="has a weight"):
        compare(half, teacher, some, weights=dict.fromkeys(METRICS, 0.0))
    assert lost.whole.counted < kept.whole.cells, "cells in which the half-knowing one is not above chance do not count"


def test_a_teacher_at_chance_says_nothing() -> None:
    suite = Suite("finance", tuple(parse({**CHOICE, "id": f"a-{number}"}) for number in range(8)))
    values = [1.0, 0.0] * 4
    outcomes = tuple(Outcome("finance", f"a-{i}", value, ()) for i, value in enumerate(values))
    results = Results(Facts("m", "e", "t"), {"finance": digest(suite)}, outcomes, 1)
    found = compare(results, results, [suite])
    assert (found.whole.retention, found.whole.counted, found.whole.cells) == (None, 0, 1)
    assert "above chance in no cell" in fails(found, 0.9)[0]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4, max_size=30), st.integers(0, 5))
def test_intervals_hold_their_value_and_are_the_same_again(answers: list[tuple[bool, bool]], seed: int) -> None:
    suite = Suite("legal", tuple(parse({**CHOICE, "id": f"a-{number}"}) for number in range(len(answers))))
    both = [
        Results(Facts("m", "e", "t"), {}, tuple(Outcome("legal", f"a-{i}", float(one[which]), ()) for i, one in enumerate(answers)), 1)
        for which in (0, 1)
    ]
    found = compare(*both, [suite], seed=seed)
    assert found == compare(*both, [suite], seed=seed)
    for one in (found.whole.teacher, found.whole.student):
        assert one.low - 1e-9 <= one.value <= one.high + 1e-9


def test_a_report_shows_what_was_said_as_text(suites: list[Suite]) -> None:
    some = suites[:1]
    teacher, student = run(Oracle(some), some), run(Oracle(some, 0.5), some)
    student = student._replace(outcomes=tuple(one._replace(said=("<b>&",)) if one.value < 1 else one for one in student.outcomes))
    page = render(teacher, student, some)
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert all(f"{some[0].name}, {metric}:" in page for metric in METRICS)


def test_results_are_read_back_and_must_fit(tmp_path: Path) -> None:
    suite = Suite("telecom", (parse(CHOICE),))
    results = run(Oracle([suite]), [suite])
    write_results(tmp_path / "r.json", results)
    again = read_results(tmp_path / "r.json")
    assert again._replace(seconds=0) == results._replace(seconds=0)
    with pytest.raises(DataError, match="different items"):
        compare(results, results._replace(outcomes=()), [suite])
    with pytest.raises(DataError, match="in no suite of telecom"):
        scores(results._replace(outcomes=(Outcome("telecom", "b", 1.0, ()),)), [suite])
    with pytest.raises(DataError, match="telecom has changed since oracle was asked"):
        scores(results, [suite._replace(items=(suite.items[0]._replace(right=1),))])
    (tmp_path / "old.json").write_text(json.dumps({"version": 0}))
    for name, message in (("old.json", "of version 0"), ("none.json", "no file of results")):
        with pytest.raises(DataError, match=message):
            read_results(tmp_path / name)


# ---- the commands, on a model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    add_commands(app)
    return app


def call(app: typer.Typer, *words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["eval", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


@pytest.mark.parametrize("engine", [None, "llama_cpp"])
def test_a_model_is_asked_twice_and_says_the_same(app: typer.Typer, tiny: Path, tmp_path: Path, engine: str | None) -> None:
    items: list[Item] = []
    records = [CHOICE, {**CHOICE, "text": "", "id": "a-2"}, {**ANSWER, "id": "a-3", "tokens": 8}, {**TURNS, "id": "a-4", "tokens": 8}]
    records += [{**VARIANTS, "id": "a-5"}, {**VARIANTS, "id": "a-6", "split": "sealed"}]
    items += [parse(one) for one in records]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("\n".join(map(json.dumps, records)))
    named = ["--engine", engine] if engine else []
    for name in ("one.json", "two.json"):
        said = call(app, "run", tiny, "-s", mine, "-o", tmp_path / name, *named)
        assert said.startswith("5 items in "), "what is sealed is not asked unless it is asked for"
    one, two = (read_results(tmp_path / name) for name in ("one.json", "two.json"))
    assert one._replace(seconds=0) == two._replace(seconds=0)
    assert [outcome.item for outcome in one.outcomes] == [item.id for item in items[:5]]
    table = call(app, "compare", tmp_path / "one.json", tmp_path / "two.json", "-s", mine)
    assert [line.split()[0] for line in table.splitlines()] == ["teacher", "all", "grammar", "coherence", "paraphrase", "concise", "mine"]
    call(app, "report", tmp_path / "one.json", tmp_path / "two.json", "-s", mine, "-o", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 3
    assert page.count("<details>") == 4
    assert "<script" not in page
    failed = call(app, "compare", tmp_path / "one.json", tmp_path / "two.json", "-s", mine, "--min-retention", 0.95, code=1)
    assert "FAIL: the teacher is above chance in no cell" in failed


def test_an_answer_ends_by_itself_or_is_cut(smollm2: Path) -> None:
    with closing(InProcess(smollm2, context=512)) as engine:
        asked = [{"role": "user", "content": "Say hello."}]
        whole, cut = engine.answer(asked, 64), engine.answer(asked, 3)
        assert (whole.ended, cut.ended) == (True, False)
        assert whole.text.startswith(cut.text)
        assert "Hello" in whole.text
        right, wrong = engine.likelihoods(asked, ["Hello! How are you?", "No table was ever green."])
        assert right > wrong
        right, wrong = engine.likelihoods("The dogs", [" are asleep.", " is asleep."])
        assert right > wrong
        one, same = engine.likelihoods("", ["She sleeps.", "She sleep."])
        assert one != same


def test_suites_of_ones_own_are_checked(app: typer.Typer, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps(ANSWER))
    assert call(app, "check", mine) == f"{mine}: 1 items, 0 faults\n"
    mine.write_text(json.dumps({**ANSWER, "bad": ["one and only"]}) + "\n" + json.dumps({**ANSWER, "id": "a-2", "good": ["none"]}))
    said = call(app, "check", mine, code=1)
    assert "a-1: a bad answer is worth 1.00" in said
    assert "a-2: a good answer is worth 0.00" in said
    assert "a question is asked 2 times" in said
    assert "sixteen" not in call(app, "metrics")
    result = CliRunner().invoke(app, ["eval", "run", "none.gguf", "--split", "best"])
    assert "choose steer, sealed, all" in str(result.exception)
