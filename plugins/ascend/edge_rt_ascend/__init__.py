"""Huawei Ascend NPUs: devices ``ascend:0``, ``ascend:1``, ... and the engine ``ggml_cann``, edge-rt's own on ggml's CANN backend."""

from __future__ import annotations

from collections.abc import Iterable

from edge_rt.hooks import Device, EngineFactory, hookimpl
from edge_rt_ascend import second
from edge_rt_ascend.device import npus_in
from edge_rt_ascend.engine import CannFactory

EDGE_RT_API = 1


@hookimpl
def edge_rt_devices() -> Iterable[Device]:
    """One device for each /dev/davinciN; ``ascend:0``, which says what is missing, where there is none."""
    return npus_in()


@hookimpl
def edge_rt_engines() -> Iterable[EngineFactory]:
    """``ggml_cann``; and in place of ``torch`` something that says where that is, as long as edge-rt-mlu is not installed."""
    return [CannFactory(), *second.engines(second.installed)]
