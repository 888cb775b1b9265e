"""What the worker's memory is promised to: caches of sessions, shared beginnings, and what requests under way may yet take.

A request is let in only if all that it can come to hold fits beside all that the others can (``PredictsMemory`` of core/engine.py), so
nobody runs out of memory in the middle of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from edge_rt.core.context.manager import spare
from edge_rt.core.engine import PredictsMemory
from edge_rt.core.generate.scheduler import MAX_PARTS

if TYPE_CHECKING:
    from typing import Concatenate, ParamSpec

    from edge_rt.core.engine import Engine
    from edge_rt.daemon.store import Store
    from edge_rt.model import Model
    from edge_rt.session import Session
    from edge_rt.types import Pruning

    _P = ParamSpec("_P")

_T = TypeVar("_T")
LITTLE = 512
"""Cells of a request as small as many are."""
WORTH_ANSWERING = 64
"""Cells for an answer of unknown length that are fewer than it was offered: with fewer than these it waits."""


class Need(NamedTuple):
    """What a request asks for: ``cells`` at most, and with ``least`` it may go on too. ``rows`` of logits in a step."""

    cells: int
    least: int
    pruned: bool = False
    rows: int = 1


def need(prompt: int, asked: int, max_tokens: int | None, prune: Pruning | None, engine: Engine, drafts: int) -> Need:
    """Of a request whose prompt has so many tokens, and that may use ``asked`` cells. ``drafts``: tokens that it feeds on trial."""
    cells = asked if max_tokens is None else min(asked, prompt + max(1, max_tokens))
    least = cells if max_tokens is not None else min(cells, prompt + WORTH_ANSWERING)
    if prune is not None:
        from edge_rt.core.kv.pruning import LONGEST, budget_cells

        keep = max(1, min(budget_cells(prune, cells, getattr(engine, "cell_bytes", None)), cells))
        cells = min(cells, keep + spare(keep) + engine.info.chunk) + LONGEST  # of the question, fed for a pass before their turn
        least = cells
    return Need(cells, least, prune is not None, 1 + drafts)


@dataclass(eq=False)
class Promise:
    """What a request that runs may come to hold. ``session`` is the one it runs in, None for a text that is only read."""

    need: Need
    session: Session | None
    bytes: int


def _locked(method: Callable[Concatenate[Account, _P], _T]) -> Callable[Concatenate[Account, _P], _T]:
    """Holds the engine's lock: a request that begins on another thread may be changing its cells."""

    @wraps(method)
    def call(self: Account, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self.lock:
            return method(self, *args, **kwargs)

    return call


class Account:
    """``allowance``: bytes for caches and compute, None for no limit. ``lock`` is the engine's."""

    def __init__(self, model: Model, store: Store, allowance: int | None) -> None:
        self.allowance, self.lock = allowance, model.lock
        self.promises: list[Promise] = []
        self._model, self._store = model, store
        self._engine = model.engine if isinstance(model.engine, PredictsMemory) else None

    @property
    def limited(self) -> bool:
        """Whether anything is refused."""
        return self.allowance is not None and self._engine is not None

    @_locked
    def held(self) -> int:
        """Bytes that caches and steps hold now."""
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
        cells = min(LITTLE, self._model.info.max_context)
        return self._engine.needed_bytes(None, cells) + self._engine.compute_bytes(cells, 1, 1)

    @_locked
    def parts(self) -> dict[str, int]:
        """``reserved`` by what it is for."""
        if self._engine is None:
            return {}
        return {"idle": self._idle(), "shared": self._shared(), "running": self._promised(), "compute": self._compute(())}

    # ---- what a request would add ------------------------------------------------------------------------------------

    @_locked
    def missing(self, asked: Need, name: str | None) -> int:
        """Bytes that there are too few of for a request in the session of this name; 0 or less: it fits."""
        if self._engine is None or self.allowance is None:
            return 0
        session = self._session(name)
        total = self._idle() + self._shared() + self._promised() + self._compute([asked]) + self.bytes(asked, name)
        if session is not None and not self._shared():  # else a shared beginning may take the place of its cells, which then are shared
            total -= self._of(session)
        return total - self.allowance

    @_locked
    def missing_at_best(self, asked: Need, name: str | None, *, alone: bool) -> int:
        """The same once all that can be freed or parked is; ``alone``: and once the requests that run have ended."""
        if self._engine is None or self.allowance is None:
            return 0
        staying = 0 if self._store.parks else self._idle() - self._of(self._session(name))
        if alone:
            busy = 0 if self._store.parks else sum(self._of(one.session) for one in self.promises)
            return staying + busy + self._compute([asked], running=False) + self.bytes(asked, name) - self.allowance
        return staying + self._promised() + self._compute([asked]) + self.bytes(asked, name) - self.allowance

    @_locked
    def bytes(self, asked: Need, name: str | None) -> int:
        """The most that a request holds."""
        assert self._engine is not None, "only engines that predict are asked"
        session, cells = self._session(name), asked.cells
        if session is None and name is not None and (parked := self._store.parked.get(name)) is not None:
            cells = max(cells, parked.cells + 1)  # it comes back as it was
        sequence = None if session is None else session.sequence
        return self._engine.needed_bytes(sequence, cells, pruned=asked.pruned)

    def cells(self, asked: Need, name: str | None) -> int:
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
    def bytes_of(self, cells: int) -> int:
        """What a session of so many cells takes that nothing runs in."""
        return 0 if self._engine is None else self._engine.needed_bytes(None, cells + 1)

    # ---- freeing -----------------------------------------------------------------------------------------------------

    def free(self, wanted: int, but: str | None = None) -> bool:
        """Free shared beginnings, then park idle sessions (``but`` this one) until ``wanted`` more bytes fit; whether they do now."""
        return self._free(lambda: self.over(wanted), but)

    def over(self, more: int) -> int:
        """By how many bytes the allowance would be exceeded with ``more``."""
        return 0 if self.allowance is None else self.reserved() + more - self.allowance

    def free_for(self, asked: Need, name: str | None) -> bool:
        """The same for a request."""
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

    # ---- sums --------------------------------------------------------------------------------------------------------

    def _session(self, name: str | None) -> Session | None:
        return None if name is None else self._store.live.get(name)

    def _of(self, session: Session | None) -> int:
        if session is None or session.sequence is None or self._engine is None:
            return 0
        return self._engine.sequence_bytes(session.sequence)

    def _idle(self) -> int:
        return sum(self._of(self._store.live[name]) for name in self._store.idle())

    def _shared(self) -> int:
        assert self._engine is not None, "only engines that predict are asked"
        return sum(map(self._engine.sequence_bytes, self._model.prefixes.sequences))

    def _promised(self) -> int:
        return sum(max(one.bytes, self._of(one.session)) for one in self.promises)

    def _compute(self, more: Iterable[Need], *, running: bool = True) -> int:
        """What steps take with these requests too."""
        assert self._engine is not None, "only engines that predict are asked"
        all_of_them = [*(one.need for one in self.promises if running), *more]
        now = self._engine.held_bytes()[1]
        if not all_of_them:
            return now
        cells, rows = max(one.cells for one in all_of_them), sum(one.rows for one in all_of_them)
        return max(now, self._engine.compute_bytes(cells, min(MAX_PARTS, len(all_of_them)), rows))
