"""What traffic tells of answers that were not good: which signals count, what is mined of them, the run that follows, and what changed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from edge_rt_distill.cli import add_commands
from edge_rt_distill.data.samples import Message, Sample, demo, make_sample, read_samples
from edge_rt_distill.feedback import drift
from edge_rt_distill.feedback.mining import Found, mine, write_hard
from edge_rt_distill.feedback.proposing import BOOST, MOST, divergence, drifted, propose, read_base, written
from edge_rt_distill.feedback.signals import Case, cases, similarity
from edge_rt_distill.replay import results as replays
from edge_rt_distill.replay.trace import PATHS, Feedback, Request, Seen, Trace, read_trace, write_trace
from edge_rt_distill.run.config import Config, DataConfig, read
from edge_rt_distill.sandbox import running as evaluations
from edge_rt_distill.sandbox.engines import Facts
from edge_rt_distill.sandbox.running import Outcome
from edge_rt_distill.sandbox.suites import built_in
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import serving
from typer.testing import CliRunner, Result

from edge_rt.hooks import DataError, OptionError, UserError

BEGUN = "2026-03-01T09:00:00.000Z"
OK = Seen("ok", finish_reason="stop", prompt_tokens=9, completion_tokens=20, first_token=0.2, total=3.0)
ASK = "How long does it take until a refund is paid out?"
AGAIN = "So how long does it take until a refund is paid out??"
ASK_ZH, AGAIN_ZH = "退款一般需要多长时间才能到账", "请问退款一般需要多长时间才能到账？"
OTHER = "Which river flows through the middle of Vienna?"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def asked(at: float, text: str, seen: Seen | None = OK, **more: Any) -> Request:
    return Request(at, PATHS[0], {"messages": [user(text)]}, **{"client": "c1", "seen": seen, "variant": "aaaa", **more})


def kinds(*requests: Request, feedback: Sequence[Feedback] = ()) -> list[str]:
    return [one.kind for one in cases(Trace(requests, {}, tuple(feedback)))]


# ---- signals -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(ASK, AGAIN), (ASK_ZH, AGAIN_ZH), (AGAIN_ZH, ASK_ZH), (ASK, ASK.upper())])
def test_who_asks_much_the_same_again_was_not_answered(first: str, second: str):
    (found,) = cases(Trace((asked(0, first, answer="Soon."), asked(60, second, answer="In 14 days.")), {}))
    assert (found.kind, found.messages, found.answer, found.at, found.variant) == ("asked again", (user(first),), "Soon.", 0, "aaaa")
    assert kinds(asked(0, first, session="s1", client=None), asked(9000, second, session="s1", client=None)) == ["asked again"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (asked(0, ASK), asked(60, OTHER)),
        (asked(0, ASK), asked(60, ASK, client="c2")),
        (asked(0, ASK), asked(124, ASK)),
        (asked(0, ASK), asked(2, ASK)),
        (asked(0, ASK, Seen("error", "limit")), asked(2, ASK)),
        (asked(0, ASK, session="s1"), asked(60, ASK, session="s2")),
        (asked(0, "go on"), asked(60, "go on")),
        (asked(0, "继续"), asked(60, "继续")),
        (asked(0, ASK_ZH), asked(60, "退货地址在哪里可以查到")),
        (asked(0, ASK, client=None), asked(60, ASK, client=None)),
    ],
    ids=["another question", "another client", "too late", "before the answer ended", "it was refused", "another session", "go on", "继续",
         "another in Chinese", "nobody knows who"],
)  # fmt: skip
def test_what_is_not_asking_again(first: Request, second: Request):
    assert kinds(first, second) == []


def test_between_two_clients_questions_each_is_followed_alone():
    assert kinds(asked(0, ASK), asked(10, OTHER, client="c2"), asked(60, AGAIN)) == ["asked again"]


def test_what_people_say_of_an_answer():
    said = [
        Feedback(0, "x", (user(ASK),), rating=-1, correction="14 days.", variant="bbbb"), Feedback(1, "x", (user(ASK),), rating=-1),
        Feedback(2, "x", (user(ASK),), rating=1), Feedback(3, "x", (user(ASK),), rating=0), Feedback(4, "x", (user(ASK),), comment="hm"),
        Feedback(5, "x", (user(ASK),), rating=1, correction="15 days."), Feedback(6, " a", prompt="Once", correction=" upon a time"),
    ]  # fmt: skip
    found = cases(Trace((), {}, tuple(said)))
    assert [(one.kind, one.correction, one.at) for one in found] == [
        ("corrected", "14 days.", 0), ("rated down", "", 1), ("corrected", "15 days.", 5), ("corrected", " upon a time", 6),
    ]  # fmt: skip
    assert (found[0].variant, found[0].answer, found[3].prompt, found[3].messages) == ("bbbb", "x", "Once", ())
    assert found[0].weight > found[1].weight


@pytest.mark.parametrize(
    ("seen", "left", "expected"),
    [
        (Seen("cancelled", first_token=0.5), 2.0, ["cancelled"]),
        (Seen("cancelled", first_token=None), 2.0, []),
        (Seen("cancelled", first_token=0.5), None, []),
        (Seen("error", "worker_died"), None, ["failed"]),
        (Seen("error", "limit"), None, []),
        (Seen("error", "context_overflow"), None, []),
        (OK._replace(rules={"redaction": 2}), None, ["rule hit"]),
        (OK, None, []),
        (None, None, []),
    ],
)
def test_what_became_of_a_request_itself(seen: Seen | None, left: float | None, expected: list[str]):
    assert kinds(asked(0, ASK, seen, cancel_after=left)) == expected


def test_a_case_of_a_session_has_the_conversation_or_says_that_it_is_not_known():
    hit = OK._replace(rules={"redaction": 1})

    def talk(answer: str | None) -> Case:
        (found,) = cases(Trace((asked(0, ASK, session="s1", answer=answer), asked(9, OTHER, hit, session="s1")), {}))
        return found

    assert talk("Soon.").messages == (user(ASK), {"role": "assistant", "content": "Soon."}, user(OTHER))
    assert talk(None).messages == ()


@given(st.text(max_size=30), st.text(max_size=30))
@settings(deadline=None)
def test_similarity_is_the_same_both_ways_and_1_of_a_text_with_itself(first: str, second: str):
    assert similarity(first, second) == similarity(second, first)
    assert 0 <= similarity(first, second) <= 1 == similarity(first, first)


# ---- mining ------------------------------------------------------------------------------------------------------------------------------


def found(text: str, kind: str = "rated down", weight: float = 2.0, correction: str = "", at: float = 0.0, **more: Any) -> Found:
    return Found(Case(kind, (user(text),), "no", correction, at, more.pop("variant", "aaaa"), weight, **more), "t.jsonl", BEGUN)


def test_near_duplicates_become_one_hard_case_and_the_heaviest_come_first(tmp_path: Path):
    long = "Please tell me how many days it takes at most until the refund for my returned parcel is paid out to my account?"
    some = [
        found(OTHER, "asked again", 1.0), found(long, at=60.0), found(long.replace("Please", "Kindly"), at=3600.0, variant="bbbb"),
        found(long, "corrected", 4.0, "14 days.", at=10.0), found(long, "corrected", 4.0, "14 working days.", at=20.0),
    ]  # fmt: skip
    mined = mine(some, [], [])
    assert mined.left_out == {}
    assert [(len(one.cases), one.weight) for one in mined.hard] == [(4, 12.0), (1, 1.0)]
    write_hard(tmp_path / "hard.jsonl", mined)
    first, second = read_samples(tmp_path / "hard.jsonl", policy="stop").samples
    assert (first.answer, first.source, second.answer, second.prompt[0].content) == ("14 working days.", "feedback", "", OTHER)
    told = json.loads((tmp_path / "hard.jsonl").read_text().splitlines()[0])["feedback"]
    assert told == {
        "id": first.id, "signals": {"corrected": 2, "rated down": 2}, "times": 4, "weight": 12.0, "first": "2026-03-01T09:00:10Z",
        "last": "2026-03-01T10:00:00Z", "variants": ["aaaa", "bbbb"], "traces": ["t.jsonl"], "other_corrections": 1,
    }  # fmt: skip


@given(st.permutations(range(6)))
@settings(max_examples=20, deadline=None)
def test_the_order_in_which_cases_come_changes_nothing(order: list[int]):
    some = [found(ASK, at=1), found(ASK, "corrected", 4.0, "14 days.", at=2), found(OTHER, at=3), found(ASK_ZH, at=4), found(ASK_ZH, at=5)]
    some.append(found(OTHER, "cancelled", 0.5, at=6))
    assert mine([some[at] for at in order], [], []).hard == mine(some, [], []).hard


def test_nothing_that_scores_are_measured_on_is_mined():
    suites = built_in(["retail"])
    answers = [item for item in suites[0].items if item.form == "answer" and item.split == "sealed" and len(item.messages) == 1]
    sealed = [found(item.messages[0]["content"]) for item in answers]
    quoting = found(f"My friend asks this, please help me out with it today: {answers[0].messages[0]['content']} Thank you so much!")
    held_out = make_sample(text="The lamp in the hall of the old house burns blue whenever the tide is about to turn.")
    kept = found(OTHER)
    same = found("Why is it that the lamp in the hall of the old house burns blue whenever the tide is about to turn?")
    mined = mine([*sealed, quoting, same, kept], [held_out], suites)
    assert [one.sample.prompt[-1].content for one in mined.hard] == [OTHER]
    assert mined.left_out == {"they are near to what a score is measured on": len(sealed) + 2}


def test_what_cannot_be_learnt_from_is_counted_by_its_reason(tmp_path: Path):
    talk = (user("a"), user("b"))
    some = [
        Found(Case("rated down", (), "", "", 0, "", 2.0), "t", ""), Found(Case("rated down", (), "", "", 0, "", 2.0, "Once"), "t", ""),
        Found(Case("rated down", talk, "", "", 0, "", 2.0), "t", ""),
        Found(Case("rated down", (*talk[:1], {"role": "tool", "content": "x"}), "", "", 0, "", 2.0), "t", ""),
        Found(Case("rated down", (user(" "),), "", "", 0, "", 2.0), "t", ""),
    ]  # fmt: skip
    mined = mine(some, [], [])
    assert (mined.hard, sum(mined.left_out.values()), len(mined.left_out)) == ([], 5, 5)
    with pytest.raises(DataError, match="no hard case is left"):
        write_hard(tmp_path / "hard.jsonl", mined)


def test_a_corrected_text_is_a_passage():
    mined = mine([Found(Case("corrected", (), " a", " upon a time", 7, "", 4.0, "Once"), "t", "")], [], [])
    assert (mined.hard[0].sample.text, mined.hard[0].cases[0].when) == ("Once upon a time", "7 s")


# ---- the next run ------------------------------------------------------------------------------------------------------------------------


def base(tmp_path: Path, text: str = "") -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text or '[run]\nfolder = "work"\n[data]\nsamples = ["demo"]\nrollouts = 10\n')
    return path


def hard_samples(corrected: int, questions: int) -> list[Sample]:
    answer = [Message("assistant", "14 days.")]
    return [
        make_sample([Message("user", f"question {number}"), *(answer if number < corrected else [])])
        for number in range(corrected + questions)
    ]


def test_the_next_runs_file_is_read_and_says_why(tmp_path: Path):
    config, sets = read_base(base(tmp_path))
    count = len(demo().samples)
    found = propose(config, sets, ("hard.jsonl", hard_samples(20, 300)), "next-traffic.jsonl")
    path = tmp_path / "next.toml"
    path.write_text(written(found))
    again = read(path)
    assert again == found.config
    assert again.data.samples == ("demo", "hard.jsonl", "next-traffic.jsonl")
    share = min(MOST, BOOST * 20 / (BOOST * 20 + count))
    own, hard, traffic, teacher = (one / sum(again.data.weights) for one in again.data.weights)
    assert (hard, traffic) == (pytest.approx(share, abs=0.01), pytest.approx(0.1, abs=0.01))
    assert own > teacher > 0
    assert (again.run.folder, again.behaviour.prompts) == ("", 4 * config.behaviour.prompts)
    lines = path.read_text().splitlines()
    for setting in found.why:
        at = next(number for number, line in enumerate(lines) if line == f"# {found.why[setting]}")
        assert lines[at + 1].startswith(f"{setting.split('.')[-1]} = "), setting


def test_questions_alone_are_put_to_the_teacher_and_change_no_shares(tmp_path: Path):
    config, sets = read_base(base(tmp_path))
    found = propose(config, sets, ("hard.jsonl", hard_samples(0, 5)))
    assert (found.config.data.samples, found.config.data.weights) == (("demo", "hard.jsonl"), ())
    assert found.config.behaviour.prompts > config.behaviour.prompts


def test_weights_keep_their_proportions():
    data = DataConfig(samples=("a", "b", "c"), weights=(30, 0, 10))
    sets = {name: demo().samples[:100] for name in data.samples}
    own, none, third, hard = propose(Config(data=data), sets, ("hard.jsonl", hard_samples(10, 0))).config.data.weights
    assert (none, own / third) == (0, pytest.approx(3, rel=0.02))
    assert hard / (own + third + hard) == pytest.approx(BOOST * 10 / (BOOST * 10 + 300), abs=0.01)


def test_a_student_that_kept_too_little_learns_longer(tmp_path: Path):
    config, sets = read_base(base(tmp_path))
    hard = ("hard.jsonl", hard_samples(2, 0))
    tokens = config.distil.token.tokens
    longer = propose(config, sets, hard, comparisons=[{"fails": ["kept 80 %\n[run]\nseed = 9"]}])
    assert longer.config.distil.token.tokens > tokens
    (tmp_path / "next.toml").write_text(written(longer))
    assert read(tmp_path / "next.toml") == longer.config, "what others wrote is no setting"
    assert propose(config, sets, hard, comparisons=[{"fails": []}]).config.distil.token.tokens == tokens
    with pytest.raises(DataError, match="does not say what fails"):
        propose(config, sets, hard, comparisons=[{}])
    with pytest.raises(DataError, match="does not say what fails"):
        propose(config, sets, hard, comparisons=[[{"short": ["checks"], "metrics": {}, "load": "open x1"}]])
    with pytest.raises(OptionError, match="learns from demo already"):
        propose(config, sets, ("demo", hard[1]))


def test_a_student_that_serves_too_slowly_becomes_smaller_and_one_that_answers_worse_learns_longer(tmp_path: Path):
    config, sets = read_base(base(tmp_path))

    def load(**kept: float) -> dict[str, object]:
        return {"load": "closed 4", "short": list(kept), "metrics": {name: {"retention": {"value": one}} for name, one in kept.items()}}

    replayed = [load(between_tokens_p50=0.94, errors=0.9), load(checks=0.8)]
    found = propose(config, sets, ("hard.jsonl", hard_samples(2, 0)), comparisons=[replayed])
    assert found.config.student.parameters == pytest.approx(config.student.parameters * 0.94, abs=1e-3)
    assert found.config.distil.token.tokens > config.distil.token.tokens
    assert "80% of checks (closed 4)" in found.why["distil.token.tokens"]
    assert found.left == ("errors",)
    far = propose(config, sets, ("hard.jsonl", hard_samples(2, 0)), comparisons=[[load(memory_peak=0.3), load(memory_peak=0.8)]])
    assert far.config.student.parameters == pytest.approx(config.student.parameters * 0.9, abs=1e-3), "by a tenth at a time"
    assert "30% of memory_peak" in far.why["student.parameters"]
    assert far.config.distil.token.tokens == config.distil.token.tokens


def test_recalibration_is_proposed_for_other_text_and_not_for_the_same():
    samples = demo().samples
    dice = random.Random(3)
    dice.shuffle(samples)
    learnt, same = samples[: len(samples) * 2 // 3], samples[len(samples) * 2 // 3 :]
    assert not drifted(learnt, [one.content for one in same]).anew
    log = [f"ERROR {number:05} worker {number % 7} lost lease on shard {number % 13}: retry in {number % 5} s" for number in range(200)]
    assert drifted(learnt, log).anew
    short = drifted(learnt, log[:3])
    assert (short.anew, str(short).startswith("not known")) == (False, True)
    with pytest.raises(DataError, match="no halves"):
        drifted(samples[:3], log)


@given(
    st.dictionaries(st.text(max_size=2), st.integers(1, 9), min_size=1), st.dictionaries(st.text(max_size=2), st.integers(1, 9), min_size=1)
)
@settings(deadline=None)
def test_divergence_is_between_0_and_1_bit(first: dict[str, int], second: dict[str, int]):
    assert divergence(first, first) == pytest.approx(0, abs=1e-12)
    assert divergence(first, second) == pytest.approx(divergence(second, first), abs=1e-12)
    assert -1e-12 <= divergence(first, second) <= 1 + 1e-12
    assert divergence({"a": 1}, {"b": 3}) == pytest.approx(1)


# ---- drift -------------------------------------------------------------------------------------------------------------------------------


def traffic(hours: int, slow_from: int | None, variant: str = "aaaa", seed: int = 1) -> list[Request]:
    """Forty requests an hour whose answers are longer, and come later, from an hour on."""
    dice = random.Random(seed)
    found = []
    for number in range(40 * hours):
        slow = 2.0 if slow_from is not None and number >= 40 * slow_from else 1.0
        seen = Seen("ok", completion_tokens=round(slow * dice.randint(10, 30)), first_token=slow * dice.uniform(0.1, 0.3), total=2.0)
        found.append(asked(number * 90.0, f"question {dice.random()} of all", seen, client=f"c{number}", variant=variant))
    return found


def test_a_planted_change_is_told_and_none_where_there_is_none():
    changed = {one.metric for one in drift.lines(drift.of_trace(Trace(tuple(traffic(6, 5)), {"begun": BEGUN}), "hour")) if one.changed}
    assert changed == {"first token p50", "first token p95", "tokens per answer"}
    for seed in range(5):
        steady = drift.lines(drift.of_trace(Trace(tuple(traffic(6, None, seed=seed)), {"begun": BEGUN}), "hour"))
        assert [one.metric for one in steady if one.changed] == []
        assert any(one.change is not None for one in steady)


def test_a_changed_prompt_begins_a_line_of_its_own():
    """All of one variant before, all of another after: each line is steady, and nothing is compared across them."""
    before = traffic(3, None)
    after = [one._replace(at=one.at + 3 * 3600) for one in traffic(3, 0, "bbbb", seed=2)]
    rated = tuple(Feedback(at, "x", (user(ASK),), rating=1 if at < 3 * 3600 else -1, variant="aaaa" if at < 3 * 3600 else "bbbb") for at in
                  range(0, 6 * 3600, 300))  # fmt: skip
    found = drift.lines(drift.of_trace(Trace((*before, *after), {"begun": BEGUN}, rated), "hour"))
    assert [one for one in found if one.changed] == []
    by = {(one.metric, one.variant): [point.window for point in one.points] for one in found}
    assert by["tokens per answer", "aaaa"] == ["03-01 09:00", "03-01 10:00", "03-01 11:00"]
    assert by["tokens per answer", "bbbb"] == ["03-01 12:00", "03-01 13:00", "03-01 14:00"]
    means = {one.variant: one.points[-1].value for one in found if one.metric == "rating"}
    assert means == {"aaaa": 1.0, "bbbb": -1.0}


def test_windows_fit_the_time_that_is_shown():
    first = Trace((asked(0, ASK),), {"begun": BEGUN})
    later = [Trace((asked(9, ASK),), {"begun": BEGUN.replace("-01T", f"-{day:02}T")}) for day in (2, 6, 31)]
    assert [drift.fitting([first, one]) for one in later] == ["hour", "day", "week"]
    assert {one.window for trace in (first, later[1]) for one in drift.of_trace(trace, "day")} == {"2026-03-01", "2026-03-06"}
    with pytest.raises(OptionError, match="choose hour, day, week"):
        list(drift.of_trace(first, "year"))


def evaluation(folder: Path, name: str, right: float, template: str = "aaaa") -> Path:
    """Results of the suite retail in which a share of the items is right."""
    (suite,) = built_in(["retail"])
    outcomes = tuple(Outcome("retail", one.id, float(at < right * len(suite.items)), ()) for at, one in enumerate(suite.items))
    path = folder / f"{name}.json"
    evaluations.write_results(path, evaluations.Results(Facts("m", "e", template), {"retail": evaluations.digest(suite)}, outcomes, 1.0))
    return path


def test_a_series_of_evaluations_and_one_of_replays_are_lines_beside_each_other(tmp_path: Path):
    files = [evaluation(tmp_path, "one", 0.8), evaluation(tmp_path, "two", 0.8), evaluation(tmp_path, "three", 0.3)]
    files.append(evaluation(tmp_path, "other", 0.9, "bbbb"))
    for name, status in (("a", "ok"), ("b", "error")):
        outcomes = tuple(replays.Outcome(n, 0.0, 0.0, 1.0, status, pieces=(0.1,), tokens=(1,)) for n in range(30))
        replays.write_results(tmp_path / f"{name}.json", replays.Results("t", "open x1", "d" * 16, outcomes))
        files.append(tmp_path / f"{name}.json")
    found = {(one.metric, one.variant): one for one in drift.lines(drift.read(files, built_in()))}
    whole = found["score all", "aaaa"]
    assert ([point.window for point in whole.points], whole.changed) == (["one", "two", "three"], True)
    assert [point.window for point in found["score all", "bbbb"].points] == ["other"]
    errors = found["replay errors", "dddddddddddd open x1"]
    assert ([point.value for point in errors.points], errors.changed) == ([0.0, 1.0], True)
    with pytest.raises(DataError, match="cannot be read"):
        drift.read([tmp_path / "none.json"], built_in())


def test_few_values_are_shown_and_not_compared():
    found = drift.lines([drift.Value("rating", "aaaa", place, str(place), 1.0 - place) for place in (0, 1) for _ in range(5)])
    assert (found[0].change, [point.value for point in found[0].points]) == (None, [1.0, 0.0])
    assert drift.rows(found)[0][-1] == "too little to say"


# ---- the commands ------------------------------------------------------------------------------------------------------------------------


def invoke(*words: str | Path, text: str | None = None) -> Result:
    app = typer.Typer()
    add_commands(app)
    return CliRunner().invoke(app, ["feedback", *map(str, words)], input=text)


def test_from_a_trace_to_the_next_run_and_a_page(tmp_path: Path):
    said = (Feedback(10.0, "Soon.", (user(ASK),), rating=-1, correction="Within 14 days.", client="c1", variant="aaaa"),)
    log = [
        asked(200.0 + 5 * number, f"ERROR {number:05} worker lost lease on shard {number}, what now?", client=f"d{number}")
        for number in range(90)
    ]
    write_trace(tmp_path / "t.jsonl", Trace((asked(0, ASK), asked(60, AGAIN), *log), {"begun": BEGUN}, said))
    mined = invoke("mine", tmp_path / "t.jsonl", "-o", tmp_path / "hard.jsonl")
    assert mined.exit_code == 0, mined.exception
    assert "asked again: 1" in mined.output
    assert "1 hard cases of 2 signals, 1 with a correction" in mined.output
    done = invoke("propose", base(tmp_path), tmp_path / "hard.jsonl", "--traffic", tmp_path / "t.jsonl", "-o", tmp_path / "next.toml")
    assert (done.exit_code, "calibrate compensation anew? yes" in done.output) == (0, True), done.output
    following = read(tmp_path / "next.toml")
    assert following.data.samples == ("demo", "hard.jsonl", "next-traffic.jsonl")
    sets = read_base(tmp_path / "next.toml")[1]
    assert [len(sets[name]) for name in following.data.samples[1:]] == [1, 91], "the question that was asked again stands there once"
    assert following.data.weights[1] == 0 < following.data.weights[2], "a single case has no share of its own"
    shown = invoke("drift", tmp_path / "t.jsonl", "-o", tmp_path / "drift.html")
    assert (shown.exit_code, shown.output.splitlines()[0].split()) == (0, list(drift.HEAD))
    page = (tmp_path / "drift.html").read_text()
    assert page.count("<svg ") == len({line.split("  ")[0] for line in shown.output.splitlines()[1:-1]})
    elsewhere = invoke("propose", tmp_path / "run.toml", tmp_path / "hard.jsonl", "-o", tmp_path / "x" / "next.toml")
    assert isinstance(elsewhere.exception, OptionError)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"answer": "x"}', '{"messages": [], "prompt": "x", "answer": "x"}', '{"prompt": "x", "answer": "", "stars": 1}']
)
def test_feedback_that_is_none_is_told_before_anything_is_sent(text: str):
    failed = invoke("give", "-", "--url", "http://127.0.0.1:9", "--rating", "1", text=text)
    assert isinstance(failed.exception, DataError)
    assert "standard input" in str(failed.exception)
    second = '{"prompt": "x", "answer": "y", "rating": 1}\n\n' + text
    failed = invoke("give", "-", "--url", "http://127.0.0.1:9", text=second)
    assert isinstance(failed.exception, DataError)
    assert "standard input, line 3" in str(failed.exception)


def test_the_whole_way_with_a_daemon(tiny: Path, tmp_path: Path):
    record = ("--ctx", "512", "--record", str(tmp_path / "t.jsonl"))
    with serving(tiny, tmp_path, *record, first=[user(ASK)], tokens=4) as url:
        (tmp_path / "said.json").write_text(json.dumps({"messages": [user(ASK)], "answer": "Soon, mail ada@example.org"}))
        given = invoke("give", tmp_path / "said.json", "--url", url, "--rating", "-1", "--correction", "Within 14 days.")
        assert given.output == "recorded\n", given.exception
        lines = [json.dumps({"prompt": f"Say {number}.", "answer": "No.", "rating": number}) for number in (0, 1)]
        (tmp_path / "said.jsonl").write_text("\n".join([*lines, ""]))
        assert invoke("give", tmp_path / "said.jsonl", "--url", url).output == "recorded: 2 answers\n"
        (tmp_path / "said.jsonl").write_text("\n".join([*lines[:1], '{"prompt": "Say 2.", "answer": "No."}']))
        part = invoke("give", tmp_path / "said.jsonl", "--url", url)
        assert (part.output, isinstance(part.exception, UserError)) == ("recorded: the first 1 of 2 answers\n", True)
        refused = invoke("give", tmp_path / "said.json", "--url", url)
        assert "give a rating, a correction or a comment" in str(refused.exception)
    trace = read_trace(tmp_path / "t.jsonl")
    assert trace.feedback[0].answer == "Soon, mail [EMAIL]"
    assert [one.rating for one in trace.feedback] == [-1, 0, 1, 0]
    assert trace.requests[-1].variant == trace.feedback[0].variant != ""
    assert invoke("mine", tmp_path / "t.jsonl", "-o", tmp_path / "hard.jsonl").exit_code == 0
    assert invoke("propose", base(tmp_path), tmp_path / "hard.jsonl", "-o", tmp_path / "next.toml").exit_code == 0
    following = read(tmp_path / "next.toml")
    assert (following.data.samples, following.data.weights) == (("demo", "hard.jsonl"), ())
