"""The device suite passes devices that keep the contract, and finds each way to break it; so does what plans with their figures."""

from __future__ import annotations

import math
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_rt.errors import PluginError
from edge_rt.hardware.profile import health_faults, profile_faults
from edge_rt.hooks import Cache, Cores, Health, Offer, Profile, Refusal
from edge_rt.plugin_host.guard import PluginDevice
from edge_rt.testing.conformance import DeviceConformance
from edge_rt.testing.null_device import NullDevice

GOOD = NullDevice().profile()


class Absent:
    name = "absent"

    def probe(self) -> Refusal:
        return Refusal("there is no such card", "plug one in")


class TestAbsent(DeviceConformance):
    @pytest.fixture
    def device(self) -> Absent:
        return Absent()


class Suite(DeviceConformance):
    """Not collected by itself: its name does not begin with Test."""

    probe_seconds = 0.3
    profile_seconds = 0.3


class Device:
    """Keeps the contract, but for what a test gives it."""

    name = "device"

    def __init__(self, **answers: Callable[[], Any]) -> None:
        self._answers = answers

    def probe(self) -> Any:
        return self._answers.get("probe", lambda: Offer(1, "a device", GOOD.memory))()

    def profile(self) -> Any:
        return self._answers.get("profile", lambda: GOOD._replace(name="device"))()

    def health(self) -> Any:
        return self._answers.get("health", Health)()


def passes(test: str, device: Any, capfd: pytest.CaptureFixture[str]) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        given = {"capfd": capfd, "monkeypatch": patch}
        function = getattr(Suite(), test)
        wanted = function.__code__.co_varnames[1 : function.__code__.co_argcount]
        try:
            function(**{name: given.get(name, device) for name in wanted})
        except Exception:
            return False
    return True


TESTS = [name for name in dir(DeviceConformance) if name.startswith("test_")]


@pytest.mark.parametrize("test", TESTS)
def test_a_device_that_keeps_the_contract_passes(test: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert passes(test, Device(), capfd)


class Count:
    """Another answer each time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


def offer(**changes: Any) -> Offer:
    return Offer(1, "a device", GOOD.memory)._replace(**changes)


def after(seconds: float, answer: Any) -> Callable[[], Any]:
    def late() -> Any:
        time.sleep(seconds)
        return answer

    return late


def runs_a_tool() -> Offer:
    subprocess.run(["sh", "-c", "true"], check=True)
    return offer()


def opens_a_file() -> Offer:
    KEPT.append(os.open(os.devnull, os.O_RDONLY))
    return offer()


def starts_a_thread() -> Health:
    thread = threading.Thread(target=time.sleep, args=(2.5,), daemon=True)
    thread.start()
    return Health()


def says_so() -> Offer:
    print("found")
    return offer()


def leaves_a_child() -> Offer:
    KEPT.append(subprocess.Popen(["sleep", "2.5"]))
    return offer()


def writes_a_file() -> Offer:
    Path(f"probed-{time.monotonic_ns()}").touch()
    return offer()


KEPT: list[Any] = []
count = Count()
own = GOOD._replace(name="device")
FAULTS: list[tuple[str, Callable[[], Any], str]] = [
    ("probe", lambda: Refusal("no"), "test_probe_offers_or_refuses"),
    ("probe", lambda: Refusal("", "do"), "test_probe_offers_or_refuses"),
    ("probe", lambda: Refusal("no", "Do it."), "test_probe_offers_or_refuses"),
    ("probe", lambda: None, "test_probe_offers_or_refuses"),
    ("probe", lambda: offer(features=("AVX2",)), "test_probe_offers_or_refuses"),
    ("probe", lambda: offer(score=math.nan), "test_probe_offers_or_refuses"),
    ("probe", lambda: offer(basis="certain"), "test_probe_offers_or_refuses"),
    ("probe", lambda: offer(description=f"{count()} found"), "test_probing_is_quick_repeatable_and_leaves_no_trace"),
    ("probe", lambda: offer(description=f"{count()} found"), "test_probing_on_several_threads_at_once"),
    ("probe", after(0.4, offer()), "test_probing_is_quick_repeatable_and_leaves_no_trace"),
    ("probe", says_so, "test_probing_is_quick_repeatable_and_leaves_no_trace"),
    ("probe", opens_a_file, "test_probing_is_quick_repeatable_and_leaves_no_trace"),
    ("probe", leaves_a_child, "test_probing_is_quick_repeatable_and_leaves_no_trace"),
    ("probe", writes_a_file, "test_probing_is_quick_repeatable_and_leaves_no_trace"),
    ("probe", runs_a_tool, "test_probing_without_tools_and_a_home_offers_or_refuses"),
    ("probe", lambda: offer(description=os.environ["HOME"]), "test_probing_without_tools_and_a_home_offers_or_refuses"),
    ("profile", lambda: own._replace(memory=5), "test_a_profile_says_what_can_be_true"),
    ("profile", lambda: own._replace(name="other"), "test_a_profile_says_what_can_be_true"),
    ("profile", lambda: own._replace(storage=math.inf), "test_a_profile_says_what_can_be_true"),
    ("profile", lambda: own._replace(link=1e9), "test_a_profile_says_what_its_figures_rest_on"),
    ("profile", lambda: own._replace(storage=None), "test_a_profile_says_what_its_figures_rest_on"),
    ("profile", after(0.4, own), "test_a_profile_is_quick_repeatable_and_leaves_no_trace"),
    ("profile", lambda: own._replace(memory=count()), "test_a_profile_is_quick_repeatable_and_leaves_no_trace"),
    ("health", lambda: Health(temperature=-273.0), "test_health_says_what_can_be_true"),
    ("health", lambda: Health(power=1 / 0), "test_health_says_what_can_be_true"),
    ("health", lambda: Health(temperature=float(os.environ["HOME"])), "test_health_says_what_can_be_true"),
    ("health", after(0.02, Health()), "test_health_is_quick_and_leaves_no_trace"),
    ("health", starts_a_thread, "test_health_is_quick_and_leaves_no_trace"),
    ("health", lambda: Health(throttled="hot"), "test_health_on_several_threads_at_once"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("method", "answer", "test"), FAULTS)
def test_the_suite_finds_the_fault(
    method: str,
    answer: Callable[[], Any],
    test: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not passes(test, Device(**{method: answer}), capfd)
    for one in KEPT:
        if isinstance(one, subprocess.Popen):
            one.kill()
            one.wait()
        else:
            os.close(one)
    KEPT.clear()


# ---- figures that cannot be true -------------------------------------------------------------------------------------

CORE = GOOD.cores[0]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"kind": "fpga"}, "its kind is 'fpga'"),
        ({"name": ""}, "it has no name"),
        ({"cores": ()}, "it has no cores"),
        ({"memory": 1e9}, "memory is 1000000000.0"),
        ({"bandwidth": {0: 1e9}}, "bandwidth is told by 0 threads"),
        ({"bandwidth": {1: math.nan}}, r"bandwidth\[1\] is nan"),
        ({"operations": {"INT8": 1e9}}, "operations are told of 'INT8'"),
        ({"operations": {"int8": -1.0}}, r"operations\['int8'\] is -1.0"),
        ({"storage": 0.0}, "storage is 0.0"),
        ({"hottest": 353.0}, "hottest is 353.0"),
        ({"idle_power": 9.0, "power": 5.0}, "it takes 9.0 W with nothing to do, and 5.0 W at work"),
        ({"basis": {"speed": "measured"}}, "'speed' has a basis and is no figure"),
        ({"basis": {"memory": "guessed"}}, "the basis of memory is 'guessed'"),
        ({"cores": (CORE._replace(number=0),)}, "there are 0 of them"),
        ({"cores": (CORE._replace(number=2, cpus=(1,)),)}, r"2 of them are the CPUs \(1,\)"),
        ({"cores": (CORE._replace(cpus=(1, 1)),)}, "are the CPUs"),
        ({"cores": (CORE._replace(clock=0.0),)}, "the clock is 0.0"),
        ({"cores": (CORE._replace(caches=(Cache(2, 4096), Cache(1, 4096))),)}, "the nearest cache must be first"),
        ({"cores": (CORE._replace(caches=(Cache(1, 0),)),)}, "the caches are"),
        ({"cores": (Cores("", 1),)}, "no name"),
    ],
)
def test_a_profile_that_cannot_be_true_names_its_plugin(changes: dict[str, Any], fault: str) -> None:
    device = PluginDevice("cards", Device(profile=lambda: GOOD._replace(**changes)))
    with pytest.raises(PluginError, match=f"plugin cards: the profile of device device cannot be true: .*{fault}"):
        device.profile()
    assert list(profile_faults(GOOD)) == []


@pytest.mark.parametrize(
    ("health", "fault"),
    [
        (Health(temperature=math.nan), "temperature is nan"),
        (Health(power=-1.0), "power is -1.0"),
        (Health(clock="fast"), "clock is 'fast'"),  # type: ignore[arg-type]
        (Health(throttled=("",)), "throttled is"),
    ],
)
def test_a_health_that_cannot_be_true_names_its_plugin(health: Health, fault: str) -> None:
    device = PluginDevice("cards", Device(health=lambda: health))
    with pytest.raises(PluginError, match=f"plugin cards: the health of device device cannot be true: {fault}"):
        device.health()
    assert list(health_faults(Health(45.0, 0.0, 0.0, 1e9, ("hot",)))) == []


def test_what_a_device_cannot_say_is_none_and_what_it_raises_names_its_plugin() -> None:
    assert PluginDevice("cards", Absent()).profile() is None
    assert PluginDevice("cards", Absent()).health() is None
    with pytest.raises(PluginError, match="plugin cards: the profile of device device returned NoneType"):
        PluginDevice("cards", Device(profile=lambda: None)).profile()
    with pytest.raises(PluginError, match="plugin cards: the health of device device raised ZeroDivisionError"):
        PluginDevice("cards", Device(health=lambda: 1 / 0)).health()
    assert isinstance(PluginDevice("null", NullDevice()).profile(), Profile)
