"""What clients have under way, all together and each user: one user's requests leave room for those of others."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from edge_rt.errors import ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.config import Limits


class Shares:
    """``requests`` under way, and ``held`` bytes of requests that have begun or were not answered yet."""

    def __init__(self, limits: Limits) -> None:
        self.requests = self.held = 0
        self._limits = limits
        self._requests: Counter[int] = Counter()  # by user
        self._held: Counter[int] = Counter()

    def begin(self, user: int) -> None:
        """A user's request begins; ``end`` follows. Raises ProtocolError: limit for this user, busy for everybody."""
        if self._requests[user] >= (most := self._limits.requests_per_user):
            raise ProtocolError("limit", f"a user may have {most} requests under way; wait for one")
        if self.requests >= self._limits.requests:
            raise ProtocolError("busy", "as many requests are under way as may be; ask again a little later")
        self.requests += 1
        self._requests[user] += 1

    def end(self, user: int) -> None:
        """A user's request was answered."""
        self.requests -= 1
        self._requests[user] -= 1
        if not self._requests[user]:
            del self._requests[user]

    def hold(self, user: int, more: int) -> None:
        """A user's bytes are held, or (less than 0) no more. Raises ProtocolError: limit."""
        if more > 0 and self._held[user] + more > (most := self._limits.held_bytes_per_user):
            raise ProtocolError("limit", f"a user may have {most:,} bytes of requests that were not answered yet; wait for some")
        if more > 0 and self.held + more > self._limits.held_bytes:
            raise ProtocolError("limit", "the daemon holds as much of requests as it may; ask again a little later")
        self.held += more
        self._held[user] += more
        if not self._held[user]:
            del self._held[user]

    def move(self, held: int, before: int, after: int) -> None:
        """Bytes that are held turn out to be another user's. Raises ProtocolError: limit if that user may not have so many."""
        self.hold(before, -held)
        try:
            self.hold(after, held)
        except ProtocolError:
            self.hold(before, held)
            raise
