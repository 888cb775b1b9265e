"""The file that traffic is recorded in: private, its lines whole, begun anew when it is large or somebody took it away."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
from pathlib import Path

from edge_rt.errors import OptionError

BEGINNING = b'{"edge_rt_trace"'
"""Of every header, and so of every file that may be appended to."""
_BLOCK = 1 << 16


class TraceFile:
    """``ready``, then ``append``, for each line. One thread at a time."""

    def __init__(self, path: Path, header: bytes, max_bytes: int, keep: int) -> None:
        """``header``: the line that begins each file, and goes before what is appended to one that was there. ``keep``: of older files."""
        self.path, self._header, self._max_bytes, self._keep = path, header, max_bytes, keep
        self._file: int | None = None
        self._size = 0

    def ready(self) -> bool:
        """Open the file, or the next one if it is full; whether a header was written. Raises OSError, OptionError."""
        if self._file is not None and not self._still_there(self._file):
            self.close()
        if self._file is not None and self._size < self._max_bytes:
            return False
        if self._file is None:
            self._open()
        if self._size >= self._max_bytes:
            self._make_way()
            self._open()
        try:
            self.append(self._header)
        except OSError:
            self.close()  # or the next line would follow without
            raise
        return True

    def append(self, line: bytes) -> None:
        """Raises OSError: then nothing of the line is in the file."""
        assert self._file is not None, "it was made ready"
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # what is left makes it another file, and is cut off when that is opened
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)

    def close(self) -> None:
        """Until it is made ready again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _still_there(self, file: int) -> bool:
        """Whether the name still stands for what is open, as we left it."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return False
        opened = os.fstat(file)
        return (found.st_ino, found.st_dev, found.st_size) == (opened.st_ino, opened.st_dev, self._size)

    def _open(self) -> None:
        file = _opened(self.path, os.O_CREAT)
        try:
            self._size = _cut_torn(file, self.path)
        except BaseException:
            os.close(file)
            raise
        self._file = file

    def _make_way(self) -> None:
        """Rename the file and those before it; the oldest goes."""
        for number in range(self._keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._older(number), self._older(number + 1))
        os.replace(self.path, self._older(1))
        self.close()

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


def check(path: Path) -> None:
    """Whether one could write there, without doing it. Raises OptionError."""
    try:
        os.close(_opened(path, 0))
    except FileNotFoundError as error:
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
            raise cannot(path, error) from error
    except OSError as error:
        raise cannot(path, error) from error


def cannot(path: Path, error: OSError) -> OptionError:
    """What to say of a file that cannot be written."""
    reason = (error.strerror or str(error)).lower()
    return OptionError(f"traffic cannot be recorded in {path}: {reason}; name another file, in a folder that is there")


def _opened(path: Path, flags: int) -> int:
    """The file, locked. Raises OSError, and OptionError for one that others may read or write, or that is no trace."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | flags, 0o600)
    try:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode):
            raise OptionError(f"{path} is no file; name another one to record traffic in")
        if facts.st_mode & 0o077 or facts.st_uid != os.getuid():
            raise OptionError(f"others may read {path}, where traffic is to be recorded; chmod 600 it, or name another file")
        if not BEGINNING.startswith(os.pread(file, len(BEGINNING), 0)):
            raise OptionError(f"{path} is something else than recorded traffic; name another file")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionError(f"another daemon records traffic in {path}; name another file") from error
    except BaseException:
        os.close(file)
        raise
    return file


def _cut_torn(file: int, path: Path) -> int:
    """Cut off a last line that is not whole, which a daemon that was killed has left; the size. Raises OSError."""
    size = end = os.fstat(file).st_size
    while end:
        start = max(0, end - _BLOCK)
        if (last := os.pread(file, end - start, start).rfind(b"\n")) >= 0:
            end = start + last + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
        logging.getLogger("edge_rt.daemon").warning("the last line of %s was not whole: %d bytes were cut off", path, size - end)
    return end
