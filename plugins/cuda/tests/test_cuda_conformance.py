"""Devices ``cuda:N`` keep what is asked of all devices: with a simulated driver, with one that is slow, and with what is here."""

from __future__ import annotations

from pathlib import Path

import pytest
from edge_rt_cuda.device import CudaDevice
from edge_rt_cuda.nvml import Nvml
from simulated_nvml import SimulatedNvml, card

from edge_rt.testing.conformance import DeviceConformance


class TestSimulated(DeviceConformance):
    hangs: float = 0.0

    @pytest.fixture
    def device(self, tmp_path: Path) -> CudaDevice:
        (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
        nvml = SimulatedNvml(card(), hangs={"nvmlDeviceGetTemperature": self.hangs})
        return CudaDevice(0, Nvml(nvml), root=tmp_path, backends=lambda: {"cuda"})


class TestSlowSensors(TestSimulated):
    hangs = 0.02


class TestThisMachine(DeviceConformance):
    @pytest.fixture
    def device(self) -> CudaDevice:
        return CudaDevice(0)
