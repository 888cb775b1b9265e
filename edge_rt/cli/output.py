"""What the commands write: results on standard output, everything else on standard error."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from edge_rt.errors import UserError


class OutputClosed(Exception):
    """Whoever read our standard output has stopped; the command ends quietly."""


def write(text: str) -> None:
    """Write to standard output and flush. Raises OutputClosed, UserError (for example a full disk)."""
    if sys.stdout is None:
        raise UserError("standard output is closed, and the answer has nowhere to go; redirect it to /dev/null to discard it")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        abandon_stdout()
        raise OutputClosed from None
    except OSError as error:
        abandon_stdout()
        raise UserError(f"cannot write to standard output: {(error.strerror or str(error)).lower()}") from error


def abandon_stdout() -> None:
    """Point standard output at nothing, so that the interpreter's last flush has no reason to complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def write_json(record: dict[str, Any], indent: int | None = None) -> None:
    """Write one JSON value and a newline to standard output."""
    import json

    write(json.dumps(record, ensure_ascii=False, indent=indent) + "\n")


def say(text: str) -> None:
    """A line for the person, on standard error. Nobody listening is no reason to fail."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        return


def terminal(stream: Any) -> bool:
    """Whether a stream is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def size(count: float) -> str:
    """Bytes for people: 98.4 MB."""
    if abs(count) < 1000:
        return f"{count:.0f} B"
    for unit in "kMGT":
        count /= 1000
        if abs(count) < 999.95 or unit == "T":
            break
    return f"{count:.1f} {unit}B"


class ProgressBar:
    """Shows (phase, done, total) on standard error: a bar on a terminal, else one line a phase. May be called from any thread."""

    def __init__(self) -> None:
        self._phase = ""
        self._drawn = False
        self._next = 0.0
        self._terminal = terminal(sys.stderr)

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` bytes (0: unknown) of a phase are done."""
        if not self._terminal:
            if phase != self._phase:
                self._phase = phase
                say(f"{phase}" + (f" {size(total)}" if total else "") + " ...")
            return
        now = time.monotonic()
        if phase == self._phase and now < self._next and (done < total or not total):
            return
        self._phase, self._next, self._drawn = phase, now + 0.1, True
        share = min(1.0, done / total) if total else 0.0
        bar = "#" * int(share * 30)
        facts = f"[{bar:<30}] {share:4.0%}  {size(done)} of {size(total)}" if total else size(done)
        sys.stderr.write(f"\r\x1b[K{phase:<12} {facts}")
        sys.stderr.flush()

    def finish(self) -> None:
        """Remove the bar."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False


def table(rows: Sequence[tuple[str, ...]], indent: str = "") -> str:
    """Rows as aligned columns, one line each."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows), default=0))]
    lines = (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows)
    return "".join(line + "\n" for line in lines)
