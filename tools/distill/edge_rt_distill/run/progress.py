"""How far a run is, on standard error: one line that is written over in a terminal, one line a tenth elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH, _EVERY = 100, 0.2


class Shown:
    """Prints what ``run_steps`` tells."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stderr if out is None else out
        self._terminal = self._out.isatty()
        self._last, self._said, self._began, self._line = 0.0, "", time.monotonic(), ""

    def __call__(self, step: str, what: str, done: int, total: int) -> None:
        """Show that ``step`` does ``what`` and is so far."""
        share = f" {done * 100 // total:3d} % ({done:,} of {total:,})" if total > 1 else ""
        line = f"{self._clock()}  {step}: {what}{share}"[:_WIDTH]
        if self._terminal:
            now = time.monotonic()
            if now - self._last >= _EVERY or done >= total:
                self._last = now
                self._write(f"\r{line.ljust(len(self._line))}")
                self._line = line
                if not share:
                    self.close()
            return
        tenth = f"{step} {what} {done * 10 // total if total > 1 else ''}"
        if tenth != self._said:
            self._said = tenth
            self._write(f"{line}\n")

    def close(self) -> None:
        """End the line that is written over."""
        if self._terminal and self._line:
            self._write("\n")
            self._line = ""

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._began)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except BrokenPipeError:  # nobody watches any more; the run goes on
            self._terminal, self._out = False, open("/dev/null", "w")  # noqa: SIM115 - as long as the process
