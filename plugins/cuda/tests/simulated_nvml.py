"""A stand-in for nvidia-ml-py: the figures of a card, and what goes wrong. Figures of the A10G are said to be, and were not
looked up again, from these public documents:

- name, compute capability 8.6, 24 GB (22,731 MiB usable with ECC), 300 W: `nvidia-smi` on AWS g5 instances as users published it, and
  developer.nvidia.com/cuda-gpus
- 80 multiprocessors, 10,240 FP32 lanes, memory bus of 384 bits, 600 GB/s, 35 TFLOPS (FP32), 70 TFLOPS (FP16), 140 TOPS (INT8): NVIDIA's
  A10G data sheet as quoted on aws.amazon.com/ec2/instance-types/g5; clocks of 1,710 and 6,251 MHz: `nvidia-smi -q`, as published
- slowdown temperature, PCIe link: simulated after those of its sister A10
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

A10G: dict[str, Any] = {
    "nvmlDeviceGetName": "NVIDIA A10G",
    "nvmlDeviceGetPciInfo": SimpleNamespace(busId="00000000:00:1E.0"),
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=22731 << 20, free=22500 << 20, used=231 << 20),
    "nvmlDeviceGetCudaComputeCapability": (8, 6),
    "nvmlDeviceGetNumGpuCores": 10240,
    "nvmlDeviceGetMemoryBusWidth": 384,
    "nvmlDeviceGetMaxClockInfo": {1: 1710, 2: 6251},
    "nvmlDeviceGetClockInfo": {1: 1695, 2: 6251},
    "nvmlDeviceGetEnforcedPowerLimit": 300_000,
    "nvmlDeviceGetPowerUsage": 212_345,
    "nvmlDeviceGetTemperature": {0: 61},
    "nvmlDeviceGetTemperatureThreshold": {1: 95},
    "nvmlDeviceGetMaxPcieLinkGeneration": 4,
    "nvmlDeviceGetMaxPcieLinkWidth": 16,
    "nvmlDeviceGetCurrentClocksEventReasons": 0,
}


class NvmlError(Exception):
    """As pynvml.NVMLError: ``value`` is the code."""

    def __init__(self, value: int) -> None:
        super().__init__(f"code {value}")
        self.value = value


class Error(int):
    """An answer that is raised."""


class SimulatedNvml:
    """Answers as a machine with such cards. ``init``: raised by nvmlInit; ``hangs``: seconds that a call of that name takes."""

    def __init__(self, *cards: dict[str, Any], init: BaseException | None = None, hangs: dict[str, float] | None = None) -> None:
        self.cards, self.init, self.hangs = cards, init, hangs or {}
        self.calls: list[str] = []

    def _called(self, name: str) -> None:
        self.calls.append(name)
        time.sleep(self.hangs.get(name, 0))

    def nvmlInit(self) -> None:
        self._called("nvmlInit")
        if self.init:
            raise self.init

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        self._called("nvmlDeviceGetHandleByIndex")
        if index >= len(self.cards):
            raise NvmlError(2)
        return self.cards[index]

    def __getattr__(self, name: str) -> Any:
        if not any(name in card for card in self.cards):
            raise AttributeError(name)  # a binding older than the function

        def answer(handle: dict[str, Any], *arguments: Any) -> Any:
            self._called(name)
            found = handle[name]
            if isinstance(found, dict):
                if arguments[0] not in found:
                    raise NvmlError(3)
                return found[arguments[0]]
            if isinstance(found, Error):
                raise NvmlError(int(found))
            return found

        return answer


A10G["nvmlDeviceGetMigMode"] = Error(3)


def card(**changes: Any) -> dict[str, Any]:
    """An A10G with other answers: ``card(nvmlDeviceGetName="...")``; None takes a function away."""
    return {name: value for name, value in {**A10G, **changes}.items() if value is not None}
