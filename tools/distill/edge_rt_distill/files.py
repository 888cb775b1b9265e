"""Files that are whole or not there: written beside their place, made durable, renamed; what is said when they cannot be; locks.

The order is the usual one (write, fsync the file, rename, fsync the folder): after a crash at any moment a name holds the old
content, the new one, or nothing (Pillai et al. 2014, "All File Systems Are Not Created Equal", OSDI).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from edge_rt.hooks import UserError

PIECE = 1 << 20
"""Bytes read or written at once."""
PART = ".part"
"""How the name of a file ends that is being written."""


def is_full(error: OSError) -> bool:
    """Whether the disk, or the user's share of it, is what was lacking."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def reason(error: OSError) -> str:
    """Why, in a few words."""
    return "the disk is full" if is_full(error) else (error.strerror or str(error)).lower()


def write_error(error: OSError, place: Path, need: int = 0) -> UserError:
    """What to say of a file or folder that could not be written. ``need``: how many bytes it takes, if that is known."""
    size = f", which takes {shown_size(need)}" if need else ""
    return UserError(f"cannot write {place}{size}: {reason(error)}; make room, or choose another folder, and run the same command again")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for a file to be written to; when that went well, it takes the place of ``path``, durably.

    Whatever goes wrong, what was there before stays, and nothing else. Only one writer at a time. Raises OSError.
    """
    part = path.with_name(f"{path.name}{PART}")  # one name: what a killed process left is written over
    try:
        yield part
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file at once, in a folder that is made if it is not there. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise write_error(error, path) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder in one that exists, durably; nothing if it is there. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        sync_folder(folder.parent)


def write_temporary(folder: Path, pieces: Iterable[bytes]) -> tuple[Path, str]:
    """Write a read-only file of a name of its own into ``folder``, durably; returns it and its SHA-256. Raises OSError.

    Whatever goes wrong, also in making the pieces, nothing is left of it.
    """
    descriptor, name = tempfile.mkstemp(dir=folder)
    digest = hashlib.sha256()
    try:
        with os.fdopen(descriptor, "wb") as out:
            for piece in pieces:
                out.write(piece)
                digest.update(piece)
            out.flush()
            os.fchmod(out.fileno(), 0o444)  # content-addressed: a changed object is a damaged one
            os.fsync(out.fileno())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    return Path(name), digest.hexdigest()


def place(temporary: Path, target: Path) -> None:
    """Give a temporary file its name, durably. Raises OSError; the temporary file is gone either way."""
    try:
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_folder(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder of files. Others may do so too, or put a new file in, and then it stays with that. Raises OSError."""
    try:
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def pieces(path: Path) -> Iterator[bytes]:
    """A file's content, piece by piece. Raises OSError."""
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    for piece in pieces(path):
        digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path, *, alone: bool) -> Iterator[None]:
    """Hold a lock with the others that do not want to be alone, or alone. The kernel gives it back when a process dies.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def shown_size(size: float) -> str:
    """Bytes for a person: 98.4 MB, as everything of edge-rt writes them."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
