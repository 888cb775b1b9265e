"""The device ``cpu``: always there, with the instruction sets its kernels profit from, and the memory this process may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from edge_rt.hooks import Device, Offer, Refusal, available_cpus, hookimpl

EDGE_RT_API = 1

# The kernel's name for a feature -> ours. x86 lists them under "flags", ARM under "Features".
_FEATURES = {
    "sse4_2": "sse4_2",
    "avx": "avx",
    "f16c": "f16c",
    "fma": "fma",
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "neon": "neon",  # 32-bit kernels say neon, 64-bit ones asimd
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}
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


@hookimpl
def edge_rt_devices() -> Iterable[Device]:
    """One device, ``cpu``."""
    return [Cpu()]


def _proc(cpuinfo: Path = Path("/proc/cpuinfo"), board: Path = Path("/proc/device-tree/model")) -> tuple[str, tuple[str, ...]]:
    """(name, features) of the first processor as Linux states them; empty elsewhere."""
    fields: dict[str, str] = {}
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if not line.strip() and "processor" in fields:
                    break  # the first processor is done; reading on takes long on machines with many
                fields.setdefault(key.strip().lower(), value.strip())
    except OSError:
        pass  # not Linux: the caller has other names
    try:
        name = fields.get("model name") or board.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        name = ""
    flags = (fields.get("flags") or fields.get("features") or "").split()
    return name, tuple(dict.fromkeys(_FEATURES[flag] for flag in flags if flag in _FEATURES))


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
