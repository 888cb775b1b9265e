"""Runs other programs for so long and no longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Output(NamedTuple):
    """What a program printed, and its exit status (negative: the signal that ended it)."""

    status: int
    out: str
    err: str


def output(command: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None) -> Output | None:
    """Run a program without input; None if it took longer than ``timeout`` seconds. Raises OSError if it cannot be started.

    Not ``subprocess.run``: that waits for what it has killed, and a program that is stuck in a broken driver does not die.
    """
    import subprocess  # only here: most starts of edge-rt find no card and run nothing

    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        process.poll()  # reaped now, or by the next process that is started
        return None
    return Output(process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))
