"""Who may begin, and who waits: requests are let in when there is memory for all that they can come to hold (account.py).

Nobody waits for ever: by priority and then in order, a smaller or more urgent request may pass one that does not fit yet, but only so
often; then nobody passes it any more, and what ends frees memory for it alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.errors import Cancelled, ProtocolError
from edge_rt.model_hub import format_size

if TYPE_CHECKING:
    from edge_rt.daemon.account import Account, Need
    from edge_rt.daemon.frames import Message

PASSES = 8
"""So often a request that waits is passed by later ones."""
PATIENCE = 2.0
"""Seconds that a request for which there is too little memory at all is kept, should the daemon allow more."""
LOOK_EVERY = 1.0
"""Seconds between two looks whether something fits now that did not, though nothing ended: a disk may have room again."""
_RANKS = {"high": 0, "normal": 1, "low": 2}


class Asker(NamedTuple):
    """Whose request waits: ``start(request, room)`` begins one, in so many cells (None: no limit); ``refuse`` ends one with an error;
    ``queued`` tells one's client.
    """

    start: Callable[[Waiting, int | None], None]
    refuse: Callable[[Waiting, Exception], None]
    queued: Callable[[Waiting, Message], None]


@dataclass(eq=False)
class Waiting:
    """A request that has not begun. ``name`` of its session, None for one of its own. ``ready``: whether its events can be sent.
    ``cancelled``: whether it was, before it came here. ``asker``: None for the line's own. ``advice``: what to do if it never fits.
    """

    command: Message
    tokens: list[int]
    options: dict[str, Any]
    need: Need
    name: str | None
    ready: Callable[[], bool]
    cancelled: Callable[[], bool] = lambda: False
    asker: Asker | None = None
    advice: str = "ask for fewer max_tokens, shorten the prompt, or let the daemon use more memory"
    order: int = 0
    passed: int = 0
    told: bool = False
    until: float | None = None  # it is hopeless, and refused then

    @property
    def rank(self) -> tuple[bool, int, int]:
        """The least is first."""
        return self.passed < PASSES, _RANKS[self.command.get("priority", "normal")] if self.passed < PASSES else 0, self.order


class Line:
    """Requests that wait. ``start``, ``refuse`` and ``queued`` are of the ``Asker`` of those that have none of their own; ``short`` tells
    the daemon by how many bytes the allowance is too small for the first.
    """

    def __init__(
        self,
        account: Account,
        start: Callable[[Waiting, int | None], None],
        refuse: Callable[[Waiting, Exception], None],
        queued: Callable[[Waiting, Message], None],
        short: Callable[[int], None],
    ) -> None:
        self._account, self._asker, self._short = account, Asker(start, refuse, queued), short
        self.waiting: list[Waiting] = []
        self._orders = 0
        self._told = 0
        self._looked = 0.0

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, one: Waiting) -> None:
        """Join it; ``admit`` follows."""
        self._orders += 1
        one.order = self._orders
        self.waiting.append(one)

    def leave(self, one: Waiting, error: Exception) -> None:
        """It does not want to wait any longer."""
        self.waiting.remove(one)
        self._asker_of(one).refuse(one, error)

    def withdraw(self, one: Waiting) -> None:
        """Its asker does not want it to wait, and needs no error."""
        self.waiting.remove(one)

    def _asker_of(self, one: Waiting) -> Asker:
        return one.asker or self._asker

    def admit(self) -> bool:
        """Let in whoever fits now; whether anybody did."""
        started, self._looked = False, time.monotonic()
        for one in sorted(self.waiting, key=lambda one: one.rank):
            if not one.ready():
                continue
            room = self._room(one)
            if room is not None:
                self.waiting.remove(one)
                for other in self.waiting:
                    other.passed += other.order < one.order
                self._asker_of(one).start(one, room if room < one.need.cells else None)
                started = True
            elif one.cancelled():
                self.leave(one, Cancelled("the request was cancelled before it began"))
            elif not self._waits(one):
                continue
            elif one.passed >= PASSES:
                break
        self._tell_short()
        return started

    def allowed(self) -> None:
        """The allowance was set, for those too who hoped for more of it."""
        for one in list(self.waiting):
            if one.until is not None:
                one.until = 0.0

    def due(self) -> float | None:
        """When ``admit`` is to be called at the latest, on the monotonic clock."""
        if not self.waiting:
            return None
        return min([self._looked + LOOK_EVERY, *(one.until for one in self.waiting if one.until is not None)])

    def _room(self, one: Waiting) -> int | None:
        """Cells that it may begin with, after memory was freed for them; None if it does not fit."""
        account, need = self._account, one.need
        if account.missing(need, one.name) <= 0:
            return need.cells
        if account.missing_at_best(need, one.name, alone=False) <= 0 and account.free_for(need, one.name):
            return need.cells
        if need.least < need.cells and (cells := account.cells(need, one.name)) and account.free_for(need._replace(cells=cells), one.name):
            return cells
        return None

    def _waits(self, one: Waiting) -> bool:
        """It does not fit: it waits, and its client knows; or it is refused, because it never will."""
        account, least = self._account, one.need._replace(cells=one.need.least)
        needed, missing = account.bytes(least, one.name), account.missing_at_best(least, one.name, alone=True)
        if missing <= 0:
            one.until = None
            if not one.told:
                one.told = True
                available = max(0, needed - account.missing_at_best(least, one.name, alone=False))
                reason = "the memory is promised to other requests; it begins when some of them have ended"
                self._asker_of(one).queued(one, {"event": "queued", "reason": reason, "needed": needed, "available": available})
            return True
        now = time.monotonic()
        if one.until is None:
            one.until = now + PATIENCE
        if now < one.until:
            return True
        available = max(0, needed - missing)
        self.leave(one, ProtocolError(
            "out_of_memory",
            f"the request needs {format_size(needed)} of memory and can have {format_size(available)}; {one.advice}",
            needed=needed, available=available,
        ))  # fmt: skip
        return False

    def _tell_short(self) -> None:
        """By how much the allowance is too small for the first that waits; once for each change."""
        first = min(self.waiting, key=lambda one: one.rank, default=None)
        least = None if first is None else first.need._replace(cells=first.need.least)
        short = 0 if first is None or least is None else max(0, self._account.missing_at_best(least, first.name, alone=False))
        if short != self._told:
            self._told = short
            self._short(short)
