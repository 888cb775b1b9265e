"""What a replay looks like while it goes on: a block that is written over in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, TextIO

from edge_rt_distill.files import shown_size
from edge_rt_distill.replay.results import Outcome, Reading

WINDOW = 10.0
"""Seconds that rates and quantiles look back."""
_EVERY = {True: 0.5, False: 5.0}
"""Seconds between two views, in a terminal or not."""


class _Piece(NamedTuple):
    at: float
    tokens: int
    seconds: float
    first: bool


class Tally:
    """Counts of a run so far, and the pieces of the last seconds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.sent = self.done = self.failed = self.cancelled = 0
        self.reading: Reading | None = None
        self._pieces: deque[_Piece] = deque()

    def piece(self, at: float, tokens: int, seconds: float, *, first: bool) -> None:
        """A piece of an answer came, ``seconds`` after the one before it or, if it is the first, after the request."""
        self._pieces.append(_Piece(at, tokens, seconds, first))

    def ended(self, outcome: Outcome) -> None:
        """A request has its outcome."""
        self.done += 1
        self.failed += outcome.status == "error"
        self.cancelled += outcome.status == "cancelled"

    def lines(self, now: float) -> list[str]:
        """All of it for people, ``now`` seconds after the begin."""
        while self._pieces and self._pieces[0].at < now - WINDOW:
            self._pieces.popleft()
        recent = list(self._pieces)  # other threads may add more
        tokens = sum(one.tokens for one in recent) / min(WINDOW, max(now, 0.1))
        firsts = [(one.seconds, 1) for one in recent if one.first]
        gaps = [(one.seconds / one.tokens, one.tokens) for one in recent if not one.first and one.tokens]
        held = "" if self.reading is None or self.reading.memory is None else f", memory {shown_size(self.reading.memory)}"
        left = f", cancelled {self.cancelled}" if self.cancelled else ""
        running = self.sent - self.done
        return [
            f"{now:.1f} s: sent {self.sent} of {self.total}, running {running}, ended {self.done}, failed {self.failed}{left}",
            f"  {tokens:.1f} tokens/s{held}",
            f"  first token p50 {_shown(firsts, 0.5)} p95 {_shown(firsts, 0.95)},"
            f" between tokens p50 {_shown(gaps, 0.5)} p99 {_shown(gaps, 0.99)}",
        ]


def quantile(weighted: Sequence[tuple[float, int]], share: float) -> float | None:
    """The least value that ``share`` of all do not exceed, each counted as often as its weight says; None of nothing."""
    left = share * sum(weight for _, weight in weighted)
    for value, weight in sorted(weighted):
        left -= weight
        if left <= 1e-9:
            return value
    return None


def _shown(weighted: Sequence[tuple[float, int]], share: float) -> str:
    value = quantile(weighted, share)
    return "-" if value is None else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


class Live:
    """Shows a tally on ``out``, standard error unless said, until it is closed."""

    def __init__(self, tally: Tally, now: Callable[[], float], out: TextIO | None = None) -> None:
        self._tally, self._now = tally, now
        self._out = sys.stderr if out is None else out
        self._terminal = self._out.isatty()
        self._shown = 0
        """Lines that are to be written over."""

    async def show(self) -> None:
        """Go on until cancelled."""
        while True:
            await asyncio.sleep(_EVERY[self._terminal])
            self._write(self._tally.lines(self._now()))

    def say(self, text: str) -> None:
        """A line that stays, above the others."""
        self._write([], f"{self._now():.1f} s: {text}\n")

    def close(self) -> None:
        """The last view, which stays."""
        self._write(self._tally.lines(self._now()))
        self._shown = 0

    def _write(self, lines: Sequence[str], stays: str = "") -> None:
        if not self._terminal:
            text = stays or ", ".join(line.strip() for line in lines) + "\n"
        else:
            back = f"\x1b[{self._shown}A\x1b[J" if self._shown else ""
            width = shutil.get_terminal_size().columns - 1  # a line that is broken in two would not be written over
            text = back + stays + "".join(f"{line[:width]}\n" for line in lines)
            self._shown = len(lines)
        try:
            self._out.write(text)
            self._out.flush()
        except BrokenPipeError:  # nobody watches any more; the replay goes on
            self._terminal, self._out = False, open("/dev/null", "w")  # noqa: SIM115 - as long as the process
