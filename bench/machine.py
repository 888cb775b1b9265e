"""What the figures were measured on, without naming the machine."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from edge_rt.config import available_cpus


def describe() -> dict[str, str]:
    """CPU model, CPUs, memory, and versions of what was compared."""
    from edge_rt.native import ggml

    return {
        "CPU": _cpu(),
        "CPUs used": str(available_cpus()),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "edge-rt": importlib.metadata.version("edge-rt"),
        "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
        "ggml": ggml.c.version().decode(),
        "CPU features used": ", ".join(ggml.ggml_features()),
    }


def _cpu() -> str:
    """The model's name as the kernel gives it."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _memory() -> str:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal:"):
            return f"{int(line.split()[1]) / 2**20:.0f} GiB"
    return "unknown"


def _lines(path: str) -> list[str]:
    where = Path(path)
    return where.read_text().splitlines() if where.exists() else []
