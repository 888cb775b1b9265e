"""Sessions to a file and back: the runtime's part of core/context/session_file.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.core.context import session_file
from edge_rt.core.engine import AppliesAdapters
from edge_rt.errors import SessionFileError

if TYPE_CHECKING:
    from edge_rt.adapters import Adapter
    from edge_rt.core.context.history import History
    from edge_rt.runtime import Model


def save(
    path: Path, model: Model, sequence: int | None, history: History, adapter: Adapter | None, *, durable: bool,
    moved: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Write a session that answers no request; ``durable``, ``moved``: see ``Session.save``. Raises UserError if the disk says no."""
    cells: bytes | memoryview = b""
    if sequence is not None:
        with model.lock:
            cells = model.engine.export_sequence(sequence)
    made_with = None if adapter is None else session_file.MadeWith(adapter.name, adapter.key, adapter.scale)
    found = session_file.SavedSession(model.info.engine, model.key, history, cells, made_with)
    session_file.save(path, found, durable=durable, moved=moved)


def read(path: Path, model: Model, moved: Callable[[], None] = lambda: None) -> session_file.SavedSession:
    """A saved session of this model; ``moved`` is called after each piece of the file. Raises SessionFileError."""
    return session_file.load(path, engine=model.info.engine, model=model.key, moved=moved)


def place(saved: session_file.SavedSession, path: Path, model: Model) -> tuple[int | None, History, Adapter | None]:
    """Its sequence, history and adapter. Raises SessionFileError, and what opening the adapter raises."""
    adapter, engine = model.adapters.saved(*saved.adapter) if saved.adapter is not None else None, model.engine
    sequence = None
    with model.lock:
        if saved.cells:
            sequence = engine.import_sequence(saved.cells)
        if (0 if sequence is None else engine.length(sequence)) != saved.history.cells:
            if sequence is not None:
                engine.free_sequence(sequence)
            raise SessionFileError(f"the session {path} has other cells than tokens; start a new session")
        if sequence is not None and adapter is not None and isinstance(engine, AppliesAdapters):
            engine.adapt(sequence, adapter.number, adapter.scale, imported=True)
    return sequence, saved.history, adapter
