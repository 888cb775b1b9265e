"""The kinds of device that the engine drives: what PyTorch calls them, and which package teaches PyTorch about them.

A vendor's package can hang or crash in a broken driver, so it is imported in a process of its own first.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from edge_rt.hooks import OptionError, Refusal
from edge_rt_mlu.commands import output

TIMEOUT = 90.0
"""Seconds for the trial import: PyTorch and a vendor's package take several from a cold disk."""

_TRIAL = """
import torch
import {package}
print("devices:", torch.{kind}.device_count())
"""


class Adapter(NamedTuple):
    """``kind``: PyTorch's name. ``package``: what registers it, None if PyTorch has it. ``dtype``: what is computed in.

    ``score``: of the engine on such a device. ``vendor`` and ``remedy``: for messages.
    """

    kind: str
    package: str | None
    dtype: str
    score: float
    vendor: str
    remedy: str


ADAPTERS = {
    # Asked for by name only: ggml is many times faster on a CPU.
    "cpu": Adapter("cpu", None, "float32", 0.0, "CPU", "install torch: pip install torch"),
    "mlu": Adapter(
        "mlu", "torch_mlu", "float16", 10.0, "Cambricon",
        "install torch_mlu (Cambricon PyTorch) of a version that fits the driver, with the torch it was built for: https://sdk.cambricon.com",
    ),
    # Second choice: below ggml on its CANN backend.
    "ascend": Adapter(
        "npu", "torch_npu", "float16", 5.0, "Ascend",
        "install torch-npu of the version that fits CANN, with the torch it was built for: pip install torch-npu",
    ),
}  # fmt: skip
"""By the device's name in edge-rt, before the colon."""


def split(device: str) -> tuple[Adapter | None, int]:
    """Adapter and number of a device such as ``mlu:1``; None if no adapter knows it."""
    name, _, number = device.partition(":")
    if number and not number.isdecimal():
        return None, 0
    return ADAPTERS.get(name), int(number or 0)


def number_in_torch(adapter: Adapter, number: int, root: Path, environment: Mapping[str, str]) -> int:
    """PyTorch's number of a device. ``mlu:N`` is that already; N of ``ascend:N`` is that of /dev/davinciN, of which CANN counts those that
    are there, or those among them that ASCEND_RT_VISIBLE_DEVICES lists. Raises OptionError for one that it does not list.
    """
    if adapter.kind != "npu":
        return number
    there = sorted(int(found[1]) for path in (root / "dev").glob("davinci*") if (found := re.fullmatch(r"davinci(\d+)", path.name)))
    if number not in there:
        raise OptionError(f"there is no /dev/davinci{number}; choose a device that `edge-rt doctor` shows")
    own, listed = there.index(number), environment.get("ASCEND_RT_VISIBLE_DEVICES")
    if listed is None:
        return own
    visible = [int(found) for found in re.findall(r"\d+", listed)]
    if own not in visible:
        raise OptionError(f"ASCEND_RT_VISIBLE_DEVICES hides ascend:{number} from this process; unset it, or choose a device that it names")
    return visible.index(own)


def missing(adapter: Adapter) -> Refusal | None:
    """What is not installed, None if everything is. Imports nothing."""
    for package in ("torch", adapter.package):
        if package is not None and not installed(package):
            return Refusal(f"the Python package {package} is not installed", adapter.remedy)
    return None


def installed(package: str) -> bool:
    """Whether a package can be found. Imports nothing."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a half-removed package, or one without a spec
        return False


@functools.lru_cache(maxsize=8)
def tried(adapter: Adapter, timeout: float = TIMEOUT, python: str = sys.executable, path: str | None = None) -> int | Refusal:
    """How many devices PyTorch sees, found in a process of its own; or why the package cannot be used. Never raises or hangs.

    ``path``: PYTHONPATH of that process, None: this one's.
    """
    if adapter.package is None:
        return 1
    environment = None if path is None else {**os.environ, "PYTHONPATH": path}
    try:
        done = output([python, "-c", _TRIAL.format(package=adapter.package, kind=adapter.kind)], timeout, environment)
    except OSError as error:
        return Refusal(f"a trial of {adapter.package} cannot be started: {error.strerror or error}", "see that Python can be run")
    if done is None:
        reason = f"importing {adapter.package} took longer than {timeout:g} seconds, as it does when the driver hangs"
        return Refusal(reason, f"check the {adapter.vendor} driver, then try again")
    found = next((line for line in reversed(done.out.splitlines()) if line.startswith("devices:")), None)
    if done.status == 0 and found is not None:
        return int(found.split(":")[1])
    if done.status < 0:
        return Refusal(f"importing {adapter.package} ended with signal {-done.status}", adapter.remedy)
    said = next((line for line in reversed(done.err.splitlines()) if line.strip()), "no reason given")
    return Refusal(f"{adapter.package} cannot be imported ({said[:200]})", adapter.remedy)
