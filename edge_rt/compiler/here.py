"""The target ``auto``: this machine, as its device says that it is, with its kernels measured for one model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from edge_rt import config
from edge_rt.compiler.shape import ModelShape
from edge_rt.compiler.target import AUTO, Efficiency, Target
from edge_rt.device_profile import Cores, HasProfile, Profile
from edge_rt.errors import PluginError
from edge_rt.hooks import Offer

if TYPE_CHECKING:
    from edge_rt.plugin_host.registry import Registry

_STEP = 5e-5
"""Seconds of Python in a step that repeats the last one (measured with 135M: the time of a step less that of its graph)."""
_OPENING, _PROCESS = 0.25, 75_000_000
_ASKED = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4")
_GUESSED = {"int8": 1e11, "f16": 5e10, "f32": 5e10}
"""Of a few GHz and cores; used only for types that were not measured."""
_UNKNOWN = Efficiency(0.1, 0.2)
"""Of a type that was not measured here: the compiler asks about types that a model does not have yet."""


def here(registry: Registry, shape: ModelShape, threads: Iterable[int] = ()) -> Target:
    """This machine for one model, measured with so many threads and with one and all CPUs.

    Raises PluginError, UserError, NativeError, OutOfMemory.
    """
    from edge_rt.compiler.calibrate import calibrated
    from edge_rt.native import libs

    libs.install()
    profile = cpu_profile(registry)
    kernels = calibrated(shape, profile, {1, config.available_cpus(), *threads})
    efficiency = {"other": _UNKNOWN, "attention": _UNKNOWN}
    return Target(
        AUTO, profile.name, profile, efficiency, reading=1.0, node=1e-6, step=_STEP, elements=1e9, opening=_OPENING, process=_PROCESS,
        packed=packed_types(), kernels=kernels,
    )  # fmt: skip


def cpu_profile(registry: Registry) -> Profile:
    """What the device ``cpu`` says of itself, or where it makes no profile what its offer says. Raises PluginError, NativeError."""
    device = registry.devices()["cpu"]
    if isinstance(device, HasProfile) and (found := device.profile()) is not None:
        return found
    offer = registry.probe("cpu")
    if not isinstance(offer, Offer):
        raise PluginError(f"the device cpu makes no offer ({offer.reason}), so there is nothing to plan for; name a target")
    cpus = config.available_cpus()
    cores = Cores(offer.description, cpus, tuple(range(cpus)), offer.features)
    return Profile(offer.description, "cpu", (cores,), offer.memory_bytes, operations=_GUESSED, basis={"memory": "measured"})


def packed_types() -> tuple[str, ...]:
    """Types for which the library has packed kernels here."""
    from edge_rt.compiler.shape import tensor_bytes
    from edge_rt.core.gguf.reader import GGML_TYPES, TensorInfo
    from edge_rt.core.weights.repack import forms

    shape = (1024, 1024)
    asked = {
        f"{name}.weight": TensorInfo(f"{name}.weight", shape, number, name, 0, tensor_bytes(shape, name))
        for number, (name, _, _) in GGML_TYPES.items()
        if name in _ASKED
    }
    return tuple(name.removesuffix(".weight") for name in forms(asked)[0])
