"""Cambricon MLU cards, and the engine ``torch``, which drives them, Ascend cards as second choice, and the CPU when asked by name.

There is no ggml backend for MLU, so this engine computes with PyTorch and Cambricon's ``torch_mlu``. It fills edge-rt's engine protocol:
sessions, batching, sampling and context policies run on it unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable

from edge_rt.hooks import Device, EngineFactory, hookimpl
from edge_rt_mlu.device import absent, places
from edge_rt_mlu.factory import TorchFactory

EDGE_RT_API = 1


@hookimpl
def edge_rt_devices() -> Iterable[Device]:
    """``mlu:0`` and one more for every card the driver shows; ``ascend:0`` where only edge-rt-ascend is missing to use it."""
    return [*places(), *absent()]


@hookimpl
def edge_rt_engines() -> Iterable[EngineFactory]:
    """One engine, ``torch``."""
    return [TorchFactory()]
