"""Traces are read as they were written, made-up ones are drawn from a seed, and their checks tell good answers from bad ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from statistics import mean, pvariance
from typing import Any

import pytest
import typer
from edge_rt_distill.cli import add_commands
from edge_rt_distill.data.answers import Answer
from edge_rt_distill.data.checks import worth
from edge_rt_distill.replay.contents import ATTACKS
from edge_rt_distill.replay.generators import GENERATORS, MIX, Wanted, make
from edge_rt_distill.replay.summaries import described, joined
from edge_rt_distill.replay.trace import PATHS, RATINGS, STATUSES, Feedback, Request, Seen, Trace, kinds, read_trace, write_trace
from edge_rt_distill.sandbox.suites import built_in, faults, read_suite
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edge_rt.hooks import DataError, OptionError

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
SECONDS = st.floats(0, 1e6)
COUNT = st.none() | st.integers(0, 1000)
SEEN = st.builds(
    Seen,
    status=st.sampled_from(STATUSES),
    code=st.just("") | TEXT,
    finish_reason=st.just("") | TEXT,
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    first_token=st.none() | SECONDS,
    total=st.none() | SECONDS,
    rules=st.dictionaries(TEXT, st.integers(1, 9), max_size=2),
)
REQUESTS = st.builds(
    Request,
    at=SECONDS,
    path=st.sampled_from(PATHS),
    body=TEXT.map(lambda text: {"messages": [{"role": "user", "content": text}], "prompt": text, "max_tokens": 3}),
    session=st.none() | TEXT,
    client=st.none() | TEXT,
    cancel_after=st.none() | SECONDS,
    checks=st.sampled_from([(), ({"kind": "ends"},)]),
    kind=st.just("") | TEXT,
    seen=st.none() | SEEN,
    answer=st.none() | TEXT,
    variant=st.just("") | TEXT,
)
FEEDBACK = st.builds(
    lambda text, talk, **rest: Feedback(**rest, **({"messages": ({"role": "user", "content": text},)} if talk else {"prompt": text})),
    text=TEXT,
    talk=st.booleans(),
    at=SECONDS,
    answer=st.just("") | TEXT,
    rating=st.sampled_from([None, *RATINGS]),
    correction=st.none() | TEXT,
    comment=st.none() | TEXT,
    model=st.none() | TEXT,
    client=st.none() | TEXT,
    variant=st.just("") | TEXT,
)


# ---- files -----------------------------------------------------------------------------------------------------------------------------


@given(requests=st.lists(REQUESTS, min_size=1, max_size=5), feedback=st.lists(FEEDBACK, max_size=3))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_trace_is_read_as_it_was_written(tmp_path: Path, requests: list[Request], feedback: list[Feedback]):
    first, said = (tuple(sorted(some, key=lambda one: one.at)) for some in (requests, feedback))
    trace = Trace(first, {"by": "a test", "redacted": True}, said)
    write_trace(tmp_path / "t.jsonl", trace)
    assert read_trace(tmp_path / "t.jsonl") == trace


def test_feedback_of_several_recordings_is_on_one_clock_and_may_be_alone(tmp_path: Path):
    lines: list[Any] = []
    for minute in (0, 5):
        lines.append({"edge_rt_trace": 1, "begun": f"2026-03-01T09:0{minute}:00Z"})
        lines.append({"at": 2, "client": "c1", "feedback": {"prompt": "x", "answer": "y", "rating": minute - 5 and -1}})
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = read_trace(tmp_path / "t.jsonl", of_requests=False).feedback
    assert [(one.at, one.client, one.rating) for one in found] == [(2, "c1", -1), (302, "c1.2", 0)]
    with pytest.raises(DataError, match=r"has no requests$"):
        read_trace(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text(json.dumps(lines[0]), encoding="utf-8")
    with pytest.raises(DataError, match="has no requests and no feedback"):
        read_trace(tmp_path / "t.jsonl", of_requests=False)


GOOD = {"at": 1, "request": {"messages": [{"role": "user", "content": "x"}]}}


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", '"text"', {}, {**GOOD, "at": -1}, {**GOOD, "at": "soon"}, {**GOOD, "path": "/v1/embeddings"}, {**GOOD, "other": 1},
        {**GOOD, "request": {}}, {**GOOD, "request": {"messages": "x"}}, {**GOOD, "checks": [{"kind": "none"}]}, {**GOOD, "session": 3},
        {**GOOD, "outcome": {"status": "fine"}}, {**GOOD, "cancel_after": True},
        {"method": "GET", "url": PATHS[0], "body": GOOD["request"]},
        {"edge_rt_trace": 99}, {**GOOD, "outcome": {"status": "ok", "rules": [1]}}, {"feedback": []}, {"feedback": {"prompt": "x"}},
        {**GOOD, "outcome": {"status": "ok", "rules": {"a": "b"}}}, {"feedback": {"answer": "y"}},
        {"feedback": {"prompt": "x", "answer": "y", "rating": 2}}, {"feedback": {"prompt": "x", "answer": "y"}, "session": "s1"},
        {"feedback": {"prompt": "x", "answer": "y", "stars": 1}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("before", [0, 3])
def test_every_broken_line_is_told_by_its_number(tmp_path: Path, line: Any, before: int):
    lines = [json.dumps(GOOD)] * before + [line if isinstance(line, str) else json.dumps(line), json.dumps(GOOD)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=rf"line {before + 1}\b"):
        read_trace(tmp_path / "t.jsonl")


# ---- made up ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("language", ["en", "zh", "both"])
def test_the_same_wishes_give_the_same_trace_and_another_seed_another(kind: str, language: str, tmp_path: Path):
    wanted = Wanted(requests=40, rate=2.0, seed=7, language=language, longest=1)
    trace = make(kind, wanted)
    assert make(kind, wanted) == trace
    assert make(kind, wanted._replace(seed=8)).requests != trace.requests
    assert len(trace.requests) == 40
    assert all(before.at <= after.at for before, after in pairwise(trace.requests))
    assert all(one.body["temperature"] == 0 and one.body["max_tokens"] > 0 for one in trace.requests)
    assert set(kinds(trace.requests)) == (set(MIX) if kind == "mixed" else {kind})
    write_trace(tmp_path / "t.jsonl", trace)
    assert json.dumps(read_trace(tmp_path / "t.jsonl")) == json.dumps(trace)


@pytest.mark.parametrize("kind", GENERATORS)
def test_the_mean_rate_is_the_one_asked_for(kind: str):
    trace = make(kind, Wanted(requests=2000, rate=4.0, longest=0.25))
    assert trace.requests[-1].at == pytest.approx(500, rel=0.2)


def test_bursty_traffic_comes_in_bursts_and_steady_does_not():
    def dispersion(kind: str) -> float:
        """The variance of counts by their mean: 1 of a Poisson process."""
        counts = Counter(int(one.at) // 5 for one in make(kind, Wanted(requests=3000, rate=2.0)).requests)
        numbers = [counts[second] for second in range(max(counts))]
        return pvariance(numbers) / mean(numbers)

    assert dispersion("steady") < 1.5
    assert dispersion("bursty") > 2.5


def test_what_is_sealed_is_never_asked():
    sealed = {json.dumps(item.messages) for suite in built_in() for item in suite.items if item.split == "sealed" and item.messages}
    asked = {json.dumps(one.body["messages"]) for one in make("steady", Wanted(requests=1500)).requests}
    assert len(asked) > 400
    assert not sealed & asked


def test_the_attacks_tell_robust_answers_from_others():
    suite = read_suite(ATTACKS)
    assert faults(suite) == []
    assert {item.language for item in suite.items} == {"en", "zh"}
    known = {json.dumps(list(item.messages)): item for item in suite.items}
    for one in make("adversarial", Wanted(requests=64)).requests:
        item = known[json.dumps(one.body["messages"])]
        assert min(worth(one.checks, good[0]) for good in item.good) > 0.9 > max(worth(one.checks, bad[0]) for bad in item.bad)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_long_prompts_hold_what_they_ask_for_and_are_as_long_as_they_should_be(language: str):
    requests = make("long-context", Wanted(requests=60, language=language, longest=2)).requests
    letters = {"en": 4, "zh": 1}[language]
    sizes = Counter(round(len(one.body["messages"][0]["content"]) / letters / 256) for one in requests)
    assert set(sizes) == {1, 2, 4, 8}
    sorts = set()
    for one in requests:
        (check,) = one.checks
        sorts.add(check["kind"])
        prompt = one.body["messages"][0]["content"]
        good = check["equals"] if "equals" in check else ", ".join(check["all"])
        bad = check["equals"] + 1 if "equals" in check else check["all"][0]
        assert all(str(part) in prompt for part in ([good] if "equals" in check else check["all"]))
        assert worth(one.checks, Answer(f"It is: {good}.", True)) == 1
        assert worth(one.checks, Answer(f"It is: {bad}.", True)) < 0.7
    assert sorts == {"number", "contains"}


def test_conversations_have_three_to_eight_turns_with_pauses_and_come_back_to_what_was_said():
    requests = make("multi-turn", Wanted(requests=400, rate=2.0)).requests
    key = lambda one: one.session or ""  # noqa: E731
    talks = [list(turns) for _, turns in groupby(sorted(requests, key=key), key)]
    lengths = Counter(map(len, talks))
    assert set(lengths) >= set(range(3, 9))
    assert sum(lengths[number] for number in (1, 2)) <= 1, "the last may be cut"
    assert all(before.at < after.at for talk in talks for before, after in pairwise(talk))
    frames = {item.turns[-1].content: item for suite in built_in() for item in suite.items if item.form == "turns"}
    for talk in talks:
        if (item := frames.get(talk[-1].body["messages"][-1]["content"])) is None:
            continue  # the one that is cut
        assert talk[0].body["messages"][-1]["content"] == item.turns[0].content
        if talk[-1].checks:
            assert max(worth(talk[-1].checks, good[-1]) for good in item.good) > 0.9
    assert all(len(one.body["messages"]) == 1 for talk in talks for one in talk[1:]), "only what is new"


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("none", Wanted()), ("steady", Wanted(language="fr")), ("steady", Wanted(rate=0)), ("steady", Wanted(requests=0)),
        ("long-context", Wanted(longest=0.1)),
    ],
)  # fmt: skip
def test_traffic_that_cannot_be_made_is_said(kind: str, wanted: Wanted):
    with pytest.raises(OptionError):
        make(kind, wanted)


# ---- the commands ----------------------------------------------------------------------------------------------------------------------


def test_joined_traces_keep_their_times_or_get_a_rate_and_their_sessions_stay_apart():
    one = Request(3.0, PATHS[0], {"messages": [{"role": "user", "content": "x"}]}, session="s")
    parts = [("a", Trace((one,), {})), ("b", Trace((one._replace(at=1.0, kind="k"),), {}))]
    own = joined(parts, None).requests
    assert [(each.at, each.kind, each.session) for each in own] == [(1.0, "k", "2-s"), (3.0, "a", "1-s")]
    assert [(each.at, each.kind) for each in joined(parts, 4.0).requests] == [(0.0, "a"), (0.25, "k")]


def test_a_trace_is_described():
    seen = Seen("ok")
    requests = [Request(2.0 * at, PATHS[0], {"messages": [{"role": "user", "content": "x" * (at + 1)}]}, seen=seen) for at in range(11)]
    requests[3] = requests[3]._replace(session="s", cancel_after=1.0, body={"messages": [{"content": [{"text": "yy"}, {"image": 1}]}]})
    lines = "\n".join(described(Trace(tuple(requests), {"redacted": True})))
    for part in (
        "redacted: True", "11 requests in 20.0 s, 0.50 a second", "most in 10 s: 5", "kinds: none 11", "in 1 sessions: 1",
        "most 11", "left by their clients 1", "when recorded: ok 11",
    ):  # fmt: skip
        assert part in lines


def invoke(words: Sequence[str]) -> Any:
    app = typer.Typer()
    add_commands(app)
    return CliRunner().invoke(app, ["replay", *words])


def test_the_commands_make_show_and_import(tmp_path: Path):
    made, listed, taken = tmp_path / "m.jsonl", tmp_path / "l.jsonl", tmp_path / "i.jsonl"
    assert invoke(["make", "mixed", "-o", str(made), "--requests", "30", "--rate", "3", "--longest", "0.5"]).exit_code == 0
    shown = invoke(["show", str(made)])
    assert "30 requests in" in shown.stdout
    assert "redacted: not said" in shown.stdout
    listed.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"prompt": "y"}\n', encoding="utf-8")
    assert invoke(["import", str(listed), "-o", str(taken), "--rate", "2"]).exit_code == 0
    assert [(one.at, one.kind, one.path) for one in read_trace(taken).requests] == [(0.0, "l", PATHS[0]), (0.5, "l", PATHS[1])]


@pytest.mark.parametrize(
    "words",
    [
        [], ["--url", "http://x", "--model", "m"], ["--model", "m", "--pid", "3"], ["--url", "http://x", "--engine", "ggml"],
        ["--url", "http://x", "--speed", "0"], ["--url", "http://x", "--speed", "2", "--concurrency", "3"],
        ["--url", "http://x", "--speed", "nan"], ["--url", "http://x", "-o", "."], ["--url", "http://x", "--fault", "soon"],
        ["--url", "http://x", "--key-file", "/nowhere"],
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_said(tmp_path: Path, words: list[str]):
    (tmp_path / "t.jsonl").write_text('{"prompt": "y"}', encoding="utf-8")
    result = invoke(["run", str(tmp_path / "t.jsonl"), "-o", str(tmp_path / "r.json"), *words])
    assert isinstance(result.exception, OptionError)
    assert not (tmp_path / "r.json").exists()
