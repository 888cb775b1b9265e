"""How long clients wait for tokens, in few numbers: histograms as Prometheus has them."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_rt.daemon.streams import Stream

FIRST = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
"""Upper ends of buckets, in seconds."""


class Histogram:
    """Counts by bucket. ``counts`` has one more than ``ends``: what is above all of them."""

    def __init__(self, ends: tuple[float, ...]) -> None:
        self.ends, self.counts, self.sum = ends, [0] * (len(ends) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, as often as it occurred."""
        self.counts[bisect_left(self.ends, value)] += times
        self.sum += value * times


class Measures:
    """Of all generations. Times are those at which the daemon heard of tokens, so a client that reads slowly lengthens its own."""

    def __init__(self) -> None:
        self.first_token, self.between_tokens = Histogram(FIRST), Histogram(BETWEEN)

    def tokens(self, stream: Stream, count: int, now: float) -> None:
        """So many tokens came for a stream."""
        if not count:
            return
        passed, stream.moved = now - stream.moved, now
        if not stream.begun:
            stream.begun, count, first = True, count - 1, passed
            self.first_token.observe(first)
            passed = 0.0
        if count:
            self.between_tokens.observe(passed / count, count)
