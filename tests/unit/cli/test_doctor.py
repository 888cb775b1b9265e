"""`edge-rt doctor` on devices: how they are, what they are like if asked, and those that break."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from edge_rt.cli import doctor
from edge_rt.cli.doctor import device_rows, devices
from edge_rt.hardware.profile import Cache, Cores
from edge_rt.hooks import API_VERSION, Health, Offer, Profile, Refusal, hookimpl
from edge_rt.plugin_host.registry import BUILT_INS, Registry
from edge_rt.testing.null_device import NullDevice

HOT = Health(81.25, 6.5, 0.6e9, 1.5e9, ("it is so warm that the firmware limits the clock; cool it better", "another"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = logging.getLogger("edge_rt.plugins").level
    yield
    logging.getLogger("edge_rt.plugins").setLevel(level)  # doctor silences it


class Broken:
    name = "broken"

    def probe(self) -> Offer:
        return Offer(1, "a card", 1 << 30)

    def profile(self) -> Profile:
        raise ZeroDivisionError("no cores")

    def health(self) -> Health:
        return Health(temperature=float("nan"))


class Silent:
    name = "silent"

    def probe(self) -> Offer:
        return Offer(1, "a card", 1 << 30, basis="projected")


class Absent:
    name = "absent"

    def probe(self) -> Refusal:
        return Refusal("there is no such card", "plug one in")


class Plugin:
    EDGE_RT_API = API_VERSION

    def __init__(self, *found: Any) -> None:
        self._found = found

    @hookimpl
    def edge_rt_devices(self) -> list[Any]:
        return list(self._found)


def looked(*found: Any, probe: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    registry = Registry.load(entry_points=False, disabled=BUILT_INS, plugins={"mine": Plugin(*found)}, required=["mine"])
    facts = devices(registry, probe)
    json.dumps(facts, allow_nan=False)
    return facts, [" ".join(f"{name} {text}".split()) for one in facts for name, text in device_rows(one)]


def test_how_it_is_now() -> None:
    facts, shown = looked(NullDevice(state=HOT))
    assert facts[0]["health"] == HOT._asdict()
    assert shown[2:4] == [
        "now 81.2 degrees Celsius, 6.5 W, 0.60 of 1.50 GHz",
        "slowed down it is so warm that the firmware limits the clock; cool it better; another",
    ]
    assert looked(NullDevice())[1][2] == "now its sensors say nothing"


def test_measuring_is_asked_for() -> None:
    facts, shown = looked(NullDevice())
    assert facts[0]["profile"] is facts[0]["profile_error"] is None
    assert shown[3] == "profile edge-rt doctor --probe measures it"


def test_what_it_is_like_with_what_each_figure_rests_on() -> None:
    facts, shown = looked(NullDevice(), probe=True)
    profile = facts[0]["profile"]
    assert profile["bandwidth"] == {"1": 1e9}
    assert profile["cores"][0]["caches"][0] == {"level": 1, "size": 32768, "shared_by": 1}
    assert profile["basis"]["storage"] == "simulated"
    assert profile["basis"]["idle_power"] == profile["basis"]["link"] == "unknown"
    assert shown[3:] == [
        "cores 1 x simulated core at 1.00 GHz, L1 32 KiB, L2 1 MiB (simulated)",
        "memory 1.1 GB (simulated)",
        "bandwidth 1.0 GB/s by 1 thread (simulated)",
        "operations int8 8 Gop/s, f16 4 Gop/s, f32 2 Gop/s (simulated)",
        "storage 100.0 MB/s (simulated)",
        "hottest 80 degrees Celsius (simulated)",
        "unknown idle power, power",
    ]


def test_clusters_have_a_line_each() -> None:
    class Phone:
        name = "phone"

        def probe(self) -> Offer:
            return Offer(1, "a phone", 1 << 30)

        def profile(self) -> Profile:
            big = Cores("Cortex-X1", 1, (7,), (), 2.8416e9, (Cache(3, 4 << 20, 8),))
            return Profile("phone", "gpu", (big, Cores("Cortex-A55", 5, (0, 1, 2, 3, 5))), 1 << 30, link=2e9, power=4.5)

    assert looked(Phone(), probe=True)[1][3:] == [
        "cores 1 x Cortex-X1 at 2.84 GHz, CPUs 7, L3 4 MiB for 8 (unknown)",
        "cores 5 x Cortex-A55, CPUs 0-3,5 (unknown)",
        "memory 1.1 GB (unknown)",
        "link 2.0 GB/s (unknown)",
        "power 4.5 W (unknown)",
        "unknown bandwidth, operations, storage, idle power, hottest",
    ]


def test_a_device_that_breaks_is_shown_with_its_plugin_and_hides_no_other() -> None:
    facts, shown = looked(Broken(), Silent(), Absent(), probe=True)
    assert "plugin mine: the health of device broken cannot be true: temperature is nan" in shown[2]
    assert "plugin mine: the profile of device broken raised ZeroDivisionError: no cores" in shown[3]
    assert facts[0]["health"] is facts[0]["profile"] is None
    assert shown[4:] == [
        "silent a card, 1.1 GB; score 1, projected",
        "engines ggml; features none stated",
        "now it does not say",
        "profile it does not say",
        "absent refused: there is no such card",
        "plug one in",
    ]


def test_the_option_reaches_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def noted(registry: Registry, probe: bool) -> list[dict[str, Any]]:
        asked.append(probe)
        return []

    monkeypatch.setattr(doctor, "devices", noted)
    doctor.facts()
    doctor.facts(probe=True)
    assert asked == [False, True]
