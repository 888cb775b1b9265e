"""Output of the commands: results on standard output, everything else on standard error."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from edge_rt.errors import UserError
from edge_rt.model_hub import format_size


class OutputClosed(Exception):
    """The reader of standard output has closed it; the command ends without a message."""


def write(text: str) -> None:
    """Write to standard output and flush. Raises OutputClosed, UserError (for example a full disk)."""

    def put(out: Any) -> None:
        try:
            out.write(text)
        except UnicodeEncodeError as error:  # a terminal that is not UTF-8
            out.write(text.encode(error.encoding, "replace").decode(error.encoding))

    _put(put)


def write_bytes(data: bytes) -> None:
    """Write bytes to standard output and flush. Raises OutputClosed, UserError."""
    if data:
        _put(lambda out: out.buffer.write(data))


def _put(put: Callable[[Any], object]) -> None:
    if sys.stdout is None:
        raise UserError("standard output is closed, and the answer has nowhere to go; redirect it to /dev/null to discard it")
    try:
        put(sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        abandon_stdout()
        raise OutputClosed from None
    except OSError as error:
        abandon_stdout()
        raise UserError(f"cannot write to standard output: {(error.strerror or str(error)).lower()}") from error


def abandon_stdout() -> None:
    """Redirect standard output to the null device, so that the flush at the end of the process does not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def write_json(record: dict[str, Any], indent: int | None = None) -> None:
    """Write one JSON value and a newline to standard output."""
    import json

    utf8 = getattr(sys.stdout, "encoding", "").lower() in ("utf-8", "utf8")
    write(json.dumps(record, ensure_ascii=not utf8, allow_nan=False, indent=indent) + "\n")


def write_stderr(text: str) -> None:
    """Write a line to standard error. Does nothing if it is closed."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        return


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


class ProgressBar:
    """Shows progress on standard error: a bar on a terminal, elsewhere one line for each phase of more than a second.

    A context manager. May be called from any thread, and after the end: weights are still read while the answer is already written.
    """

    def __init__(self) -> None:
        self._terminal = is_terminal(sys.stderr)
        self._lock = threading.Lock()
        self._phase = ""
        self._due = 0.0  # time of the next output, by the monotonic clock
        self._drawn = False
        self._finished = False

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes (0: unknown) of a phase are done."""
        with self._lock:
            now = time.monotonic()
            if phase != self._phase:
                self._phase, self._due = phase, now + (0.1 if self._terminal else 1.0)
            if self._finished or now < self._due:
                return
            if self._terminal:
                self._draw(phase, done, total)
                self._due = now + 0.1
            else:
                write_stderr(f"{phase}" + (f" {format_size(total)}" if total else "") + " ...")
                self._due = float("inf")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar. Later calls do nothing."""
        with self._lock:
            self._finished = True
            if self._drawn:
                self._write("\r\x1b[K")

    def _draw(self, phase: str, done: int, total: int) -> None:
        share = min(1.0, done / total) if total else 0.0
        facts = f"[{'#' * int(share * 30):<30}] {share:4.0%}  {format_size(done)} of {format_size(total)}" if total else format_size(done)
        self._write(f"\r\x1b[K{phase:<12} {facts}")
        self._drawn = True

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:  # the terminal is gone; the work goes on
            self._finished = True


def table(rows: Sequence[tuple[str, ...]], indent: str = "") -> str:
    """Rows as lines of aligned columns. A row may have fewer columns than others."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows), default=0))]
    lines = (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows)
    return "".join(line + "\n" for line in lines)
