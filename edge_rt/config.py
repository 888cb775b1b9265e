"""Where edge-rt keeps things, by the platform's own conventions, each overridable by an environment variable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edge_rt.system_files import cpu_quota


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
    """Directory of packed weights (see core/load/packing.py)."""
    return cache_dir() / "packed"


def available_cpus() -> int:
    """CPUs this process may run on: affinity, then the cgroups' quotas, whichever is less; at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, cpu_quota() or affinity))
