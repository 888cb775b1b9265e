"""A generation between the worker and its client: which events are where, so that none is lost, repeated, or kept without end."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_rt.daemon.frames import Message
from edge_rt.errors import ProtocolError

if TYPE_CHECKING:
    import asyncio

    from edge_rt.daemon.channel import Channel
    from edge_rt.daemon.hosted import Hosted
    from edge_rt.daemon.traffic.recorder import Taken


class Stream:
    """No input or output of its own. ``credit(n)``: n more events may come from the worker.

    An event has a credit until it is off our hands: written to the client, or, of a stream that can be resumed, acknowledged by it.
    Those that are not are held, so as many at most as there are credits, and the answer at the end. Who cancels gets the few events with
    which a generation ends beside them.
    """

    hosted: Hosted
    """The model that answers."""

    def __init__(self, user: int, resumable: bool, credits: int, credit: Callable[[int], None]) -> None:
        self.token = secrets.token_urlsafe(16) if resumable else None
        self.user = user
        self.seq = 0
        """Of the last event or answer; they count from 1."""
        self.ended = False
        """The answer has come."""
        self.cancelled = False
        """The worker was told."""
        self.number = 0
        """Of the command to the worker."""
        self.request = 0
        """The client's number for it."""
        self.begun = False
        """A token has come."""
        self.moved = 0.0
        """When the last token came, before the first when it was asked for."""
        self.connection: Channel | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self.taken: Taken | None = None
        """What is recorded of it, if anything is."""
        self._held: deque[Message] = deque()
        self._credit, self._batch, self._owed = credit, max(1, credits // 4), 0

    @property
    def held(self) -> int:
        """Events and answers that the client has not acknowledged."""
        return len(self._held)

    @property
    def over(self) -> bool:
        """Nothing will be asked of it any more."""
        return self.ended and not self._held

    def add(self, message: Message) -> Message:
        """An event or the answer came from the worker; what is to be sent of it."""
        self.ended = "event" not in message
        if self.token is None:
            return message
        self.seq += 1
        message = {**message, "seq": self.seq}
        self._held.append(message)
        return message

    def written(self, events: int = 1) -> None:
        """The client's socket took events."""
        if self.token is None:
            self._off(events)

    def left(self) -> None:
        """The client wants no more of it."""
        if self.taken is not None:
            self.taken.left()

    def acknowledge(self, seq: int) -> None:
        """The client has all up to this one."""
        events = 0
        while self._held and self._held[0]["seq"] <= seq:
            events += "event" in self._held.popleft()
        self._off(events)

    def after(self, seq: int) -> list[Message]:
        """What follows this one, which the client has with all before it. Raises ProtocolError."""
        first = self.seq - len(self._held)
        if not first <= seq <= self.seq:
            raise ProtocolError("bad_request", f"the stream can be resumed after {first} to {self.seq}, and not after {seq}")
        self.acknowledge(seq)
        return list(self._held)

    def _off(self, events: int) -> None:
        self._owed += events
        if self._owed >= self._batch and not self.ended:
            owed, self._owed = self._owed, 0
            self._credit(owed)
