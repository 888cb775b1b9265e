"""What a device is like (its profile) and how it is now (its health), and checks of what plugins report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

# What a device is like, which the compiler plans with, and how it is now, which the governor watches.

Basis = Literal["measured", "simulated", "projected", "unknown"]
"""What a stated capability rests on: run on this hardware, run on a model of it, worked out on paper, or not known."""


class Cache(NamedTuple):
    """A cache for data: its level, its bytes, and how many cores share one."""

    level: int
    size: int
    shared_by: int = 1


class Cores(NamedTuple):
    """Cores of one kind: a cluster of a CPU, or the multiprocessors of a card.

    ``cpus``: the system's numbers of those that may be used, () where there are none. ``features``: as an Offer's. ``clock``: Hz at most.
    ``caches``: nearest first.
    """

    name: str
    number: int
    cpus: tuple[int, ...] = ()
    features: tuple[str, ...] = ()
    clock: float | None = None
    caches: tuple[Cache, ...] = ()


class Profile(NamedTuple):
    """What a device is like. None, or a key that is missing: not known.

    ``cores``: fastest first. ``memory``: bytes that models may use. ``bandwidth``: bytes a second at which all cores together read weights,
    by how many of them read (``{1: 9e9, 4: 12e9}``), from memory that no cache holds. ``operations``: a second, of all cores, where a
    multiplication and an addition are two, by the type that is multiplied: ``int8``, ``f16``, ``f32``. ``storage``: bytes a second read
    from where models lie. ``link``: bytes a second between the host's memory and the device's; None where they are one.
    ``idle_power``, ``power``: watts of the whole board with nothing to do, and with all cores at work. ``hottest``: degrees Celsius from
    which it slows itself down. ``basis`` says of each of these fields what it rests on; what is not there is ``unknown``.
    """

    name: str
    kind: Literal["cpu", "gpu", "npu"]
    cores: tuple[Cores, ...]
    memory: int
    bandwidth: Mapping[int, float] = MappingProxyType({})
    operations: Mapping[str, float] = MappingProxyType({})
    storage: float | None = None
    link: float | None = None
    idle_power: float | None = None
    power: float | None = None
    hottest: float | None = None
    basis: Mapping[str, Basis] = MappingProxyType({})


class Health(NamedTuple):
    """How a device is now. None: it does not say.

    ``temperature``: degrees Celsius, of the hottest place. ``power``: watts. ``clock`` and ``most``: Hz now, and Hz it may have now.
    ``throttled``: why it is slower than it could be, in words for users; () if it is not.
    """

    temperature: float | None = None
    power: float | None = None
    clock: float | None = None
    most: float | None = None
    throttled: tuple[str, ...] = ()


class Limits(NamedTuple):
    """What a device is to be held to: ``power`` in watts, ``celsius`` in degrees, None: no limit. ``health``: how it is now."""

    health: Callable[[], Health]
    power: float | None = None
    celsius: float | None = None


@runtime_checkable
class HasProfile(Protocol):
    """A device that says what it is like."""

    def profile(self) -> Profile:
        """Look, and measure for at most half a second; asked only of a device that made an offer. Raises UserError, NativeError."""
        ...


@runtime_checkable
class TellsHealth(Protocol):
    """A device that says how it is now."""

    def health(self) -> Health:
        """At most ten milliseconds: what takes longer is asked on a thread, and the last answer is given. Never raises."""
        ...


# What cannot be true of a device's profile or health, as sentences: plugins get their figures from drivers that say anything.

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
