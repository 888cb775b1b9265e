"""What a compiled model's plan asks of power and temperature, on devices that tell it and on those that do not."""

from __future__ import annotations

import pytest

from edge_rt.deploy.plan import PowerSetting
from edge_rt.hooks import Health, Offer
from edge_rt.plugin_host.guard import PluginDevice
from edge_rt.power import limits

SETTING = PowerSetting(4.0, 70.0)


class Board:
    """A device that tells what it is given, power only from the second time on, as one that takes differences."""

    name = "board"

    def __init__(self, power: float | None, temperature: float | None) -> None:
        self._power, self._temperature, self._asked = power, temperature, 0

    def probe(self) -> Offer:
        return Offer(1, "a board", 1 << 30)

    def health(self) -> Health:
        self._asked += 1
        return Health(temperature=self._temperature, power=self._power if self._asked > 1 else None)


class Silent:
    """A device that tells nothing."""

    name = "silent"

    def probe(self) -> Offer:
        return Offer(1, "silent", 1 << 30)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PATIENCE", 0.2)


def test_what_the_device_tells_is_held() -> None:
    notices: list[str] = []
    found = limits.planned(PluginDevice("test", Board(2.0, 50.0)), SETTING, notices)
    assert found is not None
    assert (found.power, found.celsius, found.health().temperature) == (4.0, 70.0, 50.0)
    assert notices == []


@pytest.mark.parametrize("device", [Board(None, 50.0), Board(None, None), Silent()])
def test_a_cap_that_cannot_be_held_is_told_and_the_model_runs(device: Board | Silent) -> None:
    notices: list[str] = []
    found = limits.planned(PluginDevice("test", device), SETTING, notices)
    assert notices == [f"the plan's cap of 4 W is not held: the device {device.name} does not tell its power"]
    tells = isinstance(device, Board) and device.health().temperature is not None
    assert (None if found is None else (found.power, found.celsius)) == ((None, 70.0) if tells else None)


def test_a_plan_without_a_cap_waits_for_no_reading() -> None:
    board, notices = Board(None, None), list[str]()
    assert limits.planned(PluginDevice("test", board), PowerSetting(None, 70.0), notices) is None
    assert board._asked == 1
    assert notices == []
