"""Reads the small files of /sys and /proc, under any root: what is missing, unreadable or malformed is None, never an exception."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def read_text(path: Path) -> str | None:
    """What a file says, without surrounding white space and the zero byte that device trees end strings with."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n\t")
    except (OSError, ValueError):  # ValueError: a path with a zero byte in it
        return None


def read_int(path: Path) -> int | None:
    """A whole number, decimal or ``0x...``."""
    try:
        return int(read_text(path) or "", 0)
    except ValueError:
        return None


_MOST = 1 << 16
"""No system has as many CPUs: a list with larger numbers is none, and would take long to write out."""


def number_list(text: str | None) -> tuple[int, ...]:
    """The numbers of a list as the kernel writes it (``0-3,8``), rising; () for what is none."""
    found: set[int] = set()
    try:
        for part in (text or "").replace("\n", ",").split(","):
            if part.strip():
                first, dash, last = part.partition("-")
                start, end = int(first), int(last if dash else first)
                if not 0 <= start <= end < _MOST:
                    return ()
                found.update(range(start, end + 1))
    except ValueError:
        return ()
    return tuple(sorted(found))


def subfolders(folder: Path, prefix: str) -> list[Path]:
    """What is in a folder and called ``prefix`` and a number, by that number."""
    try:
        found = [path for path in folder.iterdir() if path.name.startswith(prefix) and path.name[len(prefix) :].isdecimal()]
    except OSError:
        return []
    return sorted(found, key=lambda path: int(path.name[len(prefix) :]))


def matching(folder: Path, pattern: str) -> list[Path]:
    """What is in a folder under names of a pattern, sorted; [] where there is none, or it cannot be looked into."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:  # a device that goes away meanwhile
        return []


def cpu_quota(root: Path = Path("/")) -> int | None:
    """Whole CPUs (1 at least) that the cgroup of this process and those it is in allow it by their quotas; None without one."""
    quotas = []
    for folder in _cgroups(root):
        text = read_text(folder / "cpu.max")  # version 2: quota and period
        if text is None:
            text = f"{read_text(folder / 'cpu.cfs_quota_us')} {read_text(folder / 'cpu.cfs_period_us')}"
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):  # neither "max" nor "-1"
            quotas.append(max(1, int(quota) // int(period)))
    return min(quotas, default=None)


def _cgroups(root: Path) -> Iterator[Path]:
    """The folders of this process's cgroup and all it is in, of version 2 and of the CPU controller of version 1."""
    base = root / "sys/fs/cgroup"
    paths = {base: "", base / "cpu": ""}  # what a container sees as the root has its limits
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            paths[base] = path
        elif "cpu" in controllers.split(","):
            paths[base / "cpu"] = path
    for folder, path in paths.items():
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield folder.joinpath(*parts[:depth])
