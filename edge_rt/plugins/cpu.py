"""The device ``cpu``: always there, with the instruction sets its kernels profit from, and the memory this process may use.

What it is like is measured by edge_rt/cpu_profile.py, how it is now is read by edge_rt/sensors.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.hooks import Device, Health, Offer, Profile, Refusal, available_cpus, board_name, cpu_processors, hookimpl

if TYPE_CHECKING:
    from edge_rt.hooks import CpuSensors

EDGE_RT_API = 1

# sysctl's names on macOS, under hw.optional.
_MACOS_FEATURES = {
    "AdvSIMD": "neon",
    "arm.FEAT_FP16": "fp16",
    "arm.FEAT_DotProd": "dotprod",
    "arm.FEAT_I8MM": "i8mm",
    "arm.FEAT_BF16": "bf16",
    "arm.FEAT_SME": "sme",
    "avx1_0": "avx",
    "avx2_0": "avx2",
    "fma": "fma",
    "avx512f": "avx512f",
}


class Cpu:
    """The processor edge-rt runs on."""

    name = "cpu"

    def __init__(self) -> None:
        self._sensors: CpuSensors | None = None

    def probe(self) -> Offer | Refusal:
        """Always an offer. Reads a few small files; on macOS it runs sysctl once."""
        model, features = _macos() if sys.platform == "darwin" else _proc()
        if not model:
            import platform  # only now: it costs start-up time, and most systems have said by themselves

            model = platform.processor() or platform.machine()
        cores = available_cpus()
        return Offer(
            score=10,
            description=f"{model}, {cores} {'CPU' if cores == 1 else 'CPUs'}",
            memory_bytes=_memory(),
            features=features,
            engines=("ggml", "llama_cpp", "*"),
            basis="measured",
        )

    def profile(self) -> Profile:
        """The cores, and how fast they read and multiply: takes about half a second of all of them. Raises NativeError, OutOfMemory."""
        from edge_rt.hooks import cpu_profile  # only now: it and the sensors cost start-up time

        return cpu_profile(self.name, _memory())

    def health(self) -> Health:
        """What the sensors of Linux say; elsewhere nothing. Power from counters is known from the second call on."""
        if self._sensors is None:
            from edge_rt.hooks import CpuSensors

            self._sensors = CpuSensors()
        return self._sensors.health()


@hookimpl
def edge_rt_devices() -> Iterable[Device]:
    """One device, ``cpu``."""
    return [Cpu()]


def _proc(root: Path = Path("/")) -> tuple[str, tuple[str, ...]]:
    """(name, features) of the first processor as Linux states them; empty elsewhere."""
    first = next(cpu_processors(root), None)  # reading on takes long on machines with many
    return (first.model or board_name(root), first.features) if first else ("", ())


def _macos() -> tuple[str, tuple[str, ...]]:
    """(name, features) as sysctl states them."""
    import subprocess

    result = subprocess.run(["sysctl", "machdep.cpu.brand_string", "hw.optional"], capture_output=True, text=True, timeout=2, check=False)
    values = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    features = tuple(ours for theirs, ours in _MACOS_FEATURES.items() if values.get(f"hw.optional.{theirs}") == "1")
    return values.get("machdep.cpu.brand_string", ""), features


def _memory(limits: Iterable[Path] = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))) -> int:
    """Bytes this process may use: physical memory, or the cgroup's limit if that is less."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        import psutil  # Windows

        total = int(psutil.virtual_memory().total)
    for path in limits:
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):  # no such cgroup version, or "max"
            continue
    return total
