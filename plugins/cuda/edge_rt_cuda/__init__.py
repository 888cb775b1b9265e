"""NVIDIA GPUs: devices ``cuda:0``, ``cuda:1``, ... and the engine ``ggml_cuda``, which is edge-rt's own on ggml's CUDA backend."""

from __future__ import annotations

from collections.abc import Iterable

from edge_rt.hooks import Device, EngineFactory, hookimpl
from edge_rt_cuda.device import cards_in
from edge_rt_cuda.engine import CudaFactory

EDGE_RT_API = 1


@hookimpl
def edge_rt_devices() -> Iterable[Device]:
    """One device a card that the kernel's driver lists; ``cuda:0``, which says what is missing, where it lists none."""
    return cards_in()


@hookimpl
def edge_rt_engines() -> Iterable[EngineFactory]:
    """One engine."""
    return [CudaFactory()]
