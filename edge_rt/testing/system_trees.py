"""Trees of /sys and /proc of well-known machines, written where a test wants them, for what is given a root directory to read.

They are simulated after public documents, which each names: none is a copy of a real machine's files. Take them as a start: what a test
changes or adds it writes with ``write``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_CPU = "sys/devices/system/cpu"
A53_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
A72_FEATURES = "fp asimd evtstrm crc32 cpuid"
A76_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
X86_FLAGS = "fpu sse4_2 avx f16c fma avx2 avx_vnni"


class Kind(NamedTuple):
    """CPUs of one kind. ``caches``: (level, size, CPUs that share one, side by side). ``mhz``: 0 without cpufreq. ``threads`` of a core."""

    cpus: Sequence[int]
    describe: Mapping[str, str]
    mhz: float = 0
    capacity: int = 0
    caches: Sequence[tuple[int, str, int]] = ()
    threads: int = 1


def write(root: Path, files: Mapping[str, object]) -> Path:
    """Write files (path under the root -> content), making folders; returns the root."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return root


def cpus(root: Path, kinds: Sequence[Kind]) -> Path:
    """Write the CPUs of a machine as Linux shows them: cpuinfo, topology, caches, clocks and capacities."""
    cpuinfo: dict[int, str] = {}
    every = sorted(n for kind in kinds for n in kind.cpus)
    files: dict[str, object] = {f"{_CPU}/online": _list(every), f"{_CPU}/possible": _list(every)}
    for kind in kinds:
        for at, n in enumerate(kind.cpus):
            cpuinfo[n] = "".join(f"{key}\t: {value}\n" for key, value in {"processor": str(n), **kind.describe}.items())
            siblings = kind.cpus[at // kind.threads * kind.threads :][: kind.threads]
            files[f"{_CPU}/cpu{n}/topology/thread_siblings_list"] = _list(siblings)
            if kind.capacity:
                files[f"{_CPU}/cpu{n}/cpu_capacity"] = kind.capacity
            if kind.mhz:
                for name in ("cpuinfo_max_freq", "scaling_max_freq", "scaling_cur_freq"):
                    files[f"{_CPU}/cpu{n}/cpufreq/{name}"] = int(kind.mhz * 1000)
            for index, (level, size, shared) in enumerate(kind.caches):
                # The last level may be shared by CPUs of other kinds as well.
                sharing = kind.cpus[at // shared * shared :][:shared] if shared <= len(kind.cpus) else every
                folder = f"{_CPU}/cpu{n}/cache/index{index}"
                told = {"level": level, "type": "Data" if level == 1 else "Unified", "size": size, "shared_cpu_list": _list(sharing)}
                files.update({f"{folder}/{name}": value for name, value in told.items()})
    files["proc/cpuinfo"] = "\n".join(cpuinfo[n] for n in every)
    return write(root, files)


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def arm(part: int, features: str, implementer: int = 0x41) -> dict[str, str]:
    """What /proc/cpuinfo says of an ARM core."""
    return {"BogoMIPS": "108.00", "Features": features, "CPU implementer": f"{implementer:#x}", "CPU part": f"{part:#x}"}


def x86(model: str, flags: str = X86_FLAGS) -> dict[str, str]:
    """What /proc/cpuinfo says of an x86 processor."""
    return {"vendor_id": "GenuineIntel", "model name": model, "flags": flags}


def raspberry_pi_4(root: Path) -> Path:
    """A Raspberry Pi 4 or CM4: four Cortex-A72 at 1.5 GHz.

    Simulated after "BCM2711 ARM Peripherals" and raspberrypi.com/documentation/computers/processors.html (L1 32 KB, L2 1 MB shared).
    """
    cpus(root, [Kind(range(4), arm(0xD08, A72_FEATURES), 1500, caches=[(1, "32K", 1), (2, "1024K", 4)])])
    return write(root, {"proc/device-tree/model": "Raspberry Pi Compute Module 4 Rev 1.0\0", **thermal_zone(0, "cpu-thermal", 48.3, 110)})


def raspberry_pi_5(root: Path) -> Path:
    """A Raspberry Pi 5: four Cortex-A76 at 2.4 GHz.

    Simulated after raspberrypi.com/documentation/computers/processors.html (BCM2712: L2 512 KB for each core, L3 2 MB shared).
    """
    caches = [(1, "64K", 1), (2, "512K", 1), (3, "2048K", 4)]
    cpus(root, [Kind(range(4), arm(0xD0B, A76_FEATURES), 2400, 1024, caches)])
    return write(root, {"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0", **thermal_zone(0, "cpu-thermal", 55.1, 110)})


def phone(root: Path) -> Path:
    """A phone with three clusters: four Cortex-A55, three Cortex-A78, one Cortex-X1.

    Simulated after Qualcomm's product brief of the Snapdragon 888 (1.8, 2.42, 2.84 GHz) and the cores' technical reference manuals.
    """
    newer = f"{A76_FEATURES} ssbs"
    return cpus(
        root,
        [
            Kind(range(4), arm(0xD05, newer), 1804.8, 230, [(1, "32K", 1), (2, "128K", 1), (3, "4096K", 8)]),
            Kind(range(4, 7), arm(0xD41, newer), 2419.2, 810, [(1, "64K", 1), (2, "512K", 1), (3, "4096K", 8)]),
            Kind([7], arm(0xD44, newer), 2841.6, 1024, [(1, "64K", 1), (2, "1024K", 1), (3, "4096K", 8)]),
        ],
    )


def x86_hybrid(root: Path) -> Path:
    """A desktop with eight performance cores of two threads, two of which clock a little higher, and four efficiency cores.

    Simulated after Intel's specification of the Core i7-12700 (4.9, 4.8 and 3.6 GHz; L2 1.25 MB a core and 2 MB for four; L3 25 MB).
    """
    model = x86("12th Gen Intel(R) Core(TM) i7-12700")
    fast = [(1, "48K", 2), (2, "1280K", 2), (3, "25600K", 20)]
    cpus(
        root,
        [
            Kind(range(12), model, 4800, caches=fast, threads=2),
            Kind(range(12, 16), model, 4900, caches=fast, threads=2),
            Kind(range(16, 20), model, 3600, caches=[(1, "32K", 1), (2, "2048K", 4), (3, "25600K", 20)]),
        ],
    )
    return write(root, {"sys/devices/cpu_core/cpus": "0-15", "sys/devices/cpu_atom/cpus": "16-19"})


def virtual_machine(root: Path) -> Path:
    """A virtual machine of two CPUs, without clocks, sensors and power meters.

    Simulated after what KVM shows a guest (Documentation/virt/kvm/x86/cpuid.rst): no cpufreq, and every CPU of the same capacity.
    """
    caches = [(1, "32K", 1), (2, "1024K", 1), (3, "32768K", 2)]
    return cpus(root, [Kind(range(2), x86("AMD EPYC", "fpu fma sse4_2 avx f16c avx2 avx512f avx512_vnni"), 0, 1024, caches)])


def thermal_zone(number: int, kind: str, celsius: float, critical: float, passive: float | None = None) -> dict[str, object]:
    """Files of a thermal zone: its temperature and its trip points."""
    folder = f"sys/class/thermal/thermal_zone{number}"
    files: dict[str, object] = {f"{folder}/type": kind, f"{folder}/temp": round(celsius * 1000)}
    trips = [("critical", critical), *([("passive", passive)] if passive is not None else [])]
    for i, (name, at) in enumerate(trips):
        files.update({f"{folder}/trip_point_{i}_type": name, f"{folder}/trip_point_{i}_temp": round(at * 1000)})
    return files
