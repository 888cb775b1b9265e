"""Devices ``ascend:N`` keep what is asked of all devices: with simulated drivers, and with what is here."""

from __future__ import annotations

from pathlib import Path

import pytest
from edge_rt_ascend.device import AscendDevice
from edge_rt_ascend.npu_smi import NpuSmi
from test_ascend_device import FIXTURES, device, machine

from edge_rt.testing.conformance import DeviceConformance


class TestSimulated(DeviceConformance):
    fixture = "910b3.txt"

    @pytest.fixture
    def device(self, tmp_path: Path) -> AscendDevice:
        return device(machine(tmp_path), (FIXTURES / self.fixture).read_text())


class TestInAlarm(TestSimulated):
    fixture = "310p3.txt"


class TestThisMachine(DeviceConformance):
    @pytest.fixture
    def device(self) -> AscendDevice:
        return AscendDevice(0, NpuSmi())
