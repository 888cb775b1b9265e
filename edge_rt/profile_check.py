"""What cannot be true of a device's profile or health, as sentences: plugins get their figures from drivers that say anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from edge_rt.device_profile import Basis, Cores, Health, Profile

FIGURES = ("cores", "memory", "bandwidth", "operations", "storage", "link", "idle_power", "power", "hottest")
"""The fields of a profile that have a basis."""
_COLDEST, _HOTTEST = -60.0, 200.0


def told(profile: Profile) -> list[str]:
    """The figures that a profile has."""
    return [field for field in FIGURES if getattr(profile, field) not in (None, (), {}, 0)]


def profile_faults(profile: Profile) -> Iterator[str]:
    """What cannot be true of a profile, none if all can."""
    if not profile.name:
        yield "it has no name"
    if profile.kind not in ("cpu", "gpu", "npu"):
        yield f"its kind is {profile.kind!r}; it must be cpu, gpu or npu"
    if not profile.cores:
        yield "it has no cores"
    for cores in profile.cores:
        yield from (f"cores {cores.name!r}: {fault}" for fault in _core_faults(cores))
    if not _is_count(profile.memory):
        yield f"memory is {profile.memory!r}; it must be bytes, a whole number above 0"
    yield from (f"bandwidth is told by {key!r} threads" for key in profile.bandwidth if not _is_count(key))
    yield from (f"operations are told of {key!r}; it must be a type in small letters" for key in profile.operations if not _is_name(key))
    for field in ("bandwidth", "operations"):
        rates: Mapping[Any, Any] = getattr(profile, field)
        yield from (f"{field}[{key!r}] is {rate!r}" for key, rate in rates.items() if not _is_rate(rate))
    for field in ("storage", "link", "idle_power", "power"):
        value = getattr(profile, field)
        if value is not None and not _is_rate(value):
            yield f"{field} is {value!r}; it must be above 0, or None where it is not known"
    if profile.hottest is not None and not _is_temperature(profile.hottest):
        yield f"hottest is {profile.hottest!r}; it must be degrees Celsius"
    if _is_rate(profile.idle_power) and _is_rate(profile.power) and profile.idle_power > profile.power:  # type: ignore[operator]
        yield f"it takes {profile.idle_power} W with nothing to do, and {profile.power} W at work"
    yield from (f"{field!r} has a basis and is no figure" for field in profile.basis if field not in FIGURES)
    bases = get_args(Basis)
    yield from (f"the basis of {field} is {basis!r}" for field, basis in profile.basis.items() if basis not in bases)


def _core_faults(cores: Cores) -> Iterator[str]:
    if not cores.name:
        yield "no name"
    if not _is_count(cores.number):
        yield f"there are {cores.number!r} of them"
    if len(set(cores.cpus)) != len(cores.cpus) or (cores.cpus and _is_count(cores.number) and len(cores.cpus) < cores.number):
        yield f"{cores.number} of them are the CPUs {cores.cpus}"
    if cores.clock is not None and not _is_rate(cores.clock):
        yield f"the clock is {cores.clock!r}"
    yield from (f"feature {feature!r} is no name in small letters" for feature in cores.features if not _is_name(feature))
    if not all(_is_count(part) for cache in cores.caches for part in cache):
        yield f"the caches are {cores.caches}"
    if [cache.level for cache in cores.caches] != sorted(cache.level for cache in cores.caches):
        yield "the nearest cache must be first"


def health_faults(health: Health) -> Iterator[str]:
    """What cannot be true of a health, none if all can."""
    if health.temperature is not None and not _is_temperature(health.temperature):
        yield f"temperature is {health.temperature!r}; it must be degrees Celsius, or None where it is not known"
    for field in ("power", "clock", "most"):
        value = getattr(health, field)
        if value is not None and not (_is_number(value) and value >= 0):
            yield f"{field} is {value!r}; it must be 0 or more, or None where it is not known"
    if not isinstance(health.throttled, tuple) or not all(isinstance(reason, str) and reason.strip() for reason in health.throttled):
        yield f"throttled is {health.throttled!r}; it must be a tuple of reasons, () if there is none"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_rate(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value) and value == value.lower()


def _is_temperature(value: Any) -> bool:
    return _is_number(value) and _COLDEST < value < _HOTTEST
