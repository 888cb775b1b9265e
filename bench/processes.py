"""Fresh processes: what needs one (opening, memory, cold starts) runs a small program of its own, ours and the peer's alike."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"
TOOL = Path(__file__).parents[1] / "tools" / "distill"
"""The distillation tool: a distribution of its own, which need not be installed."""
CONSOLE_SCRIPT = Path(sys.executable).with_name("edge-rt")
_PATIENCE = 300.0


def reach_tool() -> None:
    """Let ``edge_rt_distill`` be imported from the checkout."""
    if str(TOOL) not in sys.path:
        sys.path.insert(0, str(TOOL))


def run_program(name: str, *arguments: object, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """Run a program of ``programs/`` and return the JSON it prints. Raises RuntimeError with its last words if it fails."""
    command = [*prefix, sys.executable, str(PROGRAMS / name), *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{name} took longer than {_PATIENCE:.0f} s and was ended") from None
    if done.returncode:
        raise RuntimeError(f"{name} failed with status {done.returncode}: {done.stderr.strip()[-400:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run_tool(command: Sequence[str]) -> None:
    """Run a command to its end. Raises RuntimeError with its last words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}: {done.stderr.strip()[-400:]}")


def first_byte(command: Sequence[str]) -> tuple[float, bytes]:
    """Seconds from starting a program to the first byte it writes, and all it writes. Raises RuntimeError if it writes nothing."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stderr is not None, "both are pipes"  # noqa: PT018
        first = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - started
        try:
            rest, errors = process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise RuntimeError(f"{command[0]} did not end") from None
    if process.returncode or not first:
        raise RuntimeError(f"{command[0]} failed with status {process.returncode}: {errors.decode(errors='replace').strip()[-400:]}")
    return seconds, first + rest


@contextlib.contextmanager
def waiting_loop() -> Iterator[Callable[[], None]]:
    """A process that keeps one CPU busy from the moment that what is yielded is called until the block ends."""
    code = "import sys, time\nprint(flush=True)\nsys.stdin.readline()\nend = time.monotonic() + 600\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None, "both are pipes"  # noqa: PT018
        entrance = process.stdin
        process.stdout.readline()

        def start() -> None:
            entrance.write(b"\n")
            entrance.flush()

        try:
            yield start
        finally:
            process.kill()


@contextlib.contextmanager
def busy_loop() -> Iterator[None]:
    """A process that keeps one CPU busy; it ends with the block, and by itself after ten minutes."""
    code = "import time\nend = time.monotonic() + 600\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            time.sleep(0.3)
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def openmp_program(model: Path, threads: int, tokens: int) -> Iterator[None]:
    """Another process that computes with so many of OpenMP's threads, for so many ``tokens`` at once (1, or a divisor of 256), until the
    block ends. Raises RuntimeError if it does not begin to.
    """
    command = [sys.executable, str(PROGRAMS / "openmp_neighbour.py"), str(model), str(threads), str(tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None, "a pipe"
        try:
            if not process.stdout.readline():
                raise RuntimeError("the neighbour ended before it was at work")
            yield
        finally:
            process.kill()


# ---- a memory limit ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_limit(parent: Path, limit: int) -> Iterator[list[str]]:
    """A memory cgroup (v1 or v2) under ``parent`` for at most ``limit`` bytes; yields the prefix of commands that run in it.

    The group goes away with the block, and what runs in it dies with this process. Raises OSError where groups may not be made.
    """
    group = parent / f"edge-rt-bench-{os.getpid()}"
    group.mkdir()
    try:
        v1 = group / "memory.limit_in_bytes"
        (v1 if v1.exists() else group / "memory.max").write_text(str(limit))
        for name in ("memory.swappiness", "memory.swap.max"):  # swap would let a program past the limit
            if (group / name).exists():
                (group / name).write_text("0")
        die_with_parent = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        yield ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *die_with_parent]
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """Remove a group once its last process is gone. Raises OSError if it stays in use for five seconds."""
    end = time.monotonic() + 5
    while True:
        try:
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
