"""What a device is like, which the compiler plans with, and how it is now, which the governor watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol, runtime_checkable

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
