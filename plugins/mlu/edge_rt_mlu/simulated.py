"""For tests: a package that teaches PyTorch a kind of device, as torch_mlu and torch_npu do, whose memory is the CPU's.

All goes the way it goes with a card: the package is looked for, tried in a process of its own and imported, and its namespace is asked for
the devices and their memory. Only the arithmetic is the CPU's. The device of apart.py also notices what mixes its tensors with the host's.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

_PACKAGE = """
import torch

calls = []


class Namespace:
    device_count = staticmethod(lambda: {devices})
    synchronize = staticmethod(lambda: calls.append("synchronize"))
    empty_cache = staticmethod(lambda: calls.append("empty_cache"))
    mem_get_info = staticmethod(lambda index: ({free}, 64 << 30))


torch.{kind} = Namespace
"""


def install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, package: str, kind: str, *, devices: int = 2, free: int = 23 << 30, place: str = "cpu"
) -> list[str]:
    """Install it in a folder until the test ends. ``free``: bytes of a device. ``place``: the device of PyTorch's that computes.

    Returns what is asked of the devices, as it comes.
    """
    import torch

    from edge_rt_mlu import adapters, engine

    (folder / f"{package}.py").write_text(_PACKAGE.format(kind=kind, devices=devices, free=free))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
    monkeypatch.setattr(torch, kind, None, raising=False)  # taken away in the end, as is the module
    module = importlib.import_module(package)
    del sys.modules[package]  # it was not there, and that is what is to be restored
    monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setattr(adapters, "tried", functools.lru_cache(adapters.tried.__wrapped__))
    monkeypatch.setattr(engine, "device_of", lambda adapter, number: torch.device(place))
    calls: list[str] = module.calls
    return calls
