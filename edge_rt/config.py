"""Where edge-rt keeps files, how many CPUs it may use, and measurements that are kept between runs."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from edge_rt.system_files import cpu_quota

# Where edge-rt keeps things, by the platform's own conventions, each overridable by an environment variable.


def cache_dir() -> Path:
    """Directory for what can be made again: models, packed weights. ``EDGE_RT_CACHE`` overrides it.

    Linux ``$XDG_CACHE_HOME/edge-rt`` or ``~/.cache/edge-rt``, macOS ``~/Library/Caches/edge-rt``,
    Windows ``%LOCALAPPDATA%\\edge-rt``. It is not created here.
    """
    if override := os.environ.get("EDGE_RT_CACHE"):
        return Path(override).expanduser()
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "edge-rt"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "edge-rt"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "edge-rt"


def runtime_dir() -> Path:
    """Directory for sockets: ``$XDG_RUNTIME_DIR/edge-rt``, or ``run`` in the cache where there is no such thing. Not created here."""
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "edge-rt"
    return cache_dir() / "run"


def state_dir() -> Path:
    """Directory for what is to be kept: saved sessions. ``EDGE_RT_STATE``, ``$XDG_STATE_HOME/edge-rt``, else ``~/.local/state/edge-rt``."""
    if override := os.environ.get("EDGE_RT_STATE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "edge-rt"


def models_dir() -> Path:
    """Directory ``edge-rt pull`` fills and ``-m NAME`` searches."""
    return cache_dir() / "models"


def packed_dir() -> Path:
    """Directory of packed weights (see core/weights/repack.py)."""
    return cache_dir() / "packed"


def available_cpus() -> int:
    """CPUs this process may run on: affinity, then the cgroups' quotas, whichever is less; at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, cpu_quota() or affinity))


# Measurements worth remembering between runs: numbers by name, valid for one build of the native library on one kind of CPU.


def keep(path: Path, text: str) -> None:
    """Write a small file of the cache beside its name, then rename it into place; where nothing can be written, nothing happens."""
    temporary = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)


class Remembered:
    """A small JSON file in the cache. What cannot be read is measured again; what cannot be written, each time."""

    def __init__(self, path: Path, build: str) -> None:
        """``build`` names what the measurements are valid for; those of another build are forgotten at the next ``put``."""
        self._path, self._build = path, build
        self._values = self._read()

    def get(self, name: str) -> float | None:
        """A number, None if it was never measured for this build."""
        return self._values.get(name)

    def put(self, name: str, value: float) -> None:
        """Keep a number for later runs."""
        import json  # not before a model is opened: `edge_rt.config` is on the way of every command

        self._values[name] = value
        keep(self._path, json.dumps({"build": self._build, "values": self._values}))

    def _read(self) -> dict[str, float]:
        import json

        try:
            found: Any = json.loads(self._path.read_text())
            if found["build"] == self._build:
                return {str(name): float(value) for name, value in found["values"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass  # absent, damaged or of another form: nothing is known
        return {}
