"""A token bucket: so many of something a second on average, and a number at once."""

from __future__ import annotations


class Bucket:
    """``rate``: a second, 0: no limit. ``most``: that may come at once; it is full at ``now``, as all times in seconds of one clock."""

    __slots__ = ("_filled", "_most", "_rate", "_tokens")

    def __init__(self, rate: float, most: float, now: float) -> None:
        self._rate, self._most = rate, most
        self._tokens, self._filled = most, now

    def take(self, now: float) -> float:
        """Take one, and return 0; or the seconds until there is one to take."""
        if not self._rate:
            return 0.0
        self._fill(now)
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0.0

    def owe(self, now: float, longest: float) -> float:
        """Take one also if there is none. Returns the seconds until all that were taken so are paid for, ``longest`` at most: no more is
        owed than that.
        """
        if not self._rate:
            return 0.0
        self._fill(now)
        self._tokens = max(self._tokens - 1, -longest * self._rate)
        return max(0.0, -self._tokens / self._rate)

    def _fill(self, now: float) -> None:
        self._tokens = min(self._most, self._tokens + (now - self._filled) * self._rate)
        self._filled = now
