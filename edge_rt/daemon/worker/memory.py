"""The worker's sessions, in memory or parked in files, and the budget for their caches and for requests that run.

A request is admitted only if all that it can come to hold fits beside all that the others can (``PredictsMemory`` of core/engine.py), so
nobody runs out of memory in the middle of an answer.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from edge_rt.core.context import session_file
from edge_rt.core.context.manager import spare
from edge_rt.core.context.session_file import not_saved
from edge_rt.core.engine import PredictsMemory
from edge_rt.core.generate.scheduler import MAX_PARTS
from edge_rt.errors import OptionError, ProtocolError, SessionFileError, UserError

if TYPE_CHECKING:
    from typing import Concatenate, ParamSpec

    from edge_rt.core.engine import Engine
    from edge_rt.daemon.protocol import Message
    from edge_rt.model import Model
    from edge_rt.session import Session
    from edge_rt.types import Pruning

    _P = ParamSpec("_P")

FULL_SECONDS = 5.0  # after a disk was full, for so long no other session is parked
_SUFFIX = ".session"
COUNTED = ("evicted_segments", "recalled_segments", "pruned_cells")  # what is counted of each session, over its requests


class ParkedSession(NamedTuple):
    """A session whose cells are in a file: what it is opened again with, and how many cells it will have."""

    owner: str
    context: int | None
    cells: int


class SessionStore:
    """Sessions by the names that the daemon gave them. ``live`` has the least recently used first; ``busy`` are those with a request
    that runs.

    The file of a parked session stays when its cells are back in memory: should the worker die, the daemon restores from it, for which
    ``send`` says where it is.
    """

    def __init__(
        self, model: Model, send: Callable[[Message], None], folder: str | None = None, moved: Callable[[], None] = lambda: None
    ) -> None:  # fmt: skip
        """``folder``: None if sessions cannot be parked. ``moved`` is called while files are written and read. Raises OptionError."""
        self.live: dict[str, Session] = {}
        self.parked: dict[str, ParkedSession] = {}
        self.busy: set[str] = set()
        self._model, self._send, self._moved = model, send, moved
        self.counts: dict[str, dict[str, int]] = {}
        self._folder = None if folder is None else _private_folder(Path(folder))
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

    def known(self, name: str) -> Session | ParkedSession:
        """A session, wherever it is. Raises ProtocolError."""
        found = self.live.get(name) or self.parked.get(name)
        if found is None:  # the daemon asks for sessions it knows of: one that could not be restored
            raise ProtocolError("session_lost", "the session was lost with the worker; open another")
        return found

    def use(self, name: str) -> Session:
        """A session with its cells in memory, from now on the most recently used. Raises ProtocolError, OutOfMemory."""
        found = self.known(name)
        if isinstance(found, ParkedSession):
            found = self._unpark(name, found)
        self.live[name] = self.live.pop(name, found)
        return found

    def _unpark(self, name: str, parked: ParkedSession) -> Session:
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
        self._mark_parked(name, ParkedSession(session.owner, session.context, session.history.cells))
        del self.live[name]
        session.close(share=False)
        return True

    def _mark_parked(self, name: str, parked: ParkedSession) -> None:
        self.parked[name] = parked
        self._send({"parked": name, "path": str(self._path(name))})

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
        if isinstance(source, ParkedSession):
            self._copy(self._path(name), self._path(new))
            self._mark_parked(new, source)
        elif room or self._folder is None:
            self.live[new] = source.clone()
        else:
            source.save(self._path(new), durable=False, moved=self._moved)
            self._mark_parked(new, ParkedSession(source.owner, source.context, source.history.cells))

    def save(self, name: str, path: Path) -> None:
        """Write a session to a file, wherever it is. Raises ProtocolError, UserError."""
        source = self.known(name)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise not_saved(path, error) from error
        if isinstance(source, ParkedSession):
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
            self._mark_parked(name, ParkedSession(owner, context, cells))
        return cells

    def add_counts(self, name: str, context: Message) -> None:
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


def _private_folder(folder: Path) -> Path:
    """The folder, made for us alone. What another worker of ours left in it, the daemon may restore. Raises OptionError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise OptionError(f"the folder {folder} is another user's; choose another for parked sessions")
        folder.chmod(0o700)
    except OSError as error:
        raise OptionError(f"the folder {folder} for parked sessions cannot be used: {error.strerror}") from error
    return folder


_T = TypeVar("_T")
SMALL_REQUEST_CELLS = 512  # cells of a request as small as many are
MIN_ANSWER_CELLS = 64  # cells for an answer of unknown length that are fewer than it was offered: with fewer than these it waits


class MemoryRequest(NamedTuple):
    """What a request asks for: ``cells`` at most, and with ``least`` it may go on too. ``rows`` of logits in a step."""

    cells: int
    least: int
    pruned: bool = False
    rows: int = 1


def memory_request(prompt: int, asked: int, max_tokens: int | None, prune: Pruning | None, engine: Engine, drafts: int) -> MemoryRequest:
    """Of a request whose prompt has so many tokens, and that may use ``asked`` cells. ``drafts``: tokens that it feeds on trial."""
    cells = asked if max_tokens is None else min(asked, prompt + max(1, max_tokens))
    least = cells if max_tokens is not None else min(cells, prompt + MIN_ANSWER_CELLS)
    if prune is not None:
        from edge_rt.core.kv.pruning import LONGEST, budget_cells

        keep = max(1, min(budget_cells(prune, cells, getattr(engine, "cell_bytes", None)), cells))
        cells = min(cells, keep + spare(keep) + engine.info.chunk) + LONGEST  # of the question, fed for a pass before their turn
        least = cells
    return MemoryRequest(cells, least, prune is not None, 1 + drafts)


@dataclass(eq=False)
class Reservation:
    """What a request that runs may come to hold. ``session`` is the one it runs in, None for a text that is only read."""

    need: MemoryRequest
    session: Session | None
    bytes: int


def _locked(method: Callable[Concatenate[MemoryBudget, _P], _T]) -> Callable[Concatenate[MemoryBudget, _P], _T]:
    """Holds the engine's lock: a request that begins on another thread may be changing its cells."""

    @wraps(method)
    def call(self: MemoryBudget, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self.lock:
            return method(self, *args, **kwargs)

    return call


class MemoryBudget:
    """``allowance``: bytes for caches and compute, None for no limit. ``lock`` is the engine's."""

    def __init__(self, model: Model, store: SessionStore, allowance: int | None) -> None:
        self.allowance, self.lock = allowance, model.lock
        self.reservations: list[Reservation] = []
        self._model, self._store = model, store
        self._engine = model.engine if isinstance(model.engine, PredictsMemory) else None

    @property
    def limited(self) -> bool:
        """Whether anything is refused."""
        return self.allowance is not None and self._engine is not None

    @_locked
    def held(self) -> int:
        return 0 if self._engine is None else sum(self._engine.held_bytes())

    @_locked
    def reserved(self) -> int:
        """Bytes that all there is now may come to hold: never less than ``held``."""
        return 0 if self._engine is None else self._idle() + self._shared() + self._promised() + self._compute(())

    @_locked
    def least(self) -> int:
        """Bytes without which hardly any request can be answered: for one of ``LITTLE`` cells; 0 if that is not known."""
        if self._engine is None:
            return 0
        cells = min(SMALL_REQUEST_CELLS, self._model.info.max_context)
        return self._engine.needed_bytes(None, cells) + self._engine.compute_bytes(cells, 1, 1)

    @_locked
    def parts(self) -> dict[str, int]:
        """``reserved`` by what it is for."""
        if self._engine is None:
            return {}
        return {"idle": self._idle(), "shared": self._shared(), "running": self._promised(), "compute": self._compute(())}

    @_locked
    def missing(self, asked: MemoryRequest, name: str | None) -> int:
        """Bytes that there are too few of for a request in the session of this name; 0 or less: it fits."""
        if self._engine is None or self.allowance is None:
            return 0
        session = self._session(name)
        total = self._idle() + self._shared() + self._promised() + self._compute([asked]) + self.bytes(asked, name)
        if session is not None and not self._shared():  # else a shared beginning may take the place of its cells, which then are shared
            total -= self._bytes_of(session)
        return total - self.allowance

    @_locked
    def missing_at_best(self, asked: MemoryRequest, name: str | None, *, alone: bool) -> int:
        """The same once all that can be freed or parked is; ``alone``: and once the requests that run have ended."""
        if self._engine is None or self.allowance is None:
            return 0
        staying = 0 if self._store.parks else self._idle() - self._bytes_of(self._session(name))
        if alone:
            busy = 0 if self._store.parks else sum(self._bytes_of(one.session) for one in self.reservations)
            return staying + busy + self._compute([asked], running=False) + self.bytes(asked, name) - self.allowance
        return staying + self._promised() + self._compute([asked]) + self.bytes(asked, name) - self.allowance

    @_locked
    def bytes(self, asked: MemoryRequest, name: str | None) -> int:
        assert self._engine is not None, "only engines that predict are asked"
        session, cells = self._session(name), asked.cells
        if session is None and name is not None and (parked := self._store.parked.get(name)) is not None:
            cells = max(cells, parked.cells + 1)  # it comes back as it was
        sequence = None if session is None else session.sequence
        return self._engine.needed_bytes(sequence, cells, pruned=asked.pruned)

    def cells(self, asked: MemoryRequest, name: str | None) -> int:
        """As many cells as there is room for now, at most those asked for; 0 if they are fewer than the least."""
        low, high = asked.least, asked.cells
        if self.missing_at_best(asked._replace(cells=low), name, alone=False) > 0:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            if self.missing_at_best(asked._replace(cells=middle), name, alone=False) > 0:
                high = middle - 1
            else:
                low = middle
        return low

    @_locked
    def session_bytes(self, cells: int) -> int:
        """What a session of so many cells takes that nothing runs in."""
        return 0 if self._engine is None else self._engine.needed_bytes(None, cells + 1)

    def free(self, wanted: int, but: str | None = None) -> bool:
        """Free shared beginnings, then park idle sessions (``but`` this one) until ``wanted`` more bytes fit; whether they do now."""
        return self._free(lambda: self.excess(wanted), but)

    def excess(self, more: int) -> int:
        """By how many bytes the allowance would be exceeded with ``more``."""
        return 0 if self.allowance is None else self.reserved() + more - self.allowance

    def free_for(self, asked: MemoryRequest, name: str | None) -> bool:
        return self._free(lambda: self.missing(asked, name), name)

    def _free(self, missing: Callable[[], int], but: str | None) -> bool:
        while missing() > 0:
            if not self._model.prefixes.drop() and not self._park(but):
                return False
        return True

    def _park(self, but: str | None) -> bool:
        """Park the idle session that was used least recently."""
        if not self._store.parks:
            return False
        found = next((name for name in self._store.idle() if name != but), None)
        return found is not None and self._store.park(found)

    def _session(self, name: str | None) -> Session | None:
        return None if name is None else self._store.live.get(name)

    def _bytes_of(self, session: Session | None) -> int:
        if session is None or session.sequence is None or self._engine is None:
            return 0
        return self._engine.sequence_bytes(session.sequence)

    def _idle(self) -> int:
        return sum(self._bytes_of(self._store.live[name]) for name in self._store.idle())

    def _shared(self) -> int:
        assert self._engine is not None, "only engines that predict are asked"
        return sum(map(self._engine.sequence_bytes, self._model.prefixes.sequences))

    def _promised(self) -> int:
        return sum(max(one.bytes, self._bytes_of(one.session)) for one in self.reservations)

    def _compute(self, more: Iterable[MemoryRequest], *, running: bool = True) -> int:
        assert self._engine is not None, "only engines that predict are asked"
        all_of_them = [*(one.need for one in self.reservations if running), *more]
        now = self._engine.held_bytes()[1]
        if not all_of_them:
            return now
        cells, rows = max(one.cells for one in all_of_them), sum(one.rows for one in all_of_them)
        return max(now, self._engine.compute_bytes(cells, min(MAX_PARTS, len(all_of_them)), rows))


def memory_report(model: Model, store: SessionStore, budget: MemoryBudget) -> Message:
    """Bytes by owner. All may be shown to anybody but ``by_session``, whose keys are the names of all users' sessions.

    ``weights_mapped``, ``weights_resident``, ``cache``, ``compute``, ``device``: as ``MemoryReport``. ``units``: of the weights, with
    ``name``, ``nbytes`` and ``resident``. ``promised``: what caches and steps may come to hold, by what it is for; ``held``,
    ``reserved`` and ``allowance`` are of caches and steps. ``anonymous``: of the whole process, None where the system does not say.
    ``sessions``, ``parked``: how many there are.
    """
    return {
        **model.memory()._asdict(),
        "units": [{"name": unit.name, "nbytes": unit.nbytes, "resident": unit.resident} for unit in model.units()],
        "promised": budget.parts(), "held": budget.held(), "reserved": budget.reserved(), "allowance": budget.allowance,
        "anonymous": anonymous_bytes(), "sessions": len(store), "parked": len(store.parked), "by_session": _by_session(model, store),
    }  # fmt: skip


def _by_session(model: Model, store: SessionStore) -> dict[str, Message]:
    engine = model.engine if isinstance(model.engine, PredictsMemory) else None
    found: dict[str, Message] = {}
    for name, parked in store.parked.items():
        found[name] = {"bytes": 0, "cells": parked.cells, "parked": True, **store.counts.get(name, {})}
    for name, session in store.live.items():
        sequence = session.sequence
        with model.lock:
            size = 0 if sequence is None or engine is None else engine.sequence_bytes(sequence)
        found[name] = {"bytes": size, "cells": session.history.cells, "parked": False, **store.counts.get(name, {})}
    return found


def anonymous_bytes() -> int | None:
    """Bytes of this process that no file stands behind, swapped ones included; None where the system does not say."""
    try:
        with open("/proc/self/status") as lines:
            sizes = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:"))]
    except OSError:
        return None
    return 1024 * sum(sizes) if sizes else None
