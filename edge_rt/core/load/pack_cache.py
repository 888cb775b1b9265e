"""Find, or make once, the packed file of a model; safe when two processes start together, harmless when the disk is full."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt import config
from edge_rt.core.load import packing
from edge_rt.core.load.centred import TooLarge
from edge_rt.core.load.packing import PackDamaged, PackedFile
from edge_rt.native import ggml, memory

if TYPE_CHECKING:
    from edge_rt.core.load.model_file import ModelFile

Progress = Callable[[str, int, int], None]


def cache_key(file: ModelFile, centre: bool = True, *, copied: bool = False) -> str:
    """Identify model content, library build and CPU: a packed file is good only for all three.

    Of the CPU: features, vector length, and the layouts it may use now, for a system can withhold AMX from a process.
    ``copied``: of a packed file that lies beside its model and goes where it goes.
    """
    build = (ggml.c.version().decode(), ggml.c.commit().decode(), *ggml.cpu_features(), str(ggml.vector_length()))
    form = () if centre else ("as in the file",)
    return "|".join((file.key(copied=copied), *build, *packing.layouts(), str(packing.FORMAT), *form))


def open_packed(file: ModelFile, progress: Progress | None = None, centre: bool = True) -> tuple[PackedFile | None, str | None]:
    """Open the packed weights of a model, making them first if need be. ``centre``: as ``packing.plan`` has it.

    Returns (packed, notice): packed None runs from the GGUF, and the notice says why if that is not simply
    because the model has nothing to pack. Packed weights beside the model come first, if they are for this library and CPU.
    """
    beside = Path(file.path).with_suffix(".pack")
    if beside.exists() and (found := _open_sound(beside, cache_key(file, centre, copied=True))):
        return found, None
    key = cache_key(file, centre)
    path = config.packed_dir() / f"{Path(file.path).stem}-{zlib.crc32(key.encode()):08x}.pack"
    if found := _open_sound(path, key):
        return found, None
    plan = packing.plan(file.header, centre)
    if plan is None:
        return None, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_builder(path):
            if found := _open_sound(path, key):  # the other process made it while we waited
                return found, None
            try:
                _build(file, plan, path, key, progress)
            except TooLarge:
                if (plan := packing.plan(file.header, centre=False)) is None:
                    return None, None
                _build(file, plan, path, key, progress)
        return PackedFile(path, key), None
    except OSError as error:
        reason = error.strerror or str(error)
        where = f"cannot write {path.parent} ({reason}); free space or set EDGE_RT_CACHE"
        return None, f"running without packed weights, which is slower: {where}"


def write_beside(file: ModelFile, progress: Progress | None = None) -> Path | None:
    """Write the packed weights of a model beside it; None if it has nothing to pack. Raises OSError."""
    plan = packing.plan(file.header)
    if plan is None:
        return None
    path = Path(file.path).with_suffix(".pack")
    _build(file, plan, path, cache_key(file, copied=True), progress)
    return path


def _open_sound(path: Path, key: str) -> PackedFile | None:
    """Open a packed file if it is there and sound; a damaged or stale one counts as absent and is overwritten."""
    try:
        return PackedFile(path, key)
    except (FileNotFoundError, NotADirectoryError, PackDamaged):
        return None


@contextlib.contextmanager
def _only_builder(path: Path) -> Iterator[None]:
    """Hold a lock file, so that a second process waits for the first instead of packing too."""
    try:
        import fcntl
    except ImportError:  # no flock here: both build, and the atomic rename keeps that correct
        yield
        return
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(file: ModelFile, plan: packing.Plan, path: Path, key: str, progress: Progress | None) -> None:
    """Write the packed file beside its final name, then rename it into place. Raises OSError (disk full, read-only)."""
    import shutil  # these two cost start-up time, and packing is rare
    import tempfile

    needed = plan.size + 16 * memory.PAGE
    if (free := shutil.disk_usage(path.parent).free) < needed:
        raise OSError(28, f"{needed >> 20} MB needed, {free >> 20} MB free")
    base = memory.address_of(file.map)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as out:
            # Checksums are known only at the end: the header's room is measured with the widest ones.
            blank = [entry._replace(crc32=0xFFFFFFFF) for entry in plan.entries]
            start = packing.header_size(blank, plan.size, key, str(file.path))
            out.truncate(start + plan.size)
            entries, done = [], 0
            for entry, data in packing.pack_tensors(plan, file.header, base):
                out.seek(start + entry.offset)
                out.write(data)
                entries.append(entry._replace(crc32=zlib.crc32(data)))
                done += entry.nbytes
                if progress:
                    progress("packing", done, plan.size)
            out.seek(0)
            out.write(packing.write_header(entries, plan.size, key, str(file.path), start))
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _forget_stale(path, str(file.path))


def _forget_stale(path: Path, model: str) -> None:
    """Delete other packed files of the same model path (an older model, library or CPU): nobody will open them again."""
    for other in path.parent.glob("*.pack"):
        if other != path and packing.made_for(other) == model:
            with contextlib.suppress(OSError):
                other.unlink()
