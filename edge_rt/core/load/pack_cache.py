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
    from edge_rt.core.load.packers import Packer

Progress = Callable[[str, int, int], None]

ELSEWHERE_PAGE = 16384
"""Bytes of a page in files that are made for another machine: a Pi 5 has such pages under Raspberry Pi OS, others mostly smaller ones."""


def cache_key(file: ModelFile, centre: bool = True) -> str:
    """Identify model content, library build and CPU: a packed file in the cache is good only for all three.

    Of the CPU: features, vector length, and the layouts it may use now, for a system can withhold AMX from a process.
    """
    build = (ggml.c.version().decode(), ggml.c.commit().decode(), *ggml.cpu_features(), str(ggml.vector_length()))
    form = () if centre else ("as in the file",)
    return "|".join((file.key(), *build, *packing.layouts(), str(packing.FORMAT), *form))


def copied_key(file: ModelFile, centre: bool = True, packer: Packer | None = None) -> str:
    """Identify what is in a packed file that lies beside its model and goes where it goes: the model, and how its weights are packed.

    It is good wherever the library (or ``packer``) packs them just so, which is tried on small samples: below a millisecond.
    """
    return "|".join((file.key(copied=True), str(packing.FORMAT), *packing.fingerprints(file.header, centre, packer)))


def open_packed(file: ModelFile, progress: Progress | None = None, centre: bool = True) -> tuple[PackedFile | None, str | None]:
    """Open the packed weights of a model, making them first if need be. ``centre``: as ``packing.plan`` has it.

    Returns (packed, notice): packed None runs from the GGUF, and the notice says why if that is not simply
    because the model has nothing to pack. Packed weights beside the model come first, if they are as the library packs here.
    """
    beside = Path(file.path).with_suffix(".pack")
    if beside.exists() and (found := _open_sound(beside, copied_key(file, centre))):
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
            if not _build(file, plan, path, key, progress, packing.library()):
                return None, None
        return PackedFile(path, key), None
    except OSError as error:
        reason = error.strerror or str(error)
        where = f"cannot write {path.parent} ({reason}); free space or set EDGE_RT_CACHE"
        return None, f"running without packed weights, which is slower: {where}"


def write_beside(file: ModelFile, progress: Progress | None = None, packer: Packer | None = None) -> Path | None:
    """Write the packed weights of a model beside it; None if it has nothing to pack. Raises OSError.

    ``packer``: of the machine where it will run, this one's library if left out.
    """
    page = memory.PAGE if packer is None else max(memory.PAGE, ELSEWHERE_PAGE)
    packer = packer or packing.library()
    plan = packing.plan(file.header, packer=packer, page=page)
    path = Path(file.path).with_suffix(".pack")
    if plan is None or not _build(file, plan, path, copied_key(file, packer=packer), progress, packer):
        return None
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


def _build(file: ModelFile, plan: packing.Plan, path: Path, key: str, progress: Progress | None, packer: Packer) -> bool:
    """Write the packed file; False if there is nothing to pack, as offsets are too large for it. Raises OSError (disk full, read-only)."""
    try:
        _write(file, plan, path, key, progress, packer)
    except TooLarge:
        without = packing.plan(file.header, False, packer, plan.page)
        if without is None:
            return False
        _write(file, without, path, key, progress, packer)
    _forget_stale(path, _named(file, path))
    return True


def _write(file: ModelFile, plan: packing.Plan, path: Path, key: str, progress: Progress | None, packer: Packer) -> None:
    """Write the packed file beside its final name, then rename it into place. Raises OSError, TooLarge."""
    import shutil  # these two cost start-up time, and packing is rare
    import tempfile

    needed = plan.size + 16 * plan.page
    if (free := shutil.disk_usage(path.parent).free) < needed:
        raise OSError(28, f"{needed >> 20} MB needed, {free >> 20} MB free")
    base, model = memory.address_of(file.map), _named(file, path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as out:
            start = packing.header_size(plan, key, model)
            out.truncate(start + plan.size)
            entries, done = [], 0
            for entry, data in packing.pack_tensors(plan, file.header, base, packer):
                out.seek(start + entry.offset)
                out.write(data)
                entries.append(entry._replace(crc32=zlib.crc32(data)))
                done += entry.nbytes
                if progress:
                    progress("packing", done, plan.size)
            out.seek(0)
            out.write(packing.write_header(entries, plan.size, key, model, start))
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _named(file: ModelFile, pack: Path) -> str:
    """What a packed file calls its model: one beside it goes where the model goes, and does not tell where it was made."""
    path = Path(file.path)
    return path.name if pack.parent == path.parent else str(path)


def _forget_stale(path: Path, model: str) -> None:
    """Delete other packed files of the same model path (an older model, library or CPU): nobody will open them again."""
    for other in path.parent.glob("*.pack"):
        if other != path and packing.made_for(other) == model:
            with contextlib.suppress(OSError):
                other.unlink()
