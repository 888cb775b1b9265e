"""The CPU's profile, and how it is now: temperature, power, clock, and why it is slowed down, from the files of Linux."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.config import available_cpus, models_dir, packed_dir
from edge_rt.hardware.profile import Cache, Cores, Health, Profile
from edge_rt.hardware.system_files import Latest, matching, read_system_int, read_system_text, system_folders
from edge_rt.hardware.topology import board_name, cpu_topology

if TYPE_CHECKING:
    from edge_rt.hardware.profile import Basis

# How the CPU is now: temperature, power, clock, and why it is slowed down, from the files of Linux; nothing where there are none.
#
# Files as documented in the kernel's Documentation/driver-api/thermal/sysfs-api.rst, hwmon/sysfs-interface.rst, power/powercap/powercap.rst
# and ABI/testing/sysfs-devices-system-cpu.

CPU_ZONES = ("cpu", "x86_pkg_temp", "soc", "coretemp", "big", "little", "mid", "apc", "acpitz")
"""How the names of thermal zones begin that are near the CPU."""
_CPU_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal", "scpi_sensors")
_BOARD_METERS = ("ina", "power_meter", "macsmc")
"""How the names of hwmon chips begin that measure what the whole board takes."""
_COOLING = ("processor", "cpufreq", "thermal-cpufreq", "thermal-cluster", "cpu-hotplug", "intel_powerclamp")
"""How the names of cooling devices begin that slow the CPU down, unlike fans."""
_PI_BITS = {
    0: "the supply voltage is too low; use a stronger power supply",
    1: "the firmware limits the clock",
    2: "the firmware slows the CPU down",
    3: "it is so warm that the firmware limits the clock; cool it better",
}
"""Of get_throttled, see `vcgencmd get_throttled` in raspberrypi.com/documentation/computers/os.html; bits from 16 on are of the past."""
_COUNTERS = {
    "thermal_throttle/core_throttle_count": "it was too hot and slowed down",
    "thermal_throttle/package_throttle_count": "it was too hot and slowed down",
    "thermal_throttle/package_power_limit_count": "it reached its power limit",
}
"""Files of a CPU that count events since the system started."""
_CAPPED = 0.95
"""A limit above this share of the highest clock is none."""
_SHORTEST = 0.002
"""Seconds between two readings of an energy counter that tell the power: it moves about once a millisecond."""
_MOST_CPUS = 8
_PLAUSIBLE = (-40.0, 150.0)


class _Counts(NamedTuple):
    """Counters at one time: microjoules of each package, and events."""

    at: float
    energy: dict[Path, int]
    events: dict[Path, int]


class CpuSensors:
    """The sensors near the CPU. What is where is looked up once, when it is first asked; counters are told by their change since the last
    call, so that a first one knows nothing of them."""

    def __init__(self, root: Path = Path("/")) -> None:
        """``root``: of a recorded tree."""
        self._root = root
        self._found: _Files | None = None
        self._last: _Counts | None = None
        self._power: float | None = None
        self._latest = Latest(self._read, Health(), every=0.0)

    def health(self) -> Health:
        """What the sensors say; what they said before if they take longer than ``Latest`` waits. Never raises."""
        return self._latest.get()

    def _read(self) -> Health:
        if self._found is None:
            self._found = _find(self._root)
        return self._now(self._found)

    def _now(self, files: _Files) -> Health:
        before, counts = self._last, _count(files)
        if before is None or counts.at - before.at >= _SHORTEST:
            self._power = None if before is None else _package_power(before, counts)
            self._last = counts
        clock, most, highest = (_fastest(files.clocks, name) for name in ("scaling_cur_freq", "scaling_max_freq", "cpuinfo_max_freq"))
        reasons = [*_firmware_reasons(files), *_cooling_reasons(files), *_events(before, counts)]
        if not reasons and most is not None and highest is not None and most < _CAPPED * highest:
            reasons.append(f"the system allows a clock of {most / 1e9:.2g} GHz of {highest / 1e9:.2g} GHz")
        board = _board_power(files)
        return Health(
            temperature=max(_temperatures(files), default=None),
            power=board if board is not None else self._power,
            clock=clock,
            most=most,
            throttled=tuple(dict.fromkeys(reasons)),
        )


class _Files(NamedTuple):
    """Where to read, found once. ``meters``: microwatts. ``batteries``: folders. ``clocks``: cpufreq folders of the fastest cluster."""

    temperatures: tuple[Path, ...]
    meters: tuple[Path, ...]
    batteries: tuple[Path, ...]
    packages: tuple[Path, ...]
    clocks: tuple[Path, ...]
    cooling: tuple[Path, ...]
    firmware: tuple[Path, ...]
    counters: tuple[Path, ...]


def _find(root: Path) -> _Files:
    sys = root / "sys"
    zones = {zone: (read_system_text(zone / "type") or "").lower() for zone in system_folders(sys / "class/thermal", "thermal_zone")}
    near = [zone for zone, kind in zones.items() if kind.startswith(CPU_ZONES)] or list(zones)
    chips = {chip: (read_system_text(chip / "name") or "").lower() for chip in system_folders(sys / "class/hwmon", "hwmon")}
    sensors = [path for chip, name in chips.items() if name in _CPU_CHIPS for path in matching(chip, "temp*_input")]
    clusters = cpu_topology(root)
    cpus = [sys / f"devices/system/cpu/cpu{n}" for n in (clusters[0].cpus if clusters else ())]
    coolers = system_folders(sys / "class/thermal", "cooling_device")
    supplies = matching(sys / "class/power_supply", "*")
    return _Files(
        temperatures=(*(zone / "temp" for zone in near), *sensors),
        meters=tuple(path for chip, name in chips.items() if name.startswith(_BOARD_METERS) for path in _meters(chip)),
        batteries=tuple(path for path in supplies if read_system_text(path / "type") == "Battery"),
        packages=tuple(path for path in system_folders(sys / "class/powercap", "intel-rapl:") if _is_package(path)),
        clocks=tuple(cpu / "cpufreq" for cpu in cpus[:_MOST_CPUS]),
        cooling=tuple(path for path in coolers if (read_system_text(path / "type") or "").lower().startswith(_COOLING)),
        firmware=tuple(matching(sys / "devices/platform", "soc*/soc*firmware/get_throttled")),
        counters=tuple(cpu / name for cpu in cpus[:_MOST_CPUS] for name in _COUNTERS if read_system_int(cpu / name) is not None),
    )


def _is_package(domain: Path) -> bool:
    """Whether a powercap domain is a whole processor (not a part of one, nor its memory, nor "psys", which many boards get wrong)."""
    return (read_system_text(domain / "name") or "").startswith("package")


def _meters(chip: Path) -> list[Path]:
    """The power that a chip measures: now if it can, else an average."""
    return matching(chip, "power*_input") or matching(chip, "power*_average")


def _temperatures(files: _Files) -> Iterator[float]:
    for path in files.temperatures:
        value = read_system_int(path)
        if value is not None and _PLAUSIBLE[0] < value / 1000 < _PLAUSIBLE[1]:  # sensors that are not connected say anything
            yield value / 1000


def _board_power(files: _Files) -> float | None:
    """Watts of the whole board: of its meters, the largest as one is before the others; else of a battery that nobody charges."""
    watts = [value / 1e6 for path in files.meters if (value := read_system_int(path)) is not None and value > 0]
    if watts:
        return max(watts)
    for battery in files.batteries:
        current, voltage = read_system_int(battery / "current_now"), read_system_int(battery / "voltage_now")  # microamperes, microvolts
        if read_system_text(battery / "status") == "Discharging" and current and voltage:
            return abs(current) * voltage / 1e12
    return None


def _package_power(before: _Counts, after: _Counts) -> float | None:
    """Watts of all packages between two readings; None where they cannot be read, which many systems allow to root alone."""
    joules = [_energy(path, before.energy[path], now) for path, now in after.energy.items() if path in before.energy]
    return sum(joules) / (after.at - before.at) if joules else None


def _energy(domain: Path, before: int, after: int) -> float:
    """Joules between two readings of a counter, which may have started anew once."""
    if after < before:
        after += read_system_int(domain / "max_energy_range_uj") or before - after
    return (after - before) / 1e6


def _count(files: _Files) -> _Counts:
    energy = {path: value for path in files.packages if (value := read_system_int(path / "energy_uj")) is not None}
    at = time.monotonic()
    return _Counts(at, energy, {path: value for path in files.counters if (value := read_system_int(path)) is not None})


def _events(before: _Counts | None, after: _Counts) -> Iterator[str]:
    """What happened since the last reading."""
    for path, value in after.events.items():
        if before is not None and value > before.events.get(path, value):
            yield _COUNTERS[f"{path.parent.name}/{path.name}"]


def _fastest(clocks: tuple[Path, ...], name: str) -> float | None:
    """Hz of the fastest of some CPUs, by a file that has kHz."""
    return max((value * 1e3 for path in clocks if (value := read_system_int(path / name))), default=None)


def _firmware_reasons(files: _Files) -> Iterator[str]:
    """What a Raspberry Pi's firmware says: a number in hexadecimal digits, with or without 0x."""
    for path in files.firmware:
        try:
            bits = int(read_system_text(path) or "0", 16)
        except ValueError:
            continue
        yield from (reason for bit, reason in _PI_BITS.items() if bits >> bit & 1)


def _cooling_reasons(files: _Files) -> Iterator[str]:
    for path in files.cooling:
        state, most = read_system_int(path / "cur_state"), read_system_int(path / "max_state")
        if state is not None and state > 0 and most:
            yield f"it is slowed down to cool it ({read_system_text(path / 'type')} at {state} of {most})"


# The profile of a CPU: what its system says of it, and what short measurements show.

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
    from edge_rt.hardware import probe  # only now: it needs the native library

    cores = cpu_topology(root) or (Cores("CPU", available_cpus()),)
    threads = sum(one.number for one in cores)
    storage = probe.storage_bandwidth((models_dir(), packed_dir()) if folders is None else folders)
    limit = slows_down_at(root)
    found = Profile(
        name,
        "cpu",
        cores,
        memory,
        bandwidth=probe.memory_bandwidth(thread_counts(threads), last_level(cores)),
        operations=probe.operations(threads),
        storage=storage,
        hottest=limit if limit is not None else _PI_LIMIT if board_name(root).startswith("Raspberry Pi") else None,
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
    for zone in system_folders(root / "sys/class/thermal", "thermal_zone"):
        if not (read_system_text(zone / "type") or "").lower().startswith(CPU_ZONES):
            continue
        for trip in matching(zone, "trip_point_*_type"):
            at = read_system_int(trip.with_name(trip.name.replace("_type", "_temp")))
            if read_system_text(trip) == "passive" and at is not None:
                found.append(at / 1000)
    if not found:
        for chip in system_folders(root / "sys/class/hwmon", "hwmon"):
            if read_system_text(chip / "name") == "coretemp":
                found += [at / 1000 for path in matching(chip, "temp*_crit") if (at := read_system_int(path)) is not None]
    return min((at for at in found if 30 <= at <= 130), default=None)  # others are placeholders
