"""Power caps and temperature limits on simulated boards (boards.py): held, without oscillation, at the speed that can be kept up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from boards import Board, Firmware, Mass, Run, best, drive
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.hardware.profile import Health
from edge_rt.power.controller import LEAST, PowerController, ReadingWindow, Setting, reading
from edge_rt.power.thermal import Thermal

RECORDED = Path(__file__).parents[2] / "fixtures" / "pi3b_naked.csv"


def pi(**more: Any) -> Board:
    """A Raspberry Pi 3B without a case, as recorded: it tells half degrees and no power, and keeps its voltage when it throttles."""
    return Board(
        speeds=(1.6, 2.9, 3.7, 4.0), watts=(1.0, 1.5, 2.0, 2.4), rest=1.4, masses=(Mass(7.5, 5), Mass(9.2, 120)), ambient=23,
        firmware=Firmware(80, 0.5), step=0.5, **{"tells_power": False, **more},
    )  # fmt: skip


def phone(**more: Any) -> Board:
    """No fan, a large mass, firmware that cools down for long once it is 48 degrees warm, readings a second late."""
    given = {"late": 1.0, "noise": (0.3, 0.2), **more}
    return Board(
        speeds=(3, 5.5, 7.5, 8.5, 8.75, 8.9), watts=(1.2, 2.4, 3.3, 4.2, 5.0, 5.8), rest=0.9, masses=(Mass(3, 4), Mass(8, 300)), ambient=27,
        firmware=Firmware(48, 0.1, 4.0, 1.0), **given,
    )  # fmt: skip


def pc(**more: Any) -> Board:
    """A desktop that tells power, with noise."""
    given = {"late": 0.3, "noise": (0.8, 0.5), **more}
    return Board(
        speeds=(4, 6.8, 8.8, 10, 11, 11.6, 12, 12.2), watts=(14, 22, 29, 35, 41, 46, 51, 56), rest=9, masses=(Mass(0.25, 2), Mass(0.4, 60)),
        **given,
    )  # fmt: skip


def held(
    board: Board, power: float | None = None, celsius: float | None = None, seconds: float = 420, skip: float = 120
) -> tuple[PowerController, Run]:  # fmt: skip
    sustainer = PowerController(board.health, power=power, celsius=celsius, most=board.threads, clock=lambda: board.now)
    return sustainer, drive(board, sustainer, seconds, skip)


def allowed(board: Board, celsius: float) -> float:
    """Watts at which a board comes to a temperature."""
    return (celsius - board.ambient) / sum(mass.resistance for mass in board.masses)


# ---- power -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [18.0, 30.0, 45.0])
def test_a_cap_is_held_and_most_of_what_it_allows_is_made_of_it(cap: float) -> None:
    board = pc()
    sustainer, run = held(board, power=cap)
    assert run.power == pytest.approx(cap, rel=0.05)
    assert run.minute <= 1.1 * cap
    assert run.rate >= 0.85 * best(pc(), cap)
    found = sustainer.report()
    assert found.problem == ""
    assert found.power == pytest.approx(cap, rel=0.08)
    assert found.tokens_per_second == pytest.approx(run.rate, rel=0.15)


def test_fewer_threads_are_taken_where_they_make_more_of_a_watt() -> None:
    """Memory is the bound of this board from two threads on: the other two heat it for nothing."""
    board = Board(speeds=(5.0, 8.0, 8.2, 8.3), watts=(1.0, 2.0, 3.0, 4.0), rest=2.0)
    _, run = held(board, power=4.0)
    assert run.rate == pytest.approx(8.0, rel=0.05)
    assert run.threads == 2


def test_a_cap_that_is_out_of_reach_changes_nothing() -> None:
    board = pc()
    _, run = held(board, power=100.0)
    assert run.rate == pytest.approx(12.2, rel=0.01)
    assert run.changes == 0


def test_it_settles() -> None:
    _, run = held(pc(noise=(0.0, 0.0), late=0.0), power=30.0, seconds=900, skip=300)
    assert run.changes <= 20  # a try now and then, of a few seconds
    assert run.minute == pytest.approx(30.0, rel=0.05)


def test_readings_that_are_late_and_noisy_cost_little() -> None:
    _, run = held(pc(late=2.5, noise=(4.0, 2.0), seed=3), power=30.0)
    assert run.power == pytest.approx(30.0, rel=0.05)
    assert run.rate >= 0.75 * best(pc(), 30.0)


def test_fixed_threads_stay() -> None:
    board = pc()
    sustainer = PowerController(board.health, power=30.0, celsius=None, most=8, fixed=True, clock=lambda: board.now)
    run = drive(board, sustainer, 300, 60)
    assert run.changes == 0
    assert run.power == pytest.approx(30.0, rel=0.05)


def test_a_bound_is_kept_and_the_cap_with_it() -> None:
    """The thread governor's choice comes first: a neighbour has the other CPUs."""
    board = pc()
    sustainer = PowerController(board.health, power=16.0, celsius=None, most=8, clock=lambda: board.now)

    class Bounded:
        look, took, begins = sustainer.look, sustainer.took, sustainer.begins

        @staticmethod
        def choose(kind: Any, bound: int) -> Setting:
            found = sustainer.choose(kind, 1)
            assert found.threads == 1
            return found

    run = drive(board, Bounded, 300, 60)
    assert run.power == pytest.approx(16.0, rel=0.05)


def test_a_cap_below_what_the_board_draws_at_rest_is_said_to_be_hopeless() -> None:
    board = pc()
    sustainer, run = held(board, power=6.0, seconds=300, skip=60)
    assert any("cannot be held" in one for one in sustainer.news())
    assert "cannot be held" in sustainer.report().problem
    assert run.power < 9 + 0.2 * 56
    assert not sustainer.news(), "it is said once"


# ---- temperature -----------------------------------------------------------------------------------------------------


def recorded() -> list[tuple[float, float]]:
    lines = [line for line in RECORDED.read_text().splitlines() if not line.startswith("#")]
    return [(float(at), float(celsius)) for at, _, celsius in (line.partition(",") for line in lines)]


def test_the_simulated_pi_warms_throttles_and_cools_as_the_recorded_one() -> None:
    board, wrong = pi(), []
    for at, celsius in recorded():
        board.run(at - board.now, 4 if 152.5 <= at < 453 else 0)
        wrong.append(board.temperature - celsius)
    assert math.sqrt(sum(one * one for one in wrong) / len(wrong)) < 2.0
    assert sorted(map(abs, wrong))[int(0.95 * len(wrong))] < 4.0


@pytest.mark.parametrize(("make", "limit"), [(pi, 79.0), (pi, 70.0), (phone, 45.0)])
def test_a_temperature_is_held_and_most_of_what_it_allows_is_made_of_it(make: Any, limit: float) -> None:
    board = make()
    _, run = held(board, celsius=limit, seconds=600, skip=200)
    assert run.first <= 1.05 * limit + 1.0
    assert run.hottest <= limit + 0.5
    assert run.throttled == 0.0
    fresh = make()
    assert run.rate >= 0.85 * best(fresh, allowed(fresh, limit - 1))


@pytest.mark.parametrize("make", [pi, phone])
def test_it_is_no_slower_than_burst_and_throttle(make: Any) -> None:
    """At a limit just below the temperature at which the firmware throttles, on boards whose voltage stays."""
    above = make().firmware.above
    _, run = held(make(), celsius=above - 0.5, seconds=900, skip=400)
    burst = drive(make(), None, 1200, 400)
    assert burst.throttled > 0.5, "the board throttles when it is let"
    assert run.throttled < 0.05
    assert run.rate >= 0.95 * burst.rate


def test_a_board_that_throttles_lower_than_asked_is_kept_below_that() -> None:
    board = pi()
    sustainer, run = held(board, celsius=95.0, seconds=800, skip=300)
    assert run.throttled < 0.1
    assert sustainer.report().throttled < 0.1


def test_throttling_that_no_temperature_explains_makes_it_careful() -> None:
    """Such as a power supply that is too weak; the cap alone would let it go on."""
    board = pc()

    def health() -> Health:
        return board.health()._replace(throttled=("under-voltage",) if board.power > 40 else ())

    sustainer = PowerController(health, power=80.0, celsius=None, most=8, clock=lambda: board.now)
    drive(board, sustainer, 200, 60)
    assert sustainer.choose("decode", 8) != Setting(8, 1.0)


def test_both_limits_are_held() -> None:
    board = phone()
    _, run = held(board, power=1.4, celsius=45.0, seconds=600, skip=200)
    assert run.power <= 1.05 * 1.4
    assert board.temperature <= 45.5


# ---- readings that are not there -------------------------------------------------------------------------------------


def test_when_readings_vanish_the_last_safe_setting_stays_and_that_is_said() -> None:
    board = pc(gone=(200.0, 400.0))
    sustainer = PowerController(board.health, power=30.0, celsius=None, most=8, clock=lambda: board.now)
    drive(board, sustainer, 210, 60)
    said = sustainer.news()
    assert len(said) == 1
    assert "tells no power any more" in said[0]
    assert "which held the limit" in said[0]
    assert "no power" in sustainer.report().problem
    blind = drive(board, sustainer, 180, 10)
    assert blind.changes == 0
    assert blind.power <= 1.05 * 30
    after = drive(board, sustainer, 200, 40)
    assert any("again" in one for one in sustainer.news())
    assert after.power == pytest.approx(30.0, rel=0.05)
    assert sustainer.report().problem == ""


def test_without_any_reading_it_is_careful() -> None:
    board = pc(gone=(0.0, 1e9))
    sustainer = PowerController(board.health, power=30.0, celsius=None, most=8, clock=lambda: board.now)
    drive(board, sustainer, 60, 20)
    assert sustainer.choose("decode", 8).threads == 1
    assert "nothing was measured" in sustainer.news()[0]


@pytest.mark.parametrize("nonsense", [-500.0, math.nan, math.inf, 1e7])
def test_nonsense_is_no_reading(nonsense: float) -> None:
    assert reading(Health(temperature=nonsense, power=nonsense), 1e5, 0.0, True)[:2] == (None, None)


def test_a_reading_that_jumps_moves_nothing() -> None:
    """A counter of energy that wraps gives one absurd power."""
    board, looks = pc(), 0

    def health() -> Health:
        nonlocal looks
        looks += 1
        found = board.health()
        return found._replace(power=9000.0) if looks % 40 == 0 else found

    sustainer = PowerController(health, power=30.0, celsius=None, most=8, clock=lambda: board.now)
    run = drive(board, sustainer, 400, 120)
    assert run.power == pytest.approx(30.0, rel=0.06)


def test_a_pause_between_requests_is_no_rest_to_learn_from() -> None:
    board = pc()
    sustainer = PowerController(board.health, power=30.0, celsius=None, most=8, clock=lambda: board.now)
    drive(board, sustainer, 120, 30)
    board.run(600, 0)
    run = drive(board, sustainer, 120, 30)
    assert run.power == pytest.approx(30.0, rel=0.07)


# ---- any board -------------------------------------------------------------------------------------------------------


@st.composite
def boards(draw: st.DrawFn) -> Board:
    """Boards of one to eight threads, of which each adds less speed than the one before, with one to three thermal masses."""
    threads = draw(st.integers(1, 8))
    core, uncore, rest = draw(st.floats(0.5, 8)), draw(st.floats(0.1, 4)), draw(st.floats(0.5, 10))
    less, first = draw(st.floats(0.4, 1.0)), draw(st.floats(1.0, 10.0))
    constants = draw(st.sampled_from([(60.0,), (3.0, 90.0), (2.0, 20.0, 250.0)]))
    masses = [Mass(draw(st.floats(0.3, 4)) / core, seconds) for seconds in constants]
    return Board(
        speeds=[first * sum(less**i for i in range(n + 1)) for n in range(threads)],
        watts=[uncore + core * (n + 1) for n in range(threads)],
        rest=rest, masses=masses, noise=(draw(st.floats(0, 0.05)) * core, draw(st.floats(0, 0.4))), late=draw(st.floats(0, 2)),
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=8, deadline=None)
@given(boards(), st.floats(0.25, 0.9))
def test_any_board_is_held_to_a_power_cap(board: Board, share: float) -> None:
    cap = board.rest + share * board.watts[-1]
    most = best(board, cap)
    _, run = held(board, power=cap, seconds=400, skip=150)
    assert run.power <= 1.05 * cap
    assert run.rate >= 0.7 * most


@settings(max_examples=8, deadline=None)
@given(boards(), st.floats(0.3, 0.9))
def test_any_board_is_held_to_a_temperature(board: Board, share: float) -> None:
    resistance = sum(mass.resistance for mass in board.masses)
    limit = board.temperature + share * resistance * board.watts[-1] + 1.0
    _, run = held(board, celsius=limit, seconds=600, skip=200)
    assert run.hottest <= limit + max(1.5, 0.05 * limit)
    assert board.temperature <= limit + 1.0


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_the_thermal_model_finds_the_heat_that_comes_to_a_temperature() -> None:
    board, model = Board(speeds=(1.0,), watts=(5.0,), rest=0.0, masses=(Mass(4.0, 30.0), Mass(2.0, 3.0))), Thermal(10.0)
    for n in range(120):
        work = 1 if n % 20 < 10 else 0
        before = board.temperature
        board.run(2.5, work)
        model.passed(2.5, 5.0 * work, (before + board.temperature) / 2)
    board.run(600, 0)
    model.passed(600, 0.0, None)
    assert model.heat_for(25.0 + 0.75 * 6.0 * 5.0, 600) == pytest.approx(3.75, rel=0.15)


def test_a_sensor_of_the_moment_is_put_right_by_how_often_steps_were_met() -> None:
    window = ReadingWindow(0.0)
    window.step("decode", 2, 3.0, 10, 10.0)  # three of ten seconds
    for power, computing in [(12.0, True), (12.0, True), (12.0, True), (2.0, False)]:
        window.look(reading(Health(power=power), 1e5, 0.0, computing))
    assert window.power(10.0) == pytest.approx(0.3 * 12 + 0.7 * 2)


def test_a_duty_is_never_nothing() -> None:
    board = pc()
    sustainer, _ = held(board, power=5.0, seconds=60, skip=10)
    assert sustainer.choose("prompt", 8).duty >= LEAST
