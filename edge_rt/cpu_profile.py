"""The profile of a CPU: what its system says of it, and what short measurements show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.config import available_cpus, models_dir, packed_dir
from edge_rt.cpuinfo import board
from edge_rt.device_profile import Cache, Cores, Profile
from edge_rt.sensors import CPU_ZONES
from edge_rt.system_files import matching, read_int, read_text, subfolders
from edge_rt.topology import cpu_topology

if TYPE_CHECKING:
    from edge_rt.device_profile import Basis

TYPICAL_CACHE = 8 << 20
"""Bytes of last-level cache where the system does not say."""
_PI_LIMIT = 80.0
"""Degrees from which a Raspberry Pi slows its ARM cores down, which no file says: "Frequency management and thermal control", in
raspberrypi.com/documentation/computers/raspberry-pi.html."""


def cpu_profile(name: str, memory: int, *, folders: Sequence[Path] | None = None, root: Path = Path("/")) -> Profile:
    """The profile of the CPU this runs on, as a device ``name`` with ``memory`` bytes; it measures for up to half a second.

    ``folders``: where models lie (None: where edge-rt keeps them), for the speed of storage. ``root``: of a recorded tree, whose cores,
    caches and limits it then has; what is measured is always of this machine. Raises NativeError, OutOfMemory.
    """
    from edge_rt import probing  # only now: it needs the native library

    cores = cpu_topology(root) or (Cores("CPU", available_cpus()),)
    threads = sum(one.number for one in cores)
    storage = probing.storage_bandwidth((models_dir(), packed_dir()) if folders is None else folders)
    limit = slows_down_at(root)
    found = Profile(
        name,
        "cpu",
        cores,
        memory,
        bandwidth=probing.memory_bandwidth(thread_counts(threads), last_level(cores)),
        operations=probing.operations(threads),
        storage=storage,
        hottest=limit if limit is not None else _PI_LIMIT if board(root).startswith("Raspberry Pi") else None,
    )
    basis: dict[str, Basis] = {}
    for field in ("cores", "memory", "bandwidth", "operations", "storage", "hottest"):
        if getattr(found, field):
            basis[field] = "projected" if field == "hottest" and limit is None else "measured"
    return found._replace(basis=basis)


def thread_counts(most: int) -> tuple[int, ...]:
    """The numbers of threads to measure with, the most telling first: all, one, two, the half of all."""
    return tuple(dict.fromkeys(n for n in (most, 1, 2, most // 2) if 1 <= n <= most))


def last_level(cores: Sequence[Cores]) -> int:
    """Bytes of the last-level caches of all clusters together; those that clusters share counted once. TYPICAL_CACHE if none is known."""
    users = Counter[Cache]()
    for one in cores:
        if one.caches:
            users[one.caches[-1]] += one.number
    return sum(cache.size * -(-number // cache.shared_by) for cache, number in users.items()) or TYPICAL_CACHE


def slows_down_at(root: Path = Path("/")) -> float | None:
    """Degrees Celsius from which the CPU is slowed down: the lowest passive trip point of its thermal zones, else the critical temperature
    of Intel's sensors, where they throttle (Documentation/hwmon/coretemp.rst); None where the system does not say."""
    found = []
    for zone in subfolders(root / "sys/class/thermal", "thermal_zone"):
        if not (read_text(zone / "type") or "").lower().startswith(CPU_ZONES):
            continue
        for trip in matching(zone, "trip_point_*_type"):
            at = read_int(trip.with_name(trip.name.replace("_type", "_temp")))
            if read_text(trip) == "passive" and at is not None:
                found.append(at / 1000)
    if not found:
        for chip in subfolders(root / "sys/class/hwmon", "hwmon"):
            if read_text(chip / "name") == "coretemp":
                found += [at / 1000 for path in matching(chip, "temp*_crit") if (at := read_int(path)) is not None]
    return min((at for at in found if 30 <= at <= 130), default=None)  # others are placeholders
