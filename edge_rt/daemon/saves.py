"""Sessions that users have saved: a folder for each user, a file for each name."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

from edge_rt.errors import ProtocolError, UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX = ".session"


class Save(NamedTuple):
    """A saved session: its ``name``, the ``bytes`` of its file, and when it was ``saved``, in seconds since 1970."""

    name: str
    bytes: int
    saved: float


def file_of(state: Path, user: int, name: str) -> Path:
    """Where a user's session of a name is saved. Raises ProtocolError: option."""
    if not _NAME.fullmatch(name):
        raise ProtocolError("option", "the name of a saved session is 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or a digit")
    return _folder(state, user) / f"{name}{_SUFFIX}"


def _folder(state: Path, user: int) -> Path:
    return state / str(user)


def saves_of(state: Path, user: int) -> list[Save]:
    """A user's saved sessions by name. Raises UserError if the folder cannot be read."""
    found, folder = [], _folder(state, user)
    try:
        for path in sorted(folder.iterdir()) if folder.exists() else ():
            if path.suffix == _SUFFIX and _NAME.fullmatch(path.stem):  # else it is one that is being written
                with contextlib.suppress(FileNotFoundError):  # it was removed by hand just now
                    facts = path.stat()
                    found.append(Save(path.stem, facts.st_size, facts.st_mtime))
    except OSError as error:
        raise UserError(f"saved sessions cannot be listed: {(error.strerror or str(error)).lower()}") from error
    return found


def delete(path: Path, name: str) -> None:
    """Remove a saved session. Raises ProtocolError: session_file if there is none; UserError if the disk says no."""
    try:
        path.unlink()
    except FileNotFoundError as error:
        raise nothing_saved(name) from error
    except OSError as error:
        raise UserError(f"the saved session {name} cannot be deleted: {(error.strerror or str(error)).lower()}") from error


def nothing_saved(name: str) -> ProtocolError:
    """There is no saved session of this name."""
    return ProtocolError("session_file", f"there is no saved session {name}; list_saved says which there are")
