"""The governor over recorded readings: it leaves CPUs to those who use them and takes them back."""

from __future__ import annotations

import time

import pytest

from edge_rt.core.decode import governor
from edge_rt.core.decode.governor import Governor, Reading


class Machine:
    """A machine with a clock of its own: ``others`` CPUs are busy with others, ``ours`` with us."""

    def __init__(self) -> None:
        self.now, self.everyone, self.ourselves = 100.0, 0.0, 0.0
        self.others, self.ours = 0.0, 0.0

    def read(self) -> Reading:
        return Reading(self.now, self.everyone, self.ourselves)

    def run(self, seconds: float) -> None:
        self.now += seconds
        self.ourselves += self.ours * seconds
        self.everyone += (self.ours + self.others) * seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(time, "monotonic", lambda: machine.now)
    return machine


def test_an_idle_machine_is_used_whole(machine: Machine) -> None:
    chooser = Governor(4, machine.read)
    for _ in range(20):
        machine.ours = chooser.threads()
        machine.run(0.1)
    assert chooser.threads() == 4


@pytest.mark.parametrize(("others", "threads"), [(1.0, 3), (2.2, 2), (4.0, 1), (9.0, 1)])
def test_cpus_others_use_are_left_to_them_within_a_second_and_taken_back(machine: Machine, others: float, threads: int) -> None:
    chooser = Governor(4, machine.read)
    machine.others = others
    for _ in range(10):
        machine.run(0.1)
        machine.ours = chooser.threads()
    assert chooser.threads() == threads
    machine.others = 0.0
    for _ in range(15):
        machine.run(0.1)
        machine.ours = chooser.threads()
    assert chooser.threads() == 4


@pytest.mark.parametrize(("alone", "beside", "single"), [(0.0125, 0.026, 0.018), (0.0125, 0.3, 0.019), (0.05, 0.11, 0.08)])
def test_a_neighbour_that_comes_or_goes_is_noticed_within_ten_tokens(machine: Machine, alone: float, beside: float, single: float) -> None:
    """Seconds of a token: alone with two threads, beside a neighbour with two, and with one."""
    chooser = Governor(2, machine.read)

    def token() -> int:
        threads = chooser.threads()
        machine.ours = threads if not machine.others else min(threads, 1.5 if threads == 2 else 1)
        machine.run(single if threads == 1 else beside if machine.others else alone)
        return threads

    for _ in range(50):
        assert token() == 2
    for others, expected in ((1.0, 1), (0.0, 2), (1.0, 1), (0.0, 2)):
        machine.others = others
        needed = next(n for n in range(100) if token() == expected)
        assert needed <= 10
        for _ in range(50):
            assert token() == expected


def test_counters_in_hundredths_make_no_neighbour(machine: Machine) -> None:
    """As the kernel counts: what is used is rounded down to 10 ms for each CPU, at other moments for each."""

    def rounded() -> Reading:
        found = machine.read()
        ticks = sum(int((found.everyone / 2 + shift) * 100) / 100 for shift in (0.0, 0.004))
        return found._replace(everyone=ticks)

    chooser = Governor(2, rounded)
    for _ in range(400):
        machine.ours = chooser.threads()
        assert machine.ours == 2
        machine.run(0.0125)


def test_one_short_burst_changes_little(machine: Machine) -> None:
    chooser = Governor(8, machine.read)
    machine.run(0.2)
    assert chooser.threads() == 8
    machine.others = 1.0
    machine.run(0.1)
    machine.others = 0.0
    machine.run(0.1)
    assert chooser.threads() == 8


def test_one_long_slow_step_counts_fully(machine: Machine) -> None:
    """A step that took seconds beside a neighbour says enough: the next one already runs on what is free."""
    chooser = Governor(2, machine.read)
    machine.others, machine.ours = 1.0, 1.0
    machine.run(3.0)
    assert chooser.threads() == 1


def test_it_looks_no_more_often_than_its_period(machine: Machine) -> None:
    looks = []
    chooser = Governor(2, lambda: looks.append(1) or machine.read())  # type: ignore[func-returns-value]
    for _ in range(100):
        machine.run(governor.PERIOD / 50)
        chooser.threads()
    assert len(looks) <= 4


def test_without_proc_stat_all_threads_are_used(machine: Machine) -> None:
    chooser = Governor(4, lambda: None)
    machine.run(5)
    assert chooser.threads() == 4


def test_this_machine_can_be_read() -> None:
    first = governor.read_cpus()
    if first is None:
        pytest.skip("no /proc/stat here")
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    second = governor.read_cpus()
    assert second is not None
    assert second.ourselves - first.ourselves >= 0.04
    assert second.everyone >= first.everyone
