"""The suite for devices; plugin authors get it from edge_rt.testing.conformance."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psutil
import pytest

from edge_rt.hooks import Device, HasProfile, Offer, Refusal, TellsHealth
from edge_rt.profile_check import health_faults, profile_faults, told

_T = TypeVar("_T")
_WARM_UP, _CALLS = 2, 20


class DeviceConformance:
    """Subclass with a fixture ``device``. It passes with and without the hardware, and says which it saw.

    What only some devices can (HasProfile, TellsHealth) is tested of those that can, and only where the hardware is there.
    """

    probe_seconds: ClassVar[float] = 1.0
    profile_seconds: ClassVar[float] = 2.0
    """The contract is half a second; a machine that runs tests is busy."""
    health_seconds: ClassVar[float] = 0.010

    @pytest.fixture
    def device(self) -> Device:
        """The device under test."""
        raise NotImplementedError("define the fixture device in your subclass")

    # ---- probe -------------------------------------------------------------------------------------------------------

    def test_probe_offers_or_refuses(self, device: Device) -> None:
        assert isinstance(device, Device)
        assert device.name
        assert device.name == device.name.strip().lower()
        _check_answer(device.probe())

    def test_probing_is_quick_repeatable_and_leaves_no_trace(self, device: Device, capfd: pytest.CaptureFixture[str]) -> None:
        first = device.probe()
        before = _traces()
        start = time.perf_counter()
        second = device.probe()
        assert time.perf_counter() - start < self.probe_seconds
        assert first == second, "two probes in a row must give equal answers"
        assert _left_behind(before) == []
        assert capfd.readouterr() == ("", "")

    def test_probing_without_tools_and_a_home_offers_or_refuses(self, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
        """A driver's tool that is not on the PATH, or cannot be run, is no reason to raise."""
        _poor_environment(monkeypatch)
        _check_answer(device.probe())

    def test_probing_on_several_threads_at_once(self, device: Device) -> None:
        assert len(set(map(repr, _at_once(device.probe)))) == 1, "threads disturb each other"

    # ---- profile -----------------------------------------------------------------------------------------------------

    def test_a_profile_says_what_can_be_true(self, device: Device) -> None:
        able = _with_profile(device)
        offer, profile = device.probe(), able.profile()
        assert list(profile_faults(profile)) == []
        assert isinstance(offer, Offer)
        assert profile.name == device.name
        assert profile.memory == offer.memory_bytes, "the offer and the profile must agree on the memory"

    def test_a_profile_says_what_its_figures_rest_on(self, device: Device) -> None:
        profile = _with_profile(device).profile()
        assert [figure for figure in told(profile) if figure not in profile.basis] == [], "without a basis"
        assert [figure for figure in profile.basis if figure not in told(profile)] == [], "a basis of what is not told"

    def test_a_profile_is_quick_repeatable_and_leaves_no_trace(self, device: Device, capfd: pytest.CaptureFixture[str]) -> None:
        able = _with_profile(device)
        first = able.profile()
        before = _traces()
        start = time.perf_counter()
        second = able.profile()
        assert time.perf_counter() - start < self.profile_seconds
        # What is measured varies, and may be left out when there was no time for it.
        assert (first.name, first.kind, first.cores, first.memory) == (second.name, second.kind, second.cores, second.memory)
        assert _left_behind(before) == []
        assert capfd.readouterr() == ("", "")

    # ---- health ------------------------------------------------------------------------------------------------------

    def test_health_says_what_can_be_true(self, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
        able = _with_health(device)
        for _ in range(3):  # the first may know nothing of counters
            assert list(health_faults(able.health())) == []
        _poor_environment(monkeypatch)
        assert list(health_faults(able.health())) == []

    def test_health_is_quick_and_leaves_no_trace(self, device: Device, capfd: pytest.CaptureFixture[str]) -> None:
        able = _with_health(device)
        for _ in range(_WARM_UP):
            able.health()
        before = _traces()
        times = []
        for _ in range(_CALLS):
            start = time.perf_counter()
            able.health()
            times.append(time.perf_counter() - start)
        # The quicker ones: on a busy machine any of them may have to wait for its turn.
        assert sorted(times)[_CALLS // 4] < self.health_seconds
        assert _left_behind(before, settle=1.0) == []
        assert capfd.readouterr() == ("", "")

    def test_health_on_several_threads_at_once(self, device: Device) -> None:
        able = _with_health(device)
        assert [fault for health in _at_once(able.health) for fault in health_faults(health)] == []


def _check_answer(answer: object) -> None:
    """An offer or a refusal that has what it must have."""
    if isinstance(answer, Refusal):
        assert answer.reason.strip()
        assert answer.remedy.strip(), "a refusal must say what the user can do"
        assert not answer.remedy.rstrip().endswith("."), "a remedy is a clause, without a full stop"
        return
    assert isinstance(answer, Offer)
    assert math.isfinite(answer.score)
    assert answer.description
    assert answer.memory_bytes > 0
    assert answer.engines
    assert answer.basis in ("measured", "simulated", "projected", "unknown")
    assert all(feature and feature == feature.lower() for feature in answer.features)
    assert len(set(answer.features)) == len(answer.features)


def _with_profile(device: Device) -> HasProfile:
    if isinstance(device.probe(), Refusal):
        pytest.skip(f"device {device.name} is not here: only a device that makes an offer is asked for its profile")
    if not isinstance(device, HasProfile):
        pytest.skip(f"device {device.name} does not say what it is like")
    return device


def _with_health(device: Device) -> TellsHealth:
    if isinstance(device.probe(), Refusal):
        pytest.skip(f"device {device.name} is not here")
    if not isinstance(device, TellsHealth):
        pytest.skip(f"device {device.name} does not say how it is")
    return device


def _poor_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("LC_ALL", "C")


def _traces(settle: float = 0.2) -> dict[str, Any]:
    """What a call could leave behind in this process; it waits a little for threads that are about to end."""
    process, deadline = psutil.Process(), time.monotonic() + settle
    at_first = threading.active_count()
    while at_first > 1 and threading.active_count() >= at_first and time.monotonic() < deadline:
        time.sleep(0.01)
    files = Path("/proc/self/fd")
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "its files": sorted(os.listdir(".")),
        "open files": len(os.listdir(files)) if files.is_dir() else None,
        "threads of Python": threading.active_count(),
        "children": [child.pid for child in process.children()],
    }


def _left_behind(before: dict[str, Any], settle: float = 0.2) -> list[str]:
    """What is there now and was not before, in words. What others leave meanwhile, as threads that end, is no fault of the device."""
    now = _traces(settle)
    found = [what for what in ("environment", "folder", "its files") if now[what] != before[what]]
    found += [what for what in ("open files", "threads of Python") if now[what] is not None and now[what] > before[what]]
    return found + ["children"] * bool(set(now["children"]) - set(before["children"]))


def _at_once(function: Callable[[], _T]) -> list[_T]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda _: function(), range(8)))
