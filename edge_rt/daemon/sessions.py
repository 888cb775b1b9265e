"""The sessions that the daemon knows of: whose they are, how long they stay, and what became of them when the worker died."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.errors import ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.channel import Channel
    from edge_rt.daemon.frames import Message
    from edge_rt.daemon.hosted import Hosted


@dataclass(eq=False)
class Known:
    """A session. ``epoch``: the life of the worker that has it. ``saved``: where it was saved last. ``busy``: it answers a request.

    ``lost``: why it could not go on from where it was saved, if it could not.

    ``parked``: where the worker put it when nobody asked anything of it. ``context``: cells that it was opened with. ``used``: there is
    something in it that could be lost.
    """

    user: int
    hosted: Hosted
    keep: bool
    epoch: int
    connection: Channel | None
    saved: Path | None = None
    context: int | None = None
    used: bool = False
    parked: Path | None = None
    lost: str = ""
    saved_later: bool = False
    busy: bool = False
    expiry: asyncio.TimerHandle | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))

    @property
    def last_save(self) -> Path | None:
        """What it goes on from when the worker has died."""
        parked = self.parked if self.parked is not None and self.parked.exists() else None
        return self.saved if parked is None or (self.saved_later and self.saved is not None) else parked

    def lose(self, source: Path, why: str) -> None:
        """It cannot go on from this file, which is not tried again."""
        self.lost = why
        self.saved = None if self.saved == source else self.saved
        if self.parked == source:
            source.unlink(missing_ok=True)
            self.parked = None

    def explained(self, error: Message) -> Message:
        """An error of a request in it, with why it was lost if it was."""
        if error["code"] != "session_lost" or not self.lost:
            return error
        return {**error, "message": f"the session was lost: {self.lost}"}


class Sessions:
    """``forget(session)`` is called for each that closes."""

    def __init__(self, per_user: int, keep: float, forget: Callable[[Known], None]) -> None:
        self._known: dict[str, Known] = {}
        self._per_user, self._keep, self._forget = per_user, keep, forget

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def add(
        self, user: int, hosted: Hosted, keep: bool, connection: Channel, *,
        saved: Path | None = None, context: int | None = None, used: bool = False,
    ) -> Known:  # fmt: skip
        """A new session. Raises ProtocolError: limit."""
        if len(self.of(user)) >= self._per_user:
            raise ProtocolError("limit", f"a user may have {self._per_user} sessions; close one")
        one = Known(user, hosted, keep, hosted.supervisor.epoch, connection, saved, context, used)
        self._known[one.id] = one
        return one

    def get(self, name: str, user: int, connection: Channel) -> Known:
        """A session of the user's; from now on it is this connection's. Raises ProtocolError: no_such_session, whoever's it is."""
        one = self._known.get(name)
        if one is None or one.user != user:
            raise ProtocolError("no_such_session", "there is no such session; open one")
        if one.connection is None or one.keep:
            one.connection = connection
        if one.expiry is not None:
            one.expiry.cancel()
            one.expiry = None
        return one

    def of(self, user: int) -> list[Known]:
        """The sessions of one user, the oldest first."""
        return [one for one in self._known.values() if one.user == user]

    def close(self, one: Known) -> None:
        """Forget a session."""
        if self._known.pop(one.id, None) is not None:
            if one.expiry is not None:
                one.expiry.cancel()
            if one.parked is not None:
                one.parked.unlink(missing_ok=True)
            self._forget(one)

    def saved(self, one: Known, path: Path) -> None:
        """A session was saved; what another saved there is no more."""
        self.unsaved(path)
        one.saved, one.saved_later = path, True

    def unsaved(self, path: Path) -> None:
        """What was saved there is no more: nobody goes on from it."""
        for one in self._known.values():
            if one.saved == path:
                one.saved = None

    def parked(self, name: str, path: Path) -> None:
        """A worker has put a session there."""
        if (one := self._known.get(name)) is not None:
            one.parked, one.saved_later = path, False

    def left(self, connection: Channel) -> None:
        """A connection has ended: its sessions close, those to be kept after a while."""
        for one in [one for one in self._known.values() if one.connection is connection]:
            if not one.keep:
                self.close(one)
                continue
            one.connection = None
            self._expire_later(one)

    def _expire_later(self, one: Known) -> None:
        one.expiry = asyncio.get_running_loop().call_later(self._keep, self._expire, one)

    def _expire(self, one: Known) -> None:
        """Nobody has come back for it; unless it answers somebody whose connection was not the last to name it."""
        if one.busy:
            self._expire_later(one)
        else:
            self.close(one)
