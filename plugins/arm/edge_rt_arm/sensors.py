"""Temperatures, clocks and what limits them, from thermal zones, cooling devices and cpufreq.

Files as in the kernel's Documentation/driver-api/thermal/sysfs-api.rst and Documentation/admin-guide/pm/cpufreq.rst.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from edge_rt_arm.files import folders, read_int, read_text

_THERMAL = "sys/class/thermal"
_OF_CPU = re.compile(r"cpu|^soc[-_]|^(big|little)core|^(big|mid|little)$", re.IGNORECASE)
"""Types of zones that measure the processor: cpu-thermal (Pi), cpu-1-0-usr and cpuss-0 (Snapdragon), soc-thermal and bigcore0-thermal
(Rockchip), BIG (Tensor). Phones have a hundred others: battery, modem, skin. (Qualcomm's "soc" is the battery's state of charge.)
"""
_PLAUSIBLE = range(1_000, 150_000)
"""Thousandths of a degree: zones of sleeping parts report -273 degrees or nonsense."""
_MOST_ZONES = 32
_COOLS_CPU = re.compile(r"cpufreq|cpu", re.IGNORECASE)
_PASSIVE = ("passive", "hot")


class Clock(NamedTuple):
    """Hz: ``now``, ``most`` it may have now, and ``design``: the most it can have."""

    now: float | None
    most: float | None
    design: float | None


def cpu_zones(root: Path) -> tuple[Path, ...]:
    """The thermal zones of the processor, or the first zone if none says that it is one."""
    zones = folders(root / _THERMAL, "thermal_zone")
    found = [zone for zone in zones if _OF_CPU.search(read_text(zone / "type") or "")]
    return tuple((found or zones[:1])[:_MOST_ZONES])


def temperature(zones: Iterable[Path]) -> float | None:
    """Degrees Celsius of the hottest zone."""
    values = [value for zone in zones if (value := read_int(zone / "temp")) is not None and value in _PLAUSIBLE]
    return max(values) / 1000 if values else None


def slows_at(zones: Iterable[Path]) -> float | None:
    """Degrees Celsius of the lowest trip point from which the kernel slows the processor down; None if no zone has such a point."""
    found = [value for zone in zones for value in _trips(zone) if value in _PLAUSIBLE]
    return min(found) / 1000 if found else None


def _trips(zone: Path) -> Iterator[int]:
    for number in range(16):
        kind = read_text(zone / f"trip_point_{number}_type")
        if kind is None:
            return
        value = read_int(zone / f"trip_point_{number}_temp")
        if kind in _PASSIVE and value is not None:
            yield value


def cooling(root: Path) -> bool:
    """Whether the kernel holds the processor's clock down to cool it."""
    devices = folders(root / _THERMAL, "cooling_device")
    return any(_COOLS_CPU.search(read_text(one / "type") or "") and (read_int(one / "cur_state") or 0) > 0 for one in devices)


def clock(root: Path, cpus: Iterable[int]) -> Clock:
    """Of the fastest of some CPUs."""
    names = ("scaling_cur_freq", "scaling_max_freq", "cpuinfo_max_freq")
    found: list[list[int]] = [[], [], []]
    for cpu in cpus:
        for values, name in zip(found, names, strict=True):
            if value := read_int(root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/{name}"):
                values.append(value)
    now, most, design = (max(values) * 1e3 if values else None for values in found)  # the files count kHz
    return Clock(now, most, design)


def under_voltage(root: Path) -> bool:
    """Whether the kernel's own watch over a Raspberry Pi's supply (hwmon ``rpi_volt``) has its alarm raised."""
    chips = folders(root / "sys/class/hwmon", "hwmon")
    return any(read_text(chip / "name") == "rpi_volt" and read_int(chip / "in0_lcrit_alarm") == 1 for chip in chips)
