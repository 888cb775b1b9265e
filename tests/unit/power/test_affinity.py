"""A computation that is kept on some CPUs, and who else must not notice."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from edge_rt.native.memory import Affinity, fitting
from edge_rt.power.governor import read_cpus

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux says where a thread may run")


def of_a_new_thread() -> set[int]:
    found: list[set[int]] = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    return found[0]


def test_threads_started_meanwhile_stay_there_and_the_caller_returns() -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    affinity = Affinity(one)
    for _ in range(2):
        with affinity:
            assert os.sched_getaffinity(0) == one
            assert of_a_new_thread() == one
        assert os.sched_getaffinity(0) == before
        assert of_a_new_thread() == before


def test_after_an_error_the_caller_returns_too() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), Affinity({min(before)}):
        _ = 1 // 0
    assert os.sched_getaffinity(0) == before


def test_without_cpus_and_with_cpus_that_are_gone_nothing_changes() -> None:
    before = os.sched_getaffinity(0)
    for cpus in ((), (1023,)):
        with Affinity(cpus):
            assert os.sched_getaffinity(0) == before
        assert os.sched_getaffinity(0) == before


def test_what_fits() -> None:
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    assert fitting(allowed, None) == fitting(allowed, len(allowed)) == allowed
    assert fitting(allowed, len(allowed) + 1) == (), "more threads than CPUs: the user knows better"
    assert fitting((*allowed, 1023), None) == (), "not all of them are ours"
    assert fitting((), None) == fitting((), 3) == ()


def test_the_governor_looks_at_these_cpus_alone() -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("there is no /proc/stat")
    one = (min(os.sched_getaffinity(0)),)
    every, alone = read_cpus(), read_cpus(one)
    assert every is not None
    assert alone is not None
    assert 0 < alone.everyone <= read_cpus().everyone  # type: ignore[union-attr]
    if len(os.sched_getaffinity(0)) > 1:
        assert alone.everyone < every.everyone
