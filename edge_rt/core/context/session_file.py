"""Saved sessions: what was said and the cells in one file, checked against engine, model and version before a byte of it is used.

Layout: magic, length of the header, SHA-256 of all that follows, msgpack header, cells.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from io import BufferedWriter
from pathlib import Path
from typing import NamedTuple

from edge_rt.core.context.history import Condensed, Evicted, SequenceState
from edge_rt.errors import SessionFileError, SessionMismatch, UserError

FORMAT = 4
_PREFIX = struct.Struct("<8sI32s")
_MAGIC = b"EDGESESS"
PIECE = 4 << 20
"""Bytes that are written, read or summed between two calls of ``moved``."""
SYNC_EVERY = 16 * PIECE
"""Bytes that the system may hold back from a disk that is to have them all, so that the last wait is no longer than the others."""

Moved = Callable[[], None]
"""Called while something long goes on."""


def _nothing() -> None:
    """Nobody watches."""


class MadeWith(NamedTuple):
    """The adapter that cells were made with: what it was called, the key of its content, and how often it was applied."""

    name: str
    key: str
    scale: float


class SavedSession(NamedTuple):
    """What a file holds: ``cells`` are the engine's own export, those of the tokens that were not evicted."""

    engine: str
    model: str
    history: SequenceState
    cells: bytes | memoryview
    adapter: MadeWith | None = None


def save(path: Path, session: SavedSession, *, durable: bool = True, moved: Moved = _nothing) -> None:
    """Write a session file beside its name, then rename it into place. Raises UserError if the disk says no.

    ``durable``: it is on the disk then, and not only with the system. ``moved`` is called after each piece.
    """
    import msgpack

    header = msgpack.packb(
        {
            "format": FORMAT,
            "engine": session.engine,
            "model": session.model,
            "tokens": session.history.tokens,
            "evicted": session.history.evicted,
            "condensed": session.history.condensed,
            "adapter": session.adapter,
        }
    )
    digest = hashlib.sha256(header)
    for piece in pieces(session.cells):  # not joined with it: there may be as many bytes of them as there is memory
        digest.update(piece)
        moved()
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        with os.fdopen(descriptor, "wb") as out:
            out.write(_PREFIX.pack(_MAGIC, len(header), digest.digest()))
            out.write(header)
            write(out, pieces(session.cells), durable=durable, moved=moved)
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise not_saved(path, error) from error


def not_saved(path: Path, error: OSError) -> UserError:
    """The disk says no."""
    return UserError(f"cannot save the session to {path}: {error.strerror}; choose another place or free space")


def load(path: Path, *, engine: str, model: str, moved: Moved = _nothing) -> SavedSession:
    """Read and check a session file; ``moved`` is called after each piece. Raises SessionFileError, SessionMismatch."""
    import msgpack

    try:
        data = _read(path, moved)
    except OSError as error:
        raise SessionFileError(f"cannot read the session {path}: {error.strerror}") from error
    if len(data) < _PREFIX.size or data[:8] != _MAGIC:
        raise SessionFileError(f"{path} is not a saved session; choose a file written by --session or Session.save")
    _, length, digest = _PREFIX.unpack_from(data)
    if length > len(data) - _PREFIX.size or _digest(data[_PREFIX.size :], moved) != digest:
        raise SessionFileError(f"the session {path} is damaged or cut short; start a new session")
    try:
        header = msgpack.unpackb(data[_PREFIX.size : _PREFIX.size + length])
        if header["format"] != FORMAT:
            raise SessionMismatch(f"the session {path} has format {header['format']}, this version reads {FORMAT}; start a new session")
        evicted = [Evicted(int(start), int(end), str(text), float(score)) for start, end, text, score in header["evicted"]]
        tokens, missing = header["condensed"]
        history = SequenceState([int(token) for token in header["tokens"]], evicted, Condensed(int(tokens), int(missing)))
        adapter = None if header["adapter"] is None else _made_with(*header["adapter"])
        found = SavedSession(str(header["engine"]), str(header["model"]), history, data[_PREFIX.size + length :], adapter)
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
        raise SessionFileError(f"the header of the session {path} is damaged; start a new session") from error
    if found.engine != engine:
        raise SessionMismatch(f"the session {path} was saved by the engine {found.engine}, not {engine}; open the model with it")
    if found.model != model:
        raise SessionMismatch(
            f"the session {path} belongs to another model, or to what this one's file was before; open that one, or start a new session"
        )
    return found


def pieces(data: bytes | memoryview) -> Iterator[memoryview]:
    """The data, ``PIECE`` bytes at a time."""
    view = memoryview(data).cast("B")
    return (view[start : start + PIECE] for start in range(0, len(view), PIECE))


def write(out: BufferedWriter, data: Iterable[bytes | memoryview], *, durable: bool = False, moved: Moved = _nothing) -> None:
    """Write pieces to a file; ``durable``: they are on the disk then. ``moved`` is called after each, so that a slow disk is not taken
    for one that hangs. Raises OSError.
    """
    since = 0
    for piece in data:
        out.write(piece)
        since += len(piece)
        if durable and since >= SYNC_EVERY:
            out.flush()
            os.fsync(out.fileno())
            since = 0
        moved()
    out.flush()
    if durable:
        os.fsync(out.fileno())


def _read(path: Path, moved: Moved) -> memoryview:
    with path.open("rb") as file:
        view, length = memoryview(bytearray(os.fstat(file.fileno()).st_size)), 0
        while length < len(view) and (count := file.readinto(view[length : length + PIECE])):
            length += count
            moved()
    return view[:length]


def _digest(data: memoryview, moved: Moved) -> bytes:
    found = hashlib.sha256()
    for piece in pieces(data):
        found.update(piece)
        moved()
    return found.digest()


def _made_with(name: object, key: object, scale: object) -> MadeWith:
    return MadeWith(str(name), str(key), float(scale))  # type: ignore[arg-type]  # what is no number is damage, as elsewhere
