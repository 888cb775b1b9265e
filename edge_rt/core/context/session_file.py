"""Saved sessions: what was said and the cells in one file, checked against engine, model and version before a byte of it is used.

Layout: magic, length of the header, SHA-256 of all that follows, msgpack header, cells.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

from edge_rt.core.context.history import Condensed, Evicted, History
from edge_rt.errors import SessionFileError, UserError

FORMAT = 4
_PREFIX = struct.Struct("<8sI32s")
_MAGIC = b"EDGESESS"


class MadeWith(NamedTuple):
    """The adapter that cells were made with: what it was called, the key of its content, and how often it was applied."""

    name: str
    key: str
    scale: float


class SavedSession(NamedTuple):
    """What a file holds: ``cells`` are the engine's own export, those of the tokens that were not evicted."""

    engine: str
    model: str
    history: History
    cells: bytes | memoryview
    adapter: MadeWith | None = None


def save(path: Path, session: SavedSession, *, durable: bool = True) -> None:
    """Write a session file beside its name, then rename it into place. Raises UserError if the disk says no.

    ``durable``: it is on the disk then, and not only with the system.
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
    digest.update(session.cells)  # not joined: there may be as many bytes of them as there is memory
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        with os.fdopen(descriptor, "wb") as out:
            out.write(_PREFIX.pack(_MAGIC, len(header), digest.digest()))
            out.write(header)
            out.write(session.cells)
            if durable:
                out.flush()
                os.fsync(out.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise not_saved(path, error) from error


def not_saved(path: Path, error: OSError) -> UserError:
    """The disk says no."""
    return UserError(f"cannot save the session to {path}: {error.strerror}; choose another place or free space")


def load(path: Path, *, engine: str, model: str) -> SavedSession:
    """Read and check a session file. Raises SessionFileError."""
    import msgpack

    try:
        data = memoryview(path.read_bytes())
    except OSError as error:
        raise SessionFileError(f"cannot read the session {path}: {error.strerror}") from error
    if len(data) < _PREFIX.size or data[:8] != _MAGIC:
        raise SessionFileError(f"{path} is not a saved session; choose a file written by --session or Session.save")
    _, length, digest = _PREFIX.unpack_from(data)
    if length > len(data) - _PREFIX.size or hashlib.sha256(data[_PREFIX.size :]).digest() != digest:
        raise SessionFileError(f"the session {path} is damaged or cut short; start a new session")
    try:
        header = msgpack.unpackb(data[_PREFIX.size : _PREFIX.size + length])
        if header["format"] != FORMAT:
            raise SessionFileError(f"the session {path} has format {header['format']}, this version reads {FORMAT}; start a new session")
        evicted = [Evicted(int(start), int(end), str(text), float(score)) for start, end, text, score in header["evicted"]]
        tokens, missing = header["condensed"]
        history = History([int(token) for token in header["tokens"]], evicted, Condensed(int(tokens), int(missing)))
        adapter = None if header["adapter"] is None else _made_with(*header["adapter"])
        found = SavedSession(str(header["engine"]), str(header["model"]), history, data[_PREFIX.size + length :], adapter)
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
        raise SessionFileError(f"the header of the session {path} is damaged; start a new session") from error
    if found.engine != engine:
        raise SessionFileError(f"the session {path} was saved by the engine {found.engine}, not {engine}; open the model with it")
    if found.model != model:
        raise SessionFileError(f"the session {path} belongs to another model; open that one, or start a new session")
    return found


def _made_with(name: object, key: object, scale: object) -> MadeWith:
    return MadeWith(str(name), str(key), float(scale))  # type: ignore[arg-type]  # what is no number is damage, as elsewhere
