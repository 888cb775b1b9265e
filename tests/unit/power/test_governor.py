"""The governor over recorded readings: it leaves CPUs to those who use them and takes them back."""

from __future__ import annotations

import threading
import time

import pytest

from edge_rt.power import governor
from edge_rt.power.governor import Governor, Reading


class Machine:
    """A machine with a clock of its own: ``others`` CPUs are busy with others, ``ours`` with us; ``wanting`` threads of ours wait."""

    def __init__(self) -> None:
        self.now, self.everyone, self.ourselves, self.delay = 100.0, 0.0, 0.0, 1.0
        self.others, self.ours, self.wanting = 0.0, 0.0, 0.0

    def read(self) -> Reading:
        return Reading(self.now, self.everyone, self.ourselves)

    def waiting(self) -> dict[int, float] | None:
        """What the threads waited, as the kernel counts it."""
        return {1: 0.25 * self.delay, 2: 0.75 * self.delay}

    def run(self, seconds: float) -> None:
        self.now += seconds
        self.ourselves += self.ours * seconds
        self.everyone += (self.ours + self.others) * seconds
        self.delay += self.wanting * seconds


def unfelt() -> None:
    """Of a kernel that does not count what threads wait."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(time, "monotonic", lambda: machine.now)
    return machine


def test_an_idle_machine_is_used_whole(machine: Machine) -> None:
    chooser = Governor(4, machine.read, unfelt)
    for _ in range(20):
        machine.ours = chooser.threads()
        machine.run(0.1)
    assert chooser.threads() == 4


@pytest.mark.parametrize(("others", "threads"), [(1.0, 3), (2.2, 2), (4.0, 1), (9.0, 1)])
def test_cpus_others_use_are_left_to_them_within_a_second_and_taken_back(machine: Machine, others: float, threads: int) -> None:
    chooser = Governor(4, machine.read, unfelt)
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


@pytest.mark.parametrize("felt", [True, False])
@pytest.mark.parametrize(
    ("alone", "beside", "single"), [(0.007, 0.0135, 0.0095), (0.0125, 0.026, 0.018), (0.0125, 0.3, 0.019), (0.05, 0.11, 0.08)]
)
def test_a_neighbour_that_comes_or_goes_is_noticed_within_ten_tokens(
    machine: Machine, alone: float, beside: float, single: float, felt: bool
) -> None:
    """Seconds of a token: alone with two threads, beside a neighbour with two, and with one."""
    chooser = Governor(2, machine.read, machine.waiting if felt else unfelt)

    def token() -> int:
        threads = chooser.threads()
        machine.ours = threads if not machine.others else min(threads, 1.5 if threads == 2 else 1)
        machine.wanting = 0.5 if threads == 2 and machine.others else 0.0
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


def test_a_neighbour_on_every_cpu_leaves_one_thread(machine: Machine) -> None:
    """A second program with as many threads as there are CPUs: each CPU is shared, and a thread more would wait for its share."""
    chooser = Governor(4, machine.read, machine.waiting)
    for _ in range(100):
        threads = chooser.threads()
        machine.ours, machine.others = 4 * threads / (threads + 4), 16 / (threads + 4)
        machine.wanting = threads - machine.ours
        machine.run(0.02)
    assert chooser.threads() == 1


def test_little_waiting_changes_nothing(machine: Machine) -> None:
    """The system's own short work: a thread less would cost more."""
    chooser = Governor(4, machine.read, machine.waiting)
    machine.ours, machine.wanting, machine.others = 4.0, 0.9 * governor.WAITED, 0.1
    for _ in range(100):
        assert chooser.threads() == 4
        machine.run(0.01)


def test_what_one_thread_waited_does_not_count_against_two(machine: Machine) -> None:
    """Beside others on every CPU the one thread waits; when they are gone, that is over."""
    chooser = Governor(2, machine.read, machine.waiting)
    machine.others = 2.0
    for _ in range(30):
        machine.ours = machine.wanting = 0.5
        chooser.threads()
        machine.run(0.02)
    assert chooser.threads() == 1
    machine.others, machine.wanting, machine.ours = 0.0, 0.0, 1.0
    seen = []
    for _ in range(50):
        seen.append(chooser.threads())
        machine.run(0.01)
    assert seen == [1] * seen.index(2) + [2] * (50 - seen.index(2))


def test_a_neighbour_that_comes_again_and_again_is_believed_less_to_be_gone(machine: Machine) -> None:
    """Busy for 80 ms of every 160: without patience every pause would give threads back that have to be taken again."""
    chooser = Governor(2, machine.read, machine.waiting)
    changes, last = 0, 2
    for step in range(2000):
        machine.others = 1.0 if step % 16 < 8 else 0.0
        threads = chooser.threads()
        changes, last = changes + (threads != last), threads
        machine.ours, machine.wanting = (1.5, 0.5) if threads == 2 and machine.others else (threads, 0.0)
        machine.run(0.01)
    assert changes < 30, "of 125 pauses"


def test_counters_in_hundredths_make_no_neighbour(machine: Machine) -> None:
    """As the kernel counts: what is used is rounded down to 10 ms for each CPU, at other moments for each."""

    def rounded() -> Reading:
        found = machine.read()
        ticks = sum(int((found.everyone / 2 + shift) * 100) / 100 for shift in (0.0, 0.004))
        return found._replace(everyone=ticks)

    chooser = Governor(2, rounded, unfelt)
    for _ in range(400):
        machine.ours = chooser.threads()
        assert machine.ours == 2
        machine.run(0.0125)


def test_one_short_burst_changes_nothing(machine: Machine) -> None:
    """A hundredth of a second of something else: no thread is given up for it."""
    chooser = Governor(8, machine.read, machine.waiting)
    for step in range(100):
        machine.others = machine.wanting = 0.8 if step == 50 else 0.0
        machine.ours = 8.0 - machine.others
        machine.run(0.01)
        assert chooser.threads() == 8


def test_one_long_slow_step_counts_fully(machine: Machine) -> None:
    """A step that took seconds beside a neighbour says enough: the next one already runs on what is free."""
    chooser = Governor(2, machine.read, unfelt)
    machine.others, machine.ours = 1.0, 1.0
    machine.run(3.0)
    assert chooser.threads() == 1


def test_with_all_threads_it_seldom_looks(machine: Machine) -> None:
    looks = []
    chooser = Governor(2, lambda: looks.append(1) or machine.read(), machine.waiting)  # type: ignore[func-returns-value]
    for _ in range(100):
        machine.run(governor.SELDOM / 50)
        chooser.threads()
    assert len(looks) <= 4


def test_without_proc_stat_all_threads_are_used(machine: Machine) -> None:
    chooser = Governor(4, lambda: None, machine.waiting)
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


def test_waiting_on_this_machine_can_be_read() -> None:
    found = governor.read_waiting()
    if found is None:
        pytest.skip("this kernel does not count what threads wait")
    assert threading.get_native_id() in found
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        assert other.native_id not in (governor.read_waiting() or {}), "threads of Python's own do not compute"
    finally:
        over.set()
        other.join()
