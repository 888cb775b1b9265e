"""Whoever asks a driver gets an answer in time, or the last one, or an error; never a hang, and never a thread more for each question."""

from __future__ import annotations

import threading
import time
from itertools import chain, repeat

import pytest

from edge_rt.hardware.system_files import DRIVER_PATIENCE, Latest, Patient


def test_an_answer_and_an_error_come_through() -> None:
    patient = Patient("a driver")
    assert patient.ask(lambda: 7, 1.0) == 7
    with pytest.raises(ValueError, match="no"):
        patient.ask(lambda: int("no"), 1.0)


def test_a_question_that_hangs_is_given_up_and_no_other_is_begun() -> None:
    patient, release, asked = Patient("a driver"), threading.Event(), []

    def hang() -> None:
        asked.append(1)
        release.wait(30)

    for _ in range(3):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"a driver did not answer within 0\.05 s"):
            patient.ask(hang, 0.05)
        assert time.monotonic() - start < 1
    assert len(asked) == 1
    release.set()
    assert patient.ask(lambda: "back", 5.0) == "back"


def test_questions_from_several_threads_are_answered_each() -> None:
    patient, found = Patient("a driver"), []

    def ask(n: int) -> None:
        found.append(patient.ask(lambda: (time.sleep(0.002), n)[1], 10.0))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(20))


def settled(latest: Latest[int], answer: int) -> bool:
    """Whether the answer comes."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        if latest.get() == answer:
            return True
        time.sleep(0.005)
    return False


def test_the_latest_answer_is_kept_for_a_while_and_then_asked_again() -> None:
    answers = iter(range(1, 1000))
    latest = Latest(lambda: next(answers), 0, every=60)
    assert settled(latest, 1)
    assert latest.get() == 1
    latest._every = 0
    assert settled(latest, 3)


def test_a_slow_answer_is_not_waited_for() -> None:
    release = threading.Event()
    latest = Latest(lambda: 5 if release.wait(30) else 6, 0, every=60)
    start = time.monotonic()
    assert [latest.get() for _ in range(3)] == [0, 0, 0]
    assert time.monotonic() - start < 3 * DRIVER_PATIENCE + 0.5
    release.set()
    assert settled(latest, 5)


def test_what_is_raised_counts_as_no_answer() -> None:
    answers = chain(["1"], repeat("no"))
    latest = Latest(lambda: int(next(answers)), 0, every=60)
    assert settled(latest, 1)
    latest._every = 0
    assert settled(latest, 0)
