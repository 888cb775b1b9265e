"""Reads what a system says of itself: small files of /sys and /proc under any root, and sources that may take long or never answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

# Reads the small files of /sys and /proc, under any root: what is missing, unreadable or malformed is None, never an exception.


def read_system_text(path: Path) -> str | None:
    """What a file says, without surrounding white space and the zero byte that device trees end strings with."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n\t")
    except (OSError, ValueError):  # ValueError: a path with a zero byte in it
        return None


def read_system_int(path: Path) -> int | None:
    """A whole number, decimal or ``0x...``."""
    try:
        return int(read_system_text(path) or "", 0)
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


def system_folders(folder: Path, prefix: str) -> list[Path]:
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
        text = read_system_text(folder / "cpu.max")  # version 2: quota and period
        if text is None:
            text = f"{read_system_text(folder / 'cpu.cfs_quota_us')} {read_system_text(folder / 'cpu.cfs_period_us')}"
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):  # neither "max" nor "-1"
            quotas.append(max(1, int(quota) // int(period)))
    return min(quotas, default=None)


def _cgroups(root: Path) -> Iterator[Path]:
    """The folders of this process's cgroup and all it is in, of version 2 and of the CPU controller of version 1."""
    base = root / "sys/fs/cgroup"
    paths = {base: "", base / "cpu": ""}  # what a container sees as the root has its limits
    for line in (read_system_text(root / "proc/self/cgroup") or "").splitlines():
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


# Asking what may take long or never answer: drivers, and the programs that come with them.

T = TypeVar("T")

DRIVER_PATIENCE = 0.008
"""Seconds that ``Latest`` waits: TellsHealth allows ten milliseconds."""


class Patient:
    """Calls functions on a thread of their own, and waits for a while. One that hangs keeps its thread; until it is back none is begun."""

    def __init__(self, what: str) -> None:
        """``what``: whom is asked, for messages."""
        self._what = what
        self._lock = threading.Lock()
        self._running: threading.Thread | None = None

    def ask(self, function: Callable[[], T], seconds: float) -> T:
        """What the function returns or raises. Raises TimeoutError if it takes longer, or an earlier one still does."""
        box: list[Any] = []

        def run() -> None:
            try:
                box.append((True, function()))
            except BaseException as error:
                box.append((False, error))

        until = time.monotonic() + seconds
        if not self._lock.acquire(timeout=seconds):
            raise TimeoutError(f"{self._what} did not answer within {seconds:g} s")
        try:
            if self._running is not None:
                self._running.join(max(0.0, until - time.monotonic()))
            if self._running is None or not self._running.is_alive():
                self._running = threading.Thread(target=run, name=f"edge-rt-{self._what}", daemon=True)
                self._running.start()
                self._running.join(max(0.0, until - time.monotonic()))
        finally:
            self._lock.release()
        if not box:
            raise TimeoutError(f"{self._what} did not answer within {seconds:g} s")
        good, value = box[0]
        if not good:
            raise value
        found: T = value
        return found


class Latest(Generic[T]):
    """The last answer of a function that takes its time: asked again, on a thread, when the answer is older than ``every`` seconds."""

    def __init__(self, function: Callable[[], T], nothing: T, every: float = 1.0) -> None:
        """``nothing``: the answer where the function raises, and before it has answered. Nothing is asked yet."""
        self._function, self._nothing, self._every = function, nothing, every
        self._lock = threading.Lock()
        self._running: threading.Thread | None = None
        self._answer, self._at = nothing, -float("inf")

    def get(self) -> T:
        """The last answer; waits at most PATIENCE for a fresh one. Never raises."""
        with self._lock:
            if time.monotonic() - self._at < self._every:
                return self._answer
            thread = self._running
            if thread is None or not thread.is_alive():
                thread = threading.Thread(target=self._run, name="edge-rt-health", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter ends
                    return self._answer
                self._running = thread
        thread.join(DRIVER_PATIENCE)
        return self._answer

    def _run(self) -> None:
        try:
            answer = self._function()
        except Exception:  # whoever looks at health gets nothing; the probe says why
            answer = self._nothing
        self._answer, self._at = answer, time.monotonic()
