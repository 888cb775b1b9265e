"""Which CANN (Huawei's Compute Architecture for Neural Networks) is installed, told by its files; nothing is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_PLACES = ("usr/local/Ascend/ascend-toolkit/latest", "usr/local/Ascend/cann", "usr/local/Ascend/latest")
_FILES = (
    "version.cfg", "compiler/version.info", "runtime/version.info", "opp/version.info", "*-linux/ascend_toolkit_install.info",
    "version.info",
)  # fmt: skip
_VARIABLES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")


class Cann(NamedTuple):
    """``version``: its numbers, () where no file says; ``text``: as it is written there; ``ready``: set_env.sh was sourced."""

    place: Path
    version: tuple[int, ...]
    text: str
    ready: bool


def find(root: Path, environment: Mapping[str, str]) -> Cann | None:
    """The CANN that the environment names, else one where it is installed by default; None if there is none."""
    ready = any(environment.get(name) for name in _VARIABLES)
    for place in _places(root, environment):
        if not place.is_dir():
            continue
        for pattern in _FILES:
            for file in sorted(place.glob(pattern)):
                if found := _version(file):
                    return Cann(place, tuple(int(n) for n in re.findall(r"\d+", found)[:2]), found, ready)
        if ready:
            return Cann(place, (), "of unknown version", ready)
    return None


def driver(root: Path) -> str | None:
    """The version of the driver, None if it is not installed."""
    return _version(root / "usr/local/Ascend/driver/version.info")


def _places(root: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    for name in _VARIABLES:
        if environment.get(name):
            yield Path(environment[name])
    for place in _PLACES:
        yield root / place
    if home := environment.get("HOME"):
        yield Path(home) / "Ascend/ascend-toolkit/latest"


def _version(file: Path) -> str | None:
    """The value of "Version=..." or "version=..." in a file; None if it cannot be read."""
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            found = re.search(r"^(?:runtime_running_)?version\s*[=:]\s*\[?([^\s\]]+)", lines.read(4096), re.IGNORECASE | re.MULTILINE)
    except OSError:
        return None
    return found.group(1).rpartition(":")[2] if found and os.path.getsize(file) < 1 << 20 else None
