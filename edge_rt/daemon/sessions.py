"""Sessions as the daemon knows them: whose they are, when they expire, where they are saved, and what became of them when a worker died."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.errors import ProtocolError, UserError

if TYPE_CHECKING:
    from edge_rt.daemon.connection import ClientConnection
    from edge_rt.daemon.models import ManagedModel
    from edge_rt.daemon.protocol import Message


@dataclass(eq=False)
class ClientSession:
    """A session. ``epoch``: the life of the worker that has it. ``saved``: where it was saved last. ``busy``: it answers a request.

    ``lost``: why it could not go on from where it was saved, if it could not.

    ``parked``: where the worker put it when nobody asked anything of it. ``context``: cells that it was opened with. ``used``: there is
    something in it that could be lost.
    """

    user: int
    hosted: ManagedModel
    keep: bool
    epoch: int
    connection: ClientConnection | None
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

    def mark_lost(self, source: Path, why: str) -> None:
        """It cannot go on from this file, which is not tried again."""
        self.lost = why
        self.saved = None if self.saved == source else self.saved
        if self.parked == source:
            source.unlink(missing_ok=True)
            self.parked = None

    def explain(self, error: Message) -> Message:
        """An error of a request in it, with why it was lost if it was."""
        if error["code"] != "session_lost" or not self.lost:
            return error
        return {**error, "message": f"the session was lost: {self.lost}"}


class SessionRegistry:
    """``forget(session)`` is called for each that closes."""

    def __init__(self, per_user: int, keep: float, forget: Callable[[ClientSession], None]) -> None:
        self._known: dict[str, ClientSession] = {}
        self._per_user, self._keep, self._forget = per_user, keep, forget

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def add(
        self, user: int, hosted: ManagedModel, keep: bool, connection: ClientConnection, *,
        saved: Path | None = None, context: int | None = None, used: bool = False,
    ) -> ClientSession:  # fmt: skip
        """A new session. Raises ProtocolError: limit."""
        if len(self.by_user(user)) >= self._per_user:
            raise ProtocolError("limit", f"a user may have {self._per_user} sessions; close one")
        one = ClientSession(user, hosted, keep, hosted.supervisor.epoch, connection, saved, context, used)
        self._known[one.id] = one
        return one

    def get(self, name: str, user: int, connection: ClientConnection) -> ClientSession:
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

    def by_user(self, user: int) -> list[ClientSession]:
        """The sessions of one user, the oldest first."""
        return [one for one in self._known.values() if one.user == user]

    def close(self, one: ClientSession) -> None:
        if self._known.pop(one.id, None) is not None:
            if one.expiry is not None:
                one.expiry.cancel()
            if one.parked is not None:
                one.parked.unlink(missing_ok=True)
            self._forget(one)

    def note_saved(self, one: ClientSession, path: Path) -> None:
        """A session was saved; what another saved there is no more."""
        self.note_deleted(path)
        one.saved, one.saved_later = path, True

    def note_deleted(self, path: Path) -> None:
        """What was saved there is no more: nobody goes on from it."""
        for one in self._known.values():
            if one.saved == path:
                one.saved = None

    def note_parked(self, name: str, path: Path) -> None:
        if (one := self._known.get(name)) is not None:
            one.parked, one.saved_later = path, False

    def leave(self, connection: ClientConnection) -> None:
        """A connection has ended: its sessions close, those to be kept after a while."""
        for one in [one for one in self._known.values() if one.connection is connection]:
            if not one.keep:
                self.close(one)
                continue
            one.connection = None
            self._expire_later(one)

    def _expire_later(self, one: ClientSession) -> None:
        one.expiry = asyncio.get_running_loop().call_later(self._keep, self._expire, one)

    def _expire(self, one: ClientSession) -> None:
        """Nobody has come back for it; unless it answers somebody whose connection was not the last to name it."""
        if one.busy:
            self._expire_later(one)
        else:
            self.close(one)


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX = ".session"


class SavedSession(NamedTuple):
    """A saved session: its ``name``, the ``bytes`` of its file, and when it was ``saved``, in seconds since 1970."""

    name: str
    bytes: int
    saved: float


def saved_session_path(state: Path, user: int, name: str) -> Path:
    """Where a user's session of a name is saved. Raises ProtocolError: option."""
    if not _NAME.fullmatch(name):
        raise ProtocolError("option", "the name of a saved session is 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or a digit")
    return _folder(state, user) / f"{name}{_SUFFIX}"


def _folder(state: Path, user: int) -> Path:
    return state / str(user)


def list_saved_sessions(state: Path, user: int) -> list[SavedSession]:
    """A user's saved sessions by name. Raises UserError if the folder cannot be read."""
    found, folder = [], _folder(state, user)
    try:
        for path in sorted(folder.iterdir()) if folder.exists() else ():
            if path.suffix == _SUFFIX and _NAME.fullmatch(path.stem):  # else it is one that is being written
                with contextlib.suppress(FileNotFoundError):  # it was removed by hand just now
                    facts = path.stat()
                    found.append(SavedSession(path.stem, facts.st_size, facts.st_mtime))
    except OSError as error:
        raise UserError(f"saved sessions cannot be listed: {(error.strerror or str(error)).lower()}") from error
    return found


def delete_saved_session(path: Path, name: str) -> None:
    """Remove a saved session. Raises ProtocolError: session_file if there is none; UserError if the disk says no."""
    try:
        path.unlink()
    except FileNotFoundError as error:
        raise no_saved_session(name) from error
    except OSError as error:
        raise UserError(f"the saved session {name} cannot be deleted: {(error.strerror or str(error)).lower()}") from error


def no_saved_session(name: str) -> ProtocolError:
    """There is no saved session of this name."""
    return ProtocolError("session_file", f"there is no saved session {name}; list_saved says which there are")
