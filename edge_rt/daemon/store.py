"""The worker's sessions: those that have their cells in memory, and those that are parked in files until they are asked for again."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.context import session_file
from edge_rt.core.context.session_file import not_saved
from edge_rt.errors import OptionError, ProtocolError, SessionFileError, UserError

if TYPE_CHECKING:
    from edge_rt.daemon.frames import Message
    from edge_rt.model import Model
    from edge_rt.session import Session

FULL_SECONDS = 5.0
"""After a disk was full, for so long no other session is parked."""
_SUFFIX = ".session"
COUNTED = ("evicted_segments", "recalled_segments", "pruned_cells")
"""What is counted of each session, over its requests."""


class Parked(NamedTuple):
    """A session whose cells are in a file: what it is opened again with, and how many cells it will have."""

    owner: str
    context: int | None
    cells: int


class Store:
    """Sessions by the names that the daemon gave them. ``live`` has the least recently used first; ``busy`` are those with a request
    that runs.

    The file of a parked session stays when its cells are back in memory: should the worker die, the daemon restores from it, for which
    ``tell`` says where it is.
    """

    def __init__(
        self, model: Model, tell: Callable[[Message], None], folder: str | None = None, moved: Callable[[], None] = lambda: None
    ) -> None:  # fmt: skip
        """``folder``: None if sessions cannot be parked. ``moved`` is called while files are written and read. Raises OptionError."""
        self.live: dict[str, Session] = {}
        self.parked: dict[str, Parked] = {}
        self.busy: set[str] = set()
        self._model, self._tell, self._moved = model, tell, moved
        self.counts: dict[str, dict[str, int]] = {}
        self._folder = None if folder is None else _private(Path(folder))
        self._full_until = float("-inf")

    def __len__(self) -> int:
        return len(self.live) + len(self.parked)

    @property
    def parks(self) -> bool:
        """Whether a session can be parked, as far as that is known."""
        return self._folder is not None and time.monotonic() >= self._full_until

    def idle(self) -> Iterator[str]:
        """Sessions with cells in memory and no request that runs, least recently used first."""
        return (name for name, session in list(self.live.items()) if name not in self.busy and session.sequence is not None)

    def open(self, name: str, context: int | None, owner: str) -> None:
        """A new one. Raises OptionError."""
        self.live[name] = self._model.session(context=context, owner=owner)

    def known(self, name: str) -> Session | Parked:
        """A session, wherever it is. Raises ProtocolError."""
        found = self.live.get(name) or self.parked.get(name)
        if found is None:  # the daemon asks for sessions it knows of: one that could not be restored
            raise ProtocolError("session_lost", "the session was lost with the worker; open another")
        return found

    def use(self, name: str) -> Session:
        """A session with its cells in memory, from now on the most recently used. Raises ProtocolError, OutOfMemory."""
        found = self.known(name)
        if isinstance(found, Parked):
            found = self._back(name, found)
        self.live[name] = self.live.pop(name, found)
        return found

    def _back(self, name: str, parked: Parked) -> Session:
        """From its file. A file that is damaged costs time, and no more: requests bring the whole conversation."""
        from edge_rt import session as saved

        try:
            path = self._path(name)
            read = saved.read_session(path, self._model, self._moved)
            session = self._model.restore(path, context=parked.context, owner=parked.owner, read=read)
        except SessionFileError as error:
            logging.getLogger("edge_rt.daemon").warning("a parked session is computed again: %s", error)
            session = self._model.session(context=parked.context, owner=parked.owner)
        del self.parked[name]
        return session

    def park(self, name: str) -> bool:
        """Put an idle session's cells in a file; False if the disk does not take them: then it is as before."""
        if self._folder is None:
            return False
        session, path = self.live[name], self._path(name)
        try:
            session.save(path, durable=False, moved=self._moved)
        except UserError as error:
            logging.getLogger("edge_rt.daemon").warning("a session cannot be parked: %s", error)
            self._full_until = time.monotonic() + FULL_SECONDS
            return False
        self._is_parked(name, Parked(session.owner, session.context, session.history.cells))
        del self.live[name]
        session.close(share=False)
        return True

    def _is_parked(self, name: str, parked: Parked) -> None:
        self.parked[name] = parked
        self._tell({"parked": name, "path": str(self._path(name))})

    def close(self, name: str, *, end: bool = True) -> None:
        """End a session, if there is one of that name; nothing of it runs. Not to ``end`` it forgets it, for what begins in it."""
        self.parked.pop(name, None)
        self.busy.discard(name)
        self.counts.pop(name, None)
        if (session := self.live.pop(name, None)) is not None and end:
            session.close()
        if self._folder is not None:
            self._path(name).unlink(missing_ok=True)

    def clone(self, name: str, new: str, *, room: bool) -> None:
        """Another session that goes on from there; ``room``: there is memory for its cells. Raises ProtocolError, UserError."""
        source = self.known(name)
        if isinstance(source, Parked):
            self._copy(self._path(name), self._path(new))
            self._is_parked(new, source)
        elif room or self._folder is None:
            self.live[new] = source.clone()
        else:
            source.save(self._path(new), durable=False, moved=self._moved)
            self._is_parked(new, Parked(source.owner, source.context, source.history.cells))

    def save(self, name: str, path: Path) -> None:
        """Write a session to a file, wherever it is. Raises ProtocolError, UserError."""
        source = self.known(name)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise not_saved(path, error) from error
        if isinstance(source, Parked):
            self._copy(self._path(name), path, durable=True)
        else:
            source.save(path, moved=self._moved)

    def restore(self, name: str, path: Path, owner: str, room: Callable[[int], bool], *, context: int | None = None) -> int:
        """A session from a file; returns how many tokens its cells have. Raises SessionFileError, UserError, OutOfMemory.

        ``room`` says whether there is memory for so many cells; else it is parked at once.
        """
        from edge_rt import session as saved

        read = saved.read_session(path, self._model, self._moved)
        cells = read.history.cells
        if self._folder is None or room(cells):
            self.live[name] = self._model.restore(path, context=context, owner=owner, read=read)
        else:
            if path != self._path(name):
                self._copy(path, self._path(name))
            self._is_parked(name, Parked(owner, context, cells))
        return cells

    def noted(self, name: str, context: Message) -> None:
        """A request of a session has ended: what left its context, what came back, what was pruned."""
        sums = self.counts.setdefault(name, dict.fromkeys(COUNTED, 0))
        for field in COUNTED:
            sums[field] += context[field]

    def _copy(self, source: Path, target: Path, *, durable: bool = False) -> None:
        """Raises UserError if the disk says no."""
        beside = target.with_name(target.name + ".tmp")
        try:
            with source.open("rb") as file, beside.open("wb") as out:
                session_file.write(out, iter(partial(file.read, session_file.PIECE), b""), durable=durable, moved=self._moved)
            os.replace(beside, target)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise not_saved(target, error) from error

    def _path(self, name: str) -> Path:
        """Its name says nothing: a session's own is a secret."""
        assert self._folder is not None, "asked only where sessions can be parked"
        return self._folder / (hashlib.sha256(name.encode()).hexdigest()[:32] + _SUFFIX)


def _private(folder: Path) -> Path:
    """The folder, made for us alone. What another worker of ours left in it, the daemon may restore. Raises OptionError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise OptionError(f"the folder {folder} is another user's; choose another for parked sessions")
        folder.chmod(0o700)
    except OSError as error:
        raise OptionError(f"the folder {folder} for parked sessions cannot be used: {error.strerror}") from error
    return folder
