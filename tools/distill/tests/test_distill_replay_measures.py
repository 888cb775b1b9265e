"""Metrics of a run: values worked out by hand, what is unknown, intervals; each metric prefers a good service to a bad one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from edge_rt_distill.replay.columns import Slo, beside, columns
from edge_rt_distill.replay.measures import COMPARED, METRICS, block_length, measure, retention, value
from edge_rt_distill.replay.results import Reading, Results
from edge_rt_distill.replay.trace import Trace, digest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_runs import LOST, outcome, readings, results, service, trace

from edge_rt.hooks import DataError


def of(name: str, found: Results, known: Trace | None = None) -> float:
    return value(columns(found, trace=known), name)


# ---- values --------------------------------------------------------------------------------------------------------------------------


def test_times_of_tokens() -> None:
    found = results(outcome(0, first=1.0, gap=0.1, tokens=3), outcome(1, first=3.0, gap=0.3, tokens=2), outcome(2, first=2.0, tokens=1))
    assert of("first_token_p50", found) == pytest.approx(2.0)
    assert of("first_token_p95", found) == pytest.approx(3.0)
    assert of("between_tokens_p50", found) == pytest.approx(0.1)  # 0.1, 0.1, 0.3
    assert of("between_tokens_p99", found) == pytest.approx(0.3)
    assert of("throughput", found) == pytest.approx(6 / 4.3)  # the last ends 3.3 s after it was sent at 1.0
    assert of("completed", found) == pytest.approx(3 / 4.3)


def test_the_time_of_a_run_is_shared_by_those_on_their_way() -> None:
    run = columns(results(outcome(0, 4.0, tokens=1, sent=0.0), outcome(1, 1.0, tokens=1, sent=1.0), outcome(2, 1.0, tokens=1, sent=6.0)))
    assert run.share == pytest.approx([1 + 0.5 + 2, 0.5, 1 + 2])  # idle from 4 to 6
    busy = columns(service(50, each=lambda number: {"sent": number // 5 * 1.0, "first": 2.0 + number % 7}))
    assert busy.share.sum() == pytest.approx(busy.length)


def test_a_piece_of_n_tokens_is_n_gaps_and_one_of_none_adds_to_the_next() -> None:
    many = outcome(0)._replace(pieces=(1.0, 2.0, 2.1), tokens=(1, 10, 1), ended=2.1)
    assert columns(results(many)).gaps.seconds == pytest.approx([0.1, 0.1])
    assert list(columns(results(many)).gaps.tokens) in ([10, 1], [1, 10])
    late = outcome(0)._replace(pieces=(1.0, 2.0, 3.0), tokens=(1, 0, 1), ended=3.0)
    assert columns(results(late)).gaps.seconds == pytest.approx([2.0])


def test_who_is_served_as_wanted() -> None:
    good = {
        "in time": (outcome(0, first=1.9, gap=0.19), 1),
        "first token late": (outcome(0, first=2.1), 0),
        "tokens late": (outcome(0, gap=0.3), 0),
        "failed": (outcome(0, **LOST), 0),
        "given up by the server": (outcome(0, status="cancelled", code="shutting_down"), 0),
        "left by the client in the middle": (outcome(0, status="cancelled"), 1),
        "left by the client at once": (outcome(0, 1.0, tokens=0, status="cancelled"), math.nan),
        "left by the client when it was late": (outcome(0, 2.5, tokens=0, status="cancelled"), 0),
        "answered without a word": (outcome(0, 1.0, tokens=0), 1),
    }
    found = {name: columns(results(one)).good[0] for name, (one, _) in good.items()}
    assert found == pytest.approx({name: wanted for name, (_, wanted) in good.items()}, nan_ok=True)
    assert columns(results(outcome(0, first=2.1)), Slo(first=3.0)).good[0] == 1


def test_shares_count_every_request() -> None:
    found = results(outcome(0, passed=1.0), outcome(1, passed=0.5), outcome(2, **LOST), outcome(3, status="cancelled"))
    assert (of("errors", found), of("cancels", found), of("checks", found)) == (0.25, 0.25, 0.75)
    kinds = trace(4, lambda number: {"kind": "adversarial" if number else "steady"})
    assert of("robustness", found, kinds) == 0.5
    assert math.isnan(of("robustness", found))


def test_long_prompts_are_compared_with_short_ones() -> None:
    found = service(40, each=lambda number: {"gap": 0.2 if number >= 30 else 0.1, "passed": 0.25 if number >= 30 else 0.5})
    assert of("long_context_speed", found) == pytest.approx(2.0)
    assert of("long_context_quality", found) == pytest.approx(0.5)
    same = service(40, each=lambda number: {"prompt_tokens": 7})
    assert math.isnan(of("long_context_speed", same))


def test_what_the_server_says_of_prompts_is_not_its_queue() -> None:
    assert of("queueing_p95", results(outcome(0, first=1.5, prompt_seconds=0.5))) == pytest.approx(1.0)
    assert of("lateness_p95", results(outcome(0, due=0.0, sent=0.25))) == pytest.approx(0.25)


@pytest.mark.parametrize("count", [40, 900])
def test_memory_grows_by_requests_behind_the_first_tenth(count: int) -> None:
    filling = count // 10
    found = [Reading(place + 0.9, 10**9 + min(place, filling) * 10**8 + 5000 * max(0, place - filling)) for place in range(count)]
    run = columns(service(count, each=lambda number: {"first": 0.1, "gap": 0.01}, readings=tuple(found)))
    assert value(run, "memory_growth") == pytest.approx(5000 * 100, rel=0.02)
    assert value(run, "memory_peak") == found[-1].memory
    assert math.isnan(value(columns(service(10, readings=readings(5, None, None))), "memory_growth"))


def test_energy_is_of_the_tokens_that_came_between_readings() -> None:
    found = results(outcome(0, first=1.0, gap=1.0, tokens=10), readings=tuple(Reading(at, None, 7.0 * at) for at in (0.0, 4.5, 9.5)))
    assert of("energy", found) == pytest.approx(9.5 * 7 / 9)


def test_texts_agree_from_their_beginning_where_both_answered_with_temperature_0() -> None:
    ours = ("abcdef", "", "same", "x", "free")
    theirs = ("abcxyz", "", "same", "y", "free")
    left, right = (
        results(*(outcome(number, **{"text": text, **(LOST if number == 3 else {})}) for number, text in enumerate(some)))
        for some in (ours, theirs)
    )
    warm = trace(5, lambda number: {"body": {"messages": [{"role": "user"}], "temperature": 0.7}} if number == 4 else {})
    run = beside(columns(left, trace=warm), columns(right, trace=warm))[1]
    assert list(run.agrees) == pytest.approx([0.5, 1.0, 1.0, math.nan, math.nan], nan_ok=True)
    assert value(run, "same_text") == pytest.approx(2 / 3)
    assert math.isnan(value(beside(columns(left), columns(right))[1], "agreement"))


# ---- intervals -----------------------------------------------------------------------------------------------------------------------


def test_what_is_not_known_says_why_and_is_not_0() -> None:
    found = measure(columns(results(*(outcome(number, **LOST) for number in range(10)))))
    unknown = {name: one.reason for name, one in found.items() if one.estimate is None}
    assert unknown.keys() == METRICS.keys() - {"throughput", "completed", "goodput", "goodput_rate", "lateness_p95", "errors", "cancels"}
    assert all(unknown.values())


def test_few_requests_have_no_interval_and_rare_ones_neither() -> None:
    few = measure(columns(service(5)))["first_token_p50"].estimate
    assert few is not None and few[1:] == (-math.inf, math.inf)  # noqa: PT018
    rare = measure(columns(service(60, each=lambda number: {"passed": 1.0} if number == 30 else {})))["checks"].estimate
    assert rare == (1.0, -math.inf, math.inf)
    start = measure(columns(service(60, cold_start=2.5)))["cold_start"].estimate
    assert start == (2.5, -math.inf, math.inf)


def test_neighbours_that_fail_together_are_less_evidence() -> None:
    def width(fails: Callable[[int], bool]) -> float:
        found = measure(columns(service(120, each=lambda number: LOST if fails(number) else {})))["errors"].estimate
        assert found is not None
        assert found.value == 0.25
        assert found.low <= 0.25 <= found.high
        return found.high - found.low

    assert width(lambda number: number // 5 % 4 == 0) > 1.5 * width(lambda number: number % 4 == 0)


def test_blocks_are_as_long_as_the_queue() -> None:
    assert block_length([columns(service(1000))]) == 32
    crowded = service(1000, each=lambda number: {"first": 50.0})
    assert 45 < block_length([columns(crowded)]) < 52
    assert block_length([columns(service(3))]) == 1


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32))
def test_order_does_not_matter(seed: int) -> None:
    found = service(30, seed, lambda number: LOST if number % 7 == seed % 7 else {}, readings=readings(*range(5, 65, 2)))
    mixed = random.Random(seed).sample(found.outcomes, len(found.outcomes))
    turned = found._replace(outcomes=tuple(mixed), readings=found.readings[::-1])
    assert measure(columns(turned)) == measure(columns(found))


def test_results_that_contradict_themselves_are_refused() -> None:
    for wrong, said in (
        (results(), "no requests"),
        (results(outcome(0), outcome(0)), "request 0 twice"),
        (results(outcome(3)._replace(tokens=(1,))), "request 3 of server has 11 pieces and 1 counts"),
        (results(outcome(5)), "was sent other requests"),
    ):
        with pytest.raises(DataError, match=said):
            columns(wrong, trace=trace(2))


def test_results_belong_to_the_trace_that_was_sent() -> None:
    known = trace(3)
    found = results(outcome(0))._replace(trace=digest(known.requests[:2]), about={"requests": 2})
    assert columns(found, trace=known)
    with pytest.raises(DataError, match="other requests"):
        columns(found._replace(about={"requests": 3}), trace=known)


# ---- every metric prefers the good service -------------------------------------------------------------------------------------------

Changed = Callable[[int], dict[str, Any]]


def _pair(good: Changed, bad: Changed) -> tuple[Results, Results]:
    return service(each=good), service(each=bad)


def _every(share: int, **what: Any) -> Changed:
    return lambda number: what if number % share == 0 else {}


def _checked(passed: float, where: Callable[[int], bool] = lambda number: True) -> Changed:
    return lambda number: {"passed": passed if where(number) else 0.9}


def _watched(memory: Callable[[int], int] = lambda place: 10**9, watts: float = 0.0) -> Results:
    return service(readings=tuple(Reading(float(place), memory(place), watts * place) for place in range(80)))


def _usual(number: int) -> dict[str, Any]:
    return {}


def _adversarial(number: int) -> bool:
    return number % 4 == 0


GOOD_AND_BAD: Mapping[str, tuple[Results, Results]] = {
    "first_token_p50": _pair(_usual, _every(1, first=1.0)),
    "first_token_p95": _pair(_usual, _every(10, first=3.0)),
    "between_tokens_p50": _pair(_usual, _every(1, gap=0.1)),
    "between_tokens_p99": _pair(_usual, _every(20, gap=0.5)),
    "throughput": _pair(_usual, lambda number: {"sent": number * 2.0}),
    "completed": _pair(_usual, _every(3, **LOST)),
    "goodput": _pair(_usual, _every(5, first=4.0)),
    "goodput_rate": _pair(_usual, _every(5, gap=0.4)),
    "queueing_p95": _pair(_every(1, first=0.5, prompt_seconds=0.4), _every(1, first=0.5, prompt_seconds=0.1)),
    "lateness_p95": _pair(_usual, lambda number: {"due": number - 0.2}),
    "long_context_speed": _pair(_usual, lambda number: {"gap": 0.2} if number >= 60 else {}),
    "long_context_quality": _pair(_checked(0.9), _checked(0.3, lambda number: number >= 60)),
    "robustness": _pair(_checked(0.9), _checked(0.2, _adversarial)),
    "checks": _pair(_checked(0.9), _checked(0.6)),
    "errors": _pair(_every(20, **LOST), _every(4, **LOST)),
    "cancels": _pair(_every(20, status="cancelled"), _every(4, status="cancelled")),
    "memory_peak": (_watched(), _watched(lambda place: 2 * 10**9)),
    "memory_growth": (_watched(), _watched(lambda place: 10**9 + place * 10**6)),
    "energy": (_watched(watts=5.0), _watched(watts=9.0)),
    "cold_start": (service(cold_start=3.0), service(cold_start=9.0)),
    "agreement": _pair(_usual, _every(2, text="yet")),
    "same_text": _pair(_usual, _every(2, text="yes!")),
}


def test_every_metric_has_a_good_and_a_bad_service() -> None:
    assert GOOD_AND_BAD.keys() == METRICS.keys()
    assert {one.compared for one in METRICS.values()} == COMPARED.keys()


@pytest.mark.parametrize("name", METRICS)
def test_the_good_service_is_preferred(name: str) -> None:
    kinds = trace(each=lambda number: {"kind": "adversarial" if _adversarial(number) else "steady"})
    good, bad = beside(*(columns(one, trace=kinds) for one in GOOD_AND_BAD[name]))
    left, right = value(good, name), value(bad, name)
    assert left < right if METRICS[name].better == "less" else left > right
    if METRICS[name].compared != "shown":
        kept, gained = (float(retention(name, np.array(one), np.array(other), 1e9)) for one, other in ((left, right), (right, left)))
        assert kept < 0.95 < 1 < gained
    assert float(retention(name, np.array(left), np.array(left), 1e9)) == 1.0


def test_differences_that_nobody_notices_do_not_count() -> None:
    assert float(retention("queueing_p95", np.array(0.0001), np.array(0.003))) == 1.0
    assert float(retention("queueing_p95", np.array(0.01), np.array(0.02))) == 0.5
    assert float(retention("checks", np.array(0.0), np.array(0.0))) == 1.0
    assert float(retention("checks", np.array(0.0), np.array(0.5))) == math.inf
