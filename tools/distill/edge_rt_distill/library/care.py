"""Looking after a library: finding damage, and removing what nothing refers to."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edge_rt.hooks import DataError
from edge_rt_distill import files
from edge_rt_distill.library.catalogue import KINDS, Entry, Record
from edge_rt_distill.library.store import Library
from edge_rt_distill.progress import Told, quiet

GRACE = 3600.0
"""Seconds an object may lie without a record: between a writer's first object and its record, or its shard's file (shards.py)."""
ABANDONED = 7 * 86400.0
"""Seconds after which a recording nobody went on with is given up."""


class Damage(NamedTuple):
    """A file that is not as it should be. ``path`` is relative to the library."""

    path: str
    reason: str


class Collected(NamedTuple):
    """What was removed. ``freed``: bytes."""

    objects: int
    temporary: int
    unfinished: int
    freed: int


def verify(library: Library, told: Told = quiet) -> list[Damage]:
    """Read everything and name what is damaged, missing or does not belong there. ``told``: objects done, and in all.

    Safe beside writers and the collector: what vanishes while it looks, vanished soundly. Raises OSError for a disk that cannot be read.
    """
    damage: list[Damage] = []
    referred: dict[str, tuple[Path, str]] = {}
    for path, entry in _record_files(library):
        try:
            if entry is None:
                raise DataError("this is no name of a record")
            record = library.load(entry)
        except FileNotFoundError:
            continue
        except DataError as error:
            damage.append(_damage(library, path, str(error)))
            continue
        for name, digest in record.objects.items():
            referred.setdefault(digest, (path, name))
    paths = list(_object_files(library))
    for done, path in enumerate(paths, 1):
        with contextlib.suppress(FileNotFoundError):
            if files.sha256(path) != path.parent.name + path.name:
                damage.append(_damage(library, path, "the content is not what the name says"))
        told(done, len(paths))
    for digest, (path, name) in referred.items():
        if not library.path(digest).exists() and path.exists():
            damage.append(_damage(library, path, f"its object {name} ({digest}) is missing"))
    return sorted(damage)


def _damage(library: Library, path: Path, reason: str) -> Damage:
    return Damage(str(path.relative_to(library.folder)), reason)


def _record_files(library: Library) -> Iterator[tuple[Path, Entry | None]]:
    for kind in KINDS:
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(library.records / kind)):
                yield library.records / kind / name, Entry.parse(kind, name)


def _object_files(library: Library) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        for folder in sorted(library.objects.iterdir()):
            yield from sorted(folder.iterdir())


def collect(library: Library, *, grace: float = GRACE, abandoned: float = ABANDONED) -> Collected:
    """Remove what nothing refers to and nobody touched for ``grace`` seconds. Safe beside writers. Raises UserError, DataError.

    Nothing is removed while a record is damaged: what it refers to is not known.
    """
    now = time.time()
    with library.writing():
        unfinished = _abandon(library, now - abandoned)
        referred = _referred(library)
        temporary, freed = _sweep_incoming(library, now - max(grace, 0.0))
        objects = 0
        for path in _object_files(library):
            if path.parent.name + path.name in referred:
                continue
            # A writer that found this object renews its age under the same lock, so the age is read alone, at the last moment.
            with contextlib.suppress(FileNotFoundError), files.locked(library.lock, alone=True):
                status = path.stat()
                if status.st_mtime <= now - grace:
                    path.unlink()
                    objects, freed = objects + 1, freed + status.st_size
    return Collected(objects, temporary, unfinished, freed)


def _referred(library: Library) -> set[str]:
    """The objects that records and unfinished recordings name."""
    found: set[str] = set()
    for path, entry in _record_files(library):
        try:
            record = Record.from_bytes(path.read_bytes()) if entry is None else library.load(entry)
        except FileNotFoundError:
            continue
        found.update(record.objects.values())
    with contextlib.suppress(FileNotFoundError):
        for path in library.unfinished.glob("*/*.json"):
            with contextlib.suppress(FileNotFoundError):
                found.update(json.loads(path.read_bytes())["objects"].values())
    return found


def _abandon(library: Library, before: float) -> int:
    """Give up recordings whose newest part is older; returns how many."""
    count = 0
    with contextlib.suppress(FileNotFoundError):
        for folder in library.unfinished.iterdir():
            parts = list(folder.iterdir())
            if max((part.stat().st_mtime for part in [folder, *parts]), default=before) < before:
                files.remove_folder(folder)
                count += 1
    return count


def _sweep_incoming(library: Library, before: float) -> tuple[int, int]:
    """Remove what writers that died left; returns files and bytes."""
    count = freed = 0
    with contextlib.suppress(FileNotFoundError):
        for path in library.incoming.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if status.st_mtime <= before:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                    count, freed = count + 1, freed + status.st_size
    return count, freed
