"""The benchmarks' arithmetic and tables: what they say of the figures must be right. The measuring itself is tried by ``--quick``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.results import OURS, Bound, Result, compare, from_json, load_all, save, to_json
from bench.timing import Spread, interleave, ratios, spread, wait_until_quiet, widest

MACHINE = {"CPU": "a CPU", "CPUs used": "2"}


def test_spread_is_the_inter_quartile_range_over_the_median() -> None:
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2 / 3)
    assert spread([7.0]) == Spread(7.0, 0.0)
    assert spread([0.0, 0.0, 0.0]) == Spread(0.0, 0.0)
    with pytest.raises(ValueError, match="nothing"):
        spread([])


def test_one_disturbed_round_does_not_move_the_median() -> None:
    assert spread([1.0, 1.0, 1.0, 1.0, 50.0]).median == 1.0


def test_ratios_go_round_by_round() -> None:
    """A machine that slows down for both changes no ratio."""
    assert ratios([10.0, 5.0], [5.0, 2.5]) == [2.0, 2.0]
    with pytest.raises(ValueError, match="argument 2"):
        ratios([1.0], [1.0, 2.0])
    assert widest({"a": [10.0, 5.0, 20.0], "b": [5.0, 2.5, 10.0]}) == 0.0
    assert widest({"a": [10.0, 5.0, 20.0]}) > 0.5


def players(log: list[str], **values: Callable[[int], float]) -> dict[str, Callable[[], float]]:
    """Contenders that write down their turns; each is told how often it has been asked."""
    asked = dict.fromkeys(values, -1)

    def turn(name: str) -> float:
        log.append(name)
        asked[name] += 1
        return values[name](asked[name])

    return {name: partial(turn, name) for name in values}


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    log: list[str] = []
    samples = interleave(players(log, a=lambda n: 10.0 + n, b=lambda n: 10.0 + n), rounds=3, most=9, deadline=time.monotonic() + 60)
    assert log == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert samples == {"a": [11.0, 12.0, 13.0], "b": [11.0, 12.0, 13.0]}


def test_a_wide_spread_is_measured_again_up_to_a_limit() -> None:
    log: list[str] = []
    samples = interleave(players(log, a=lambda n: float(n % 2 + 1), b=lambda n: 1.0), rounds=3, most=8, deadline=time.monotonic() + 60)
    assert len(samples["a"]) == 8
    calm = interleave(players(log, a=lambda n: float(n < 2) + 1, b=lambda n: 1.0), rounds=3, most=50, deadline=time.monotonic() + 60)
    assert 3 < len(calm["a"]) < 50


def test_after_the_deadline_two_rounds_are_all() -> None:
    samples = interleave(players([], a=lambda n: 1.0 + n, b=lambda n: 1.0), rounds=5, most=9, deadline=time.monotonic() - 1)
    assert len(samples["a"]) == len(samples["b"]) == 2


def test_a_busy_machine_is_waited_for_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.timing.busy_cpus", lambda: 1.5)
    assert "1.5 CPUs" in (wait_until_quiet(0.0) or "")
    busy = iter([0.9, 0.9, 0.1])
    monkeypatch.setattr("bench.timing.busy_cpus", lambda: next(busy))
    monkeypatch.setattr("bench.timing.time.sleep", lambda _: None)
    assert wait_until_quiet(60.0) is None
    assert list(busy) == []


# ---- judging -----------------------------------------------------------------------------------------------------------


def test_a_result_is_met_only_if_every_bound_holds() -> None:
    samples = {OURS: [30.0, 30.0, 33.0], "default": [10.0, 10.0, 11.0], "best": [31.0, 31.0, 34.1]}
    three, one = Bound("default", "at least", 3.0), Bound("best", "at least", 1.0)
    assert compare("x", "tokens/s", samples, [three]).ok is True
    failed = compare("x", "tokens/s", samples, [three, one])
    assert failed.ok is False
    assert failed.requirement == "≥ 3 × default, ≥ 1 × best"
    assert failed.ratios["best"].median == pytest.approx(30 / 31)
    assert compare("x", "tokens/s", samples).ok is None
    with pytest.raises(KeyError):
        compare("x", "tokens/s", samples, [Bound("nobody", "at least", 1.0)])


def test_less_is_better_where_the_bound_says_so() -> None:
    samples = {OURS: [0.04, 0.04], "default": [1.0, 1.0]}
    assert compare("x", "s", samples, [Bound("default", "at most", 0.05)]).ok is True
    assert compare("x", "s", samples, [Bound("default", "at most", 0.03)]).ok is False


def test_a_spread_that_stayed_wide_is_said() -> None:
    wide = compare("x", "s", {OURS: [1.0, 2.0, 1.0, 2.0], "default": [1.0] * 4})
    assert any("spread" in note for note in wide.notes)
    assert compare("x", "s", {OURS: [1.0] * 4, "default": [1.0] * 4}).notes == []


# ---- files and tables ----------------------------------------------------------------------------------------------------


def stored(name: str = "decode", *, quick: bool = False, machine: dict[str, str] = MACHINE) -> Any:
    samples = {OURS: [30.0, 30.0], "default": [10.0, 10.0]}
    one = compare("decode at 50 cells", "tokens/s", samples, [Bound("default", "at least", 3.0)], ["why"])
    return json.loads(json.dumps(to_json(name, [one], machine, quick=quick, when="2024-05-06T07:08:09+00:00")))


def test_results_come_back_from_json_as_they_were(tmp_path: Path) -> None:
    one = compare("x", "s", {OURS: [1.0, 2.0], "default": [2.0, 2.0]}, [Bound("default", "at most", 0.9)], ["a note"])
    save(tmp_path / "new" / "x.json", to_json("x", [one], MACHINE, quick=False, when="now"))
    found = load_all(tmp_path / "new")
    assert list(found) == ["x"]
    assert from_json(found["x"]) == [one]


def speed(*benchmarks: str) -> report.Page:
    return report.pages(report.Kinds([], [], benchmarks))[0]


def test_each_page_has_its_own_results() -> None:
    results = {"decode": stored(), "pruning": stored("pruning")}
    found = {page.file: report.render(results, page) for page in report.pages(report.Kinds(["pruning"], [], ["decode"]))}
    assert "decode at 50 cells" in found["performance.md"]
    assert found["quality.md"].startswith("# What is left")
    assert "create_chat_completion" not in found["quality.md"]


def test_the_page_shows_every_result_and_what_is_missing() -> None:
    page = report.render({"decode": stored()}, speed("decode", "prefill"))
    assert "| decode at 50 cells | default | 3.00 | 0% | 30.0 tokens/s | 10.0 | ≥ 3 × default | yes |" in page
    assert "Not measured: prefill." in page
    assert "- decode at 50 cells: why" in page
    assert "| CPU | a CPU |" in page
    assert "| measured | 2024-05-06 |" in page


def test_the_page_shows_the_programs_as_they_are() -> None:
    page = report.render({}, speed("decode"))
    assert "Nothing has been measured yet" in page
    assert "create_chat_completion" in page
    assert "llama_model_load_from_file" in page


def test_a_requirement_not_met_stands_out() -> None:
    failed = Result("x", "identical", "tokens", [1.0], ok=False, shown="3 of 200")
    line = report.rows([failed])[1]
    assert line == ["x", "", "", "", "3 of 200", "", "identical", "**no**"]
    assert "FAIL x [identical]\n       3 of 200" in report.plain([failed])


def test_only_the_first_row_of_several_peers_names_the_result() -> None:
    both = compare("x", "s", {OURS: [1.0], "default": [2.0], "best": [1.0]}, [Bound("best", "at most", 1.0)])
    first, second = report.rows([both])[1:]
    assert (first[0], first[1], first[-1]) == ("x", "default", "yes")
    assert (second[0], second[1], second[-1]) == ("", "best", "")


def test_quick_figures_and_mixed_machines_are_not_published() -> None:
    with pytest.raises(ValueError, match="--quick"):
        report.render({"decode": stored(quick=True)}, speed("decode"))
    other = stored("prefill", machine={**MACHINE, "CPUs used": "4"})
    with pytest.raises(ValueError, match="several machines"):
        report.render({"decode": stored(), "prefill": other}, speed("decode", "prefill"))


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.04321, "0.0432"), (1.0, "1.00"), (9.876, "9.88"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_a_bar_in_a_cell_does_not_break_the_table() -> None:
    assert report.table([["a"], ["x|y"]]) == "| a |\n| --- |\n| x\\|y |\n"


def test_an_unknown_benchmark_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.__main__ import BENCHMARKS, main

    assert main(["decoed"]) == 2
    error = capsys.readouterr().err
    assert "decoed" in error
    assert all(name in error for name in BENCHMARKS)
