"""A model file, opened once: its descriptor, a lazy read-only mapping, its checked header, and the record that it was verified."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
import zlib
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from edge_rt import __version__, config
from edge_rt.errors import ModelChanged, ModelFileError
from edge_rt.native import libs

if TYPE_CHECKING:
    from edge_rt.core.gguf.reader import Header

# A model file, opened once: its descriptor, a lazy read-only mapping, and its checked header.

_SAMPLES = 8
_SAMPLE_BYTES = 4096

_CANNOT_OPEN = {
    errno.ENOENT: "does not exist; check the path, or run `edge-rt models` to see what is installed",
    errno.ENOTDIR: "does not exist: a part of its path is a file; check the path",
    errno.EACCES: "may not be read by this user; change its permissions",
    errno.EPERM: "may not be read by this user; change its permissions",
    errno.ELOOP: "is a symbolic link that leads to itself; repair the link",
    errno.ENAMETOOLONG: "has too long a name; check the path",
}


class Identity(NamedTuple):
    """What tells one state of a file from another. Times are nanoseconds since the epoch."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """The identity in an ``os.stat`` result."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class OpenFile(NamedTuple):
    """A regular file, opened for reading and not read yet; a ``ModelFile`` takes the descriptor over."""

    path: Path
    fd: int
    identity: Identity

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> OpenFile:
        """Open a file. Raises ModelFileError."""
        where = Path(path)
        fd = _open(where)
        try:
            return cls(where, fd, _identify(fd, where))
        except BaseException:
            os.close(fd)
            raise

    @property
    def native_path(self) -> str:
        """A path by which native code opens this very file, even if another has taken its name."""
        return f"/proc/self/fd/{self.fd}" if sys.platform == "linux" else str(self.path)


class ModelFile:
    """An open GGUF file; a context manager.

    ``map`` is a shared read-only mapping of the whole file: a page is read when it is first touched and may be dropped at any time.
    Replacing the file by rename does not disturb what is open; rewriting or truncating it in place is found by ``check_unchanged``.
    """

    def __init__(self, source: OpenFile, mapping: mmap.mmap, header: Header) -> None:
        self.path, self.fd, self.identity = source
        self.native_path = source.native_path
        self.map = mapping
        self.header = header

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ModelFile:
        """Open, map and check a file. Raises ModelFileError, or UnsupportedModel for a sound file of another version or kind."""
        source = OpenFile.open(path)
        try:
            return cls.read(source)
        except BaseException:
            os.close(source.fd)
            raise

    @classmethod
    def read(cls, source: OpenFile) -> ModelFile:
        """Map and check an open file, whose descriptor stays the caller's if that fails. Raises what ``open`` raises."""
        from edge_rt.core.gguf.reader import read_header  # not needed before the vocabulary is on its way

        where, mapping = source.path, None
        try:
            # mmap without MAP_POPULATE: nothing is read yet. The header is read through it, page by page.
            mapping = mmap.mmap(source.fd, source.identity.size, access=mmap.ACCESS_READ)
            header = read_header(mapping, source.identity.size)
            _refuse_shard(header)
        except BaseException as error:
            if mapping is not None:
                mapping.close()
            if isinstance(error, ModelFileError):
                raise type(error)(f"{where}: {error}") from None
            if isinstance(error, OSError | ValueError | OverflowError):  # no mmap on this file system; cut just now; too big to address
                raise ModelFileError(f"{where} cannot be mapped into memory: {error}; copy it to a local disk") from error
            raise
        return cls(source, mapping, header)

    def check_unchanged(self) -> None:
        """Raise ModelChanged if the open file was truncated or written to since ``open``. Costs one fstat (about a microsecond)."""
        if Identity.of(os.fstat(self.fd)) != self.identity:
            raise ModelChanged(f"{self.path} was changed while it was open; open the model again")

    def key(self, *, copied: bool = False) -> str:
        """Identifies the content for caches: size, time of change, CRC-32 of the header and of a few samples of the tensor data.

        ``copied``: without the time, which copies do not keep.

        Reads a few pages. It tells apart what honest tools write; it is no proof against forgery (nor would a hash of samples be).
        """
        first, end = self.header.data_offset, self.identity.size
        samples = 0
        for i in range(_SAMPLES if end > first else 0):
            at = first + (end - first) * i // _SAMPLES
            samples = zlib.crc32(os.pread(self.fd, _SAMPLE_BYTES, at), samples)  # in ``map`` a pager may have put other pages
        return f"{end}-{0 if copied else self.identity.mtime_ns}-{self.header.crc32:08x}-{samples:08x}"

    def close(self) -> None:
        """Release the mapping and the descriptor; further calls do nothing."""
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        os.close(fd)
        self.map.close()

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _open(path: Path) -> int:
    """A descriptor for reading. O_NONBLOCK: opening a FIFO must not wait for a writer."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags)
    except OSError as error:
        why = _CANNOT_OPEN.get(error.errno or 0, f"cannot be opened: {error.strerror}")
        raise ModelFileError(f"{path} {why}") from None
    except ValueError:
        raise ModelFileError(f"the path {str(path)!r} contains a NUL character; check the path") from None


def _identify(fd: int, path: Path) -> Identity:
    """The file's identity. Raises ModelFileError unless it is a regular file with something in it."""
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        models = sorted(entry.name for entry in path.glob("*.gguf"))[:3]
        hint = f"give one of its files, e.g. {path / models[0]}" if models else "give the path of a .gguf file"
        raise ModelFileError(f"{path}: this is a directory; {hint}")
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(f"{path}: this is a device, pipe or socket; give the path of a .gguf file")
    if status.st_size == 0:
        raise ModelFileError(f"{path}: the file is empty; download it again")
    return Identity.of(status)


def _refuse_shard(header: Header) -> None:
    """One part of a split model is not a model. Raises ModelFileError that says how to merge it."""
    parts = header.optional("split.count", int, 0)
    if parts > 1:
        part = header.optional("split.no", int, 0)
        raise ModelFileError(
            f"this is part {part + 1} of {parts} of a split model; merge the parts with `llama-gguf-split --merge FIRST-PART OUTPUT.gguf`"
        )


# Remembers which files are sound, so that opening one again neither walks its metadata nor waits for its vocabulary.
#
# A file is sound once its metadata passed our checks and libllama has loaded its vocabulary. The mark names this very state of the file
# (device, inode, size, times of change: also that of its inode, which programs cannot set), this version and the installed libllama:
# when one of them changes, the file is checked again. It is known before a byte of the file is read.


def fingerprint(fd: int) -> str:
    """What is remembered of an open file if it turns out to be sound."""
    found = os.fstat(fd)
    state = f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    return f"{__version__} {state} {libs.identity()}"


def is_verified(mark: str) -> bool:
    """Whether a file in this state was found sound."""
    try:
        return _path(mark).read_text() == mark
    except (OSError, ValueError):
        return False


def mark_verified(mark: str) -> None:
    """The file was sound. Where nothing can be written, it is checked again next time."""
    from edge_rt.config import keep

    keep(_path(mark), mark)


def check_metadata(file: ModelFile) -> None:
    """Check all that native code relies on. Raises ModelFileError or UnsupportedModel."""
    from edge_rt.core.gguf.validate import check_hyperparameters, check_vocabulary

    if file.header.get("general.type") == "adapter":
        raise ModelFileError("this is a LoRA adapter and no model; open the model that it was trained for, and give this as its adapter")
    if file.header.get("general.type") == "compensation":
        raise ModelFileError("this is the compensation of a model and no model; open the model that it lies beside")
    check_vocabulary(file.header)
    check_hyperparameters(file.header)


def _path(mark: str) -> Path:
    return config.cache_dir() / "checked" / f"{zlib.crc32(mark.encode()):08x}"
