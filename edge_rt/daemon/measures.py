"""How long clients wait for tokens, in few numbers: histograms as Prometheus has them; and how many tokens came of late."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections import Counter

    from edge_rt.daemon.streams import Stream

FIRST = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
"""Upper ends of buckets, in seconds."""
SHOWN = 60
"""Whole seconds that ``Recent`` remembers."""
TOKENS = ("prompt_tokens", "completion_tokens")
CONTEXT = ("evicted_segments", "evicted_tokens", "recalled_segments", "recalled_tokens", "pruned_cells", "released_bytes")
"""What is counted of the end of every generation: of its usage, and of what became of its context."""


def count_done(counts: Mapping[str, Counter[str]], done: Mapping[str, Any]) -> None:
    """A generation has come to its end."""
    counts["tokens"].update({kind: done["usage"][kind] for kind in TOKENS})
    counts["context"].update({kind: done["context"][kind] for kind in CONTEXT})


class Histogram:
    """Counts by bucket. ``counts`` has one more than ``ends``: what is above all of them."""

    def __init__(self, ends: tuple[float, ...]) -> None:
        self.ends, self.counts, self.sum = ends, [0] * (len(ends) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, as often as it occurred."""
        self.counts[bisect_left(self.ends, value)] += times
        self.sum += value * times


class Recent:
    """Tokens by second: a ring, in which a second's place is its number modulo the places. Times are in seconds and rise."""

    def __init__(self) -> None:
        self._counts, self._second = [0] * (SHOWN + 1), 0

    def add(self, count: int, now: float) -> None:
        """So many came just now."""
        self._turn(now)
        self._counts[self._second % len(self._counts)] += count

    def by_second(self, now: float) -> list[int]:
        """Of the last ``SHOWN`` whole seconds, the oldest first."""
        self._turn(now)
        return [self._counts[second % len(self._counts)] for second in range(self._second - SHOWN, self._second)]

    def rate(self, now: float) -> float:
        """Tokens a second: of this second so far and the two before it."""
        recent = [*self.by_second(now)[-2:], self._counts[self._second % len(self._counts)]]
        return sum(recent) / (2 + now % 1)

    def _turn(self, now: float) -> None:
        """Empty the places of seconds that have begun since."""
        second = int(now)
        for later in range(max(self._second, second - SHOWN - 1) + 1, second + 1):
            self._counts[later % len(self._counts)] = 0
        self._second = max(self._second, second)


class Measures:
    """Of all generations. Times are those at which the daemon heard of tokens, so a client that reads slowly lengthens its own."""

    def __init__(self) -> None:
        self.first_token, self.between_tokens = Histogram(FIRST), Histogram(BETWEEN)
        self.recent = Recent()

    def tokens(self, stream: Stream, count: int, now: float) -> None:
        """So many tokens came for a stream."""
        if not count:
            return
        self.recent.add(count, now)
        passed, stream.moved = now - stream.moved, now
        if not stream.begun:
            stream.begun, count, first = True, count - 1, passed
            self.first_token.observe(first)
            passed = 0.0
        if count:
            self.between_tokens.observe(passed / count, count)
