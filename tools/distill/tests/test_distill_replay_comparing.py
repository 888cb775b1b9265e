"""A candidate against a baseline: what it kept, and why where it fell short; faults; the page and the commands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
from edge_rt_distill.replay.columns import columns
from edge_rt_distill.replay.compare_commands import add
from edge_rt_distill.replay.comparing import KEPT, NOISE, SHORT, SHOWN, UNKNOWN, compare, pairs
from edge_rt_distill.replay.measures import METRICS
from edge_rt_distill.replay.outages import outages
from edge_rt_distill.replay.page import render
from edge_rt_distill.replay.results import Fault, Reading, Results, write_results
from edge_rt_distill.replay.trace import Trace, write_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_runs import LOST, outcome, results, scaled, service, trace
from typer.testing import CliRunner

from edge_rt.hooks import DataError

KINDS = trace(each=lambda number: {"kind": "adversarial" if number % 4 == 0 else "steady"})
OF_TIME = ("first_token_p50", "first_token_p95", "between_tokens_p50", "between_tokens_p99", "throughput", "completed", "queueing_p95")


def whole(**more: Any) -> Results:
    """A service of which everything is known."""
    known = [Reading(place * 0.5, 10**9 + place, 10.0 * place) for place in range(160)]
    return service(each=lambda number: {"passed": number % 3 / 2, "prompt_seconds": 0.1}, readings=tuple(known), cold_start=2.0, **more)


# ---- what is kept --------------------------------------------------------------------------------------------------------------------


def test_the_same_run_keeps_everything() -> None:
    found = compare(whole(), whole(), trace=KINDS)
    assert {name: row.verdict for name, row in found.rows.items()} == {
        name: SHOWN if one.compared == "shown" else KEPT for name, one in METRICS.items()
    }
    assert {row.retention.value for row in found.rows.values() if row.retention} == {1.0}
    assert {row.retention[1:] for name, row in found.rows.items() if row.retention and name != "cold_start"} == {(1.0, 1.0)}
    assert found.rows["agreement"].candidate.estimate == (1.0, 1.0, 1.0)
    assert not found.short


@settings(max_examples=5, deadline=None)
@given(st.floats(0.2, 5.0))
def test_a_run_k_times_as_slow_keeps_a_kth(by: float) -> None:
    slow = compare(whole(), scaled(whole(), by)).rows
    for name in OF_TIME:
        assert slow[name].retention == pytest.approx((1 / by,) * 3), name
    assert slow["long_context_speed"].retention == pytest.approx((1.0,) * 3)


def test_what_is_below_the_bar_only_by_chance_is_noise() -> None:
    found = compare(service(24), service(24, seed=3, each=lambda number: LOST if number in (5, 6) else {}))
    assert found.rows["errors"].retention is not None
    assert found.rows["errors"].retention.value < 0.95 <= found.rows["errors"].retention.high
    assert found.rows["errors"].verdict == NOISE
    assert found.rows["errors"].cause is not None
    sure = compare(service(24), service(24, each=lambda number: LOST if number % 2 else {}))
    assert sure.rows["errors"].verdict == SHORT
    assert "errors" in sure.short


def test_of_nothing_nothing_is_kept() -> None:
    found = compare(service(20, each=lambda number: {"first": 3.0}), service(20)).rows["goodput"]
    assert (found.verdict, found.reason, found.retention) == (UNKNOWN, "the baseline has none to keep", None)


def test_requests_that_only_one_was_sent_are_left_out_and_told() -> None:
    found = compare(service(40), service(30))
    assert len(found.pair[0].outcomes) == len(found.pair[1].outcomes) == 30
    assert found.notes == ("10 requests were sent to the baseline only and are left out",)
    late = compare(service(40), service(40, each=lambda number: {"due": number - 1.0}))
    assert late.notes == ("candidate: 5 % of its requests were sent more than 1.0 s late: the load was lighter than asked",)


def test_requests_that_ask_the_same_are_told() -> None:
    judged = {"checks": ({"kind": "ends"},)}
    same = compare(service(30), service(30), trace=trace(30, lambda number: judged))
    assert any(note.startswith("29 requests ask what another asks") for note in same.notes)
    each = trace(30, lambda number: {**judged, "body": {"messages": [{"role": "user", "content": f"{number}?"}], "temperature": 0}})
    assert compare(service(30), service(30), trace=each).notes == ()
    assert compare(service(30), service(30), trace=trace(30)).notes == ()


def test_prompts_of_failed_requests_are_as_long_as_the_other_run_says() -> None:
    found = compare(service(40), service(40, each=lambda number: LOST if number < 10 else {}))
    assert not any(math.isnan(one) for run in found.pair for one in run.prompt[:30])


def test_what_does_not_fit_is_refused() -> None:
    for other, said in (
        (service(trace="xyz"), "trace is 'abc' and the candidate's 'xyz'"),
        (service(load="closed 4"), "load is 'open x1' and the candidate's 'closed 4'"),
        (results(outcome(500)), "no request was sent to both"),
    ):
        with pytest.raises(DataError, match=said):
            compare(service(), other)


def test_runs_are_paired_by_load() -> None:
    some = [service(2, load=f"closed {number}") for number in (1, 4)]
    assert [left.load for left, right in pairs(some, some[::-1]) if left == right] == ["closed 1", "closed 4"]
    with pytest.raises(DataError, match="the candidate has no results of the load 'closed 4'"):
        pairs(some, some[:1])
    with pytest.raises(DataError, match="the baseline has two results of the load 'closed 1'"):
        pairs([some[0], *some], some)


# ---- why ---------------------------------------------------------------------------------------------------------------------------


def where(name: str, candidate: Results, known: Trace | None = None, baseline: Results | None = None) -> str:
    row = compare(baseline or whole(), candidate, trace=known).rows[name]
    assert row.verdict in (SHORT, NOISE)
    assert row.cause is not None
    return row.cause.where


def test_requests_that_fail_around_a_fault_name_it() -> None:
    fault = Fault(40.0, "kill-worker")
    candidate = service(each=lambda number: LOST if 40 <= number < 46 else {}, faults=(fault,))
    for name in ("errors", "goodput", "completed"):
        assert where(name, candidate).startswith("around kill-worker at 40.0 s (8 of 80 requests): retention is "), name
    found = compare(whole(), candidate).rows["errors"].cause
    assert found is not None
    assert [one.place for one in found.worst] == [40, 41, 42, 43, 44]
    assert (found.groups[0].outside, found.groups[0].explained) == (1.0, 1.0)
    assert found.groups[0].inside == pytest.approx(2 / 8)


def test_slow_long_prompts_are_named() -> None:
    def prompts(gap: float) -> Results:
        long = {"prompt_tokens": 900, "gap": gap}
        return service(each=lambda number: long if number % 4 == 1 else {"prompt_tokens": 100 + number % 9})

    found = where("between_tokens_p99", prompts(0.3), baseline=prompts(0.05))
    assert found.startswith("the longest quarter of prompts (20 of 80 requests): retention is 0.")


def test_a_kind_is_named() -> None:
    candidate = service(each=lambda number: {"passed": 0.0 if number % 4 == 0 else number % 3 / 2, "prompt_tokens": 9})
    assert where("checks", candidate, KINDS).startswith("kind adversarial (20 of 80 requests)")


def test_what_is_slow_everywhere_has_no_group() -> None:
    assert where("first_token_p50", scaled(whole(), 1.5)) == "everywhere: no group of requests explains any of it"


def test_memory_says_when_it_was_highest() -> None:
    high = whole()._replace(readings=(Reading(0.0, 10**9), Reading(10.6, 3 * 10**9), *(Reading(20.0 + one, 10**9) for one in range(20))))
    assert where("memory_peak", high) == "its memory was highest 10.6 s after the begin, with 1 requests on their way"


# ---- faults ------------------------------------------------------------------------------------------------------------------------


def test_what_faults_did() -> None:
    run = columns(
        results(
            outcome(0, first=1.0, gap=1.0, tokens=3),  # tokens at 1, 2, 3
            outcome(1, first=9.0, gap=1.0, tokens=2),  # on its way, and survives: at 10, 11
            outcome(2, **{**LOST, "first": 3.0}),  # on its way, and is lost
            outcome(5, **LOST),
            outcome(6, first=2.0, gap=1.0, tokens=2),  # the first that is answered: at 8, 9
            faults=(Fault(20.0, "freeze"), Fault(4.0, "kill-worker", "killed 12")),
        )
    )
    killed, frozen = outages(run)
    assert (killed.name, killed.back, killed.silent, killed.failed) == ("kill-worker at 4.0 s", 4.0, 4.0, 2)
    assert (killed.survived, killed.cut) == (1, 1)
    assert (frozen.back, frozen.survived, frozen.cut, frozen.silent) == (None, 0, 0, 0.0)


# ---- the page and the commands -----------------------------------------------------------------------------------------------------


def test_a_page_has_both_answers_and_no_markup_of_theirs() -> None:
    bad = {"text": "<script>alert(1)</script>", "passed": 0.0, "first": 3.0}
    candidate = service(target="<b>$x$</b>", each=lambda number: bad if number % 2 else {}, faults=(Fault(3.0, "<i>"),))
    shown = render([whole(), candidate, service(load="closed 4", target="third")], trace=KINDS)
    assert "<script" not in shown
    assert "<b>$x$" not in shown
    assert "<i>" not in shown
    assert "&lt;script&gt;alert(1)" in shown
    assert shown.count("<svg") == 5
    assert "of another trace or load" in shown
    assert "By seconds to the first token" in shown


def test_a_page_of_one_run_that_only_failed_and_of_two_of_one_name() -> None:
    lost = results(*(outcome(number, **LOST) for number in range(3)))
    shown = render([lost, lost])
    assert "server, open x1 (2)" in shown
    assert "first_token_p50 is unknown: no request got a token" in shown


def test_long_texts_are_cut_and_what_was_left_out_is_told() -> None:
    shown = render([service(3, each=lambda number: {"text": "a" * 5000}, about={"left_out": {"edge_rt": 2}, "unsent": 0})])
    assert "left_out: {&#x27;edge_rt&#x27;: 2}" in shown
    assert "unsent" not in shown
    assert "[... 3800 characters ...]" in shown


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    add(app)
    return app


def call(app: typer.Typer, *words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


def test_commands(app: typer.Typer, tmp_path: Path) -> None:
    slow = scaled(whole(), 2.0)._replace(faults=(Fault(5.0, "reload-rules", "done"),))
    for side, one in (("old", whole()), ("new", slow)):
        for load in ("open x1", "closed 4"):
            write_results(tmp_path / side / f"{load}.json", one._replace(load=load, target=side))
    write_trace(tmp_path / "trace.jsonl", KINDS)
    said = call(
        app, "compare", tmp_path / "old", tmp_path / "new", "--trace", tmp_path / "trace.jsonl", "--json", tmp_path / "kept", code=1
    )
    assert "FAIL: first_token_p50 kept 50.0%" in said
    assert "candidate: reload-rules at 5.0 s (done): a request was served again" in said
    assert said.splitlines()[-1].startswith("surely below 95.0%: first_token_p50 (closed 4), ")
    kept = json.loads((tmp_path / "kept").read_text())
    assert [one["load"] for one in kept] == ["closed 4", "open x1"]
    assert kept[0]["metrics"]["first_token_p50"]["retention"]["value"] == pytest.approx(0.5)
    assert kept[0]["metrics"]["cold_start"]["retention"] == {"value": 1.0, "low": None, "high": None}
    assert kept[0]["outages"]["candidate"][0]["fault"]["what"] == "reload-rules"
    one = tmp_path / "old" / "open x1.json"
    assert "nothing is surely below 95.0%" in call(app, "compare", one, one)
    assert "without --trace kinds are not known" in call(app, "compare", one, one)
    call(app, "report", one, tmp_path / "new" / "open x1.json", "-o", tmp_path / "page.html", "--trace", tmp_path / "trace.jsonl")
    assert "What new kept of old" in (tmp_path / "page.html").read_text()
    listed = call(app, "metrics")
    assert all(f"{name} (" in listed for name in METRICS)


def test_a_folder_without_results_is_told(app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(tmp_path), str(tmp_path)])
    assert isinstance(result.exception, DataError)
    assert "has no results" in str(result.exception)


def test_services_wanted_otherwise_change_goodput(app: typer.Typer, tmp_path: Path) -> None:
    write_results(tmp_path / "a.json", service(target="a"))
    write_results(tmp_path / "b.json", service(target="b", each=lambda number: {"first": 1.0}))
    args = (tmp_path / "a.json", tmp_path / "b.json", "--min-retention", "0.1")
    assert "goodput " in call(app, "compare", *args)
    assert "FAIL: goodput kept 0.0%" in call(app, "compare", *args, "--slo-first", "0.8", code=1)
    assert UNKNOWN in call(app, "compare", *args)
