"""Full parameter snapshots in the library: a folder in Hugging Face's layout, each file an object, so equal files are stored once."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from edge_rt.hooks import DataError, OptionError, UserError
from edge_rt_distill import files
from edge_rt_distill.library.catalogue import Query, Record
from edge_rt_distill.library.record import tool_version
from edge_rt_distill.library.store import Library
from edge_rt_distill.model import snapshot
from edge_rt_distill.model.load import Teacher, load


def store(
    library: Library, teacher: Teacher, *, domain: str = "", score: float | None = None, seed: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Record:  # fmt: skip
    """Add a snapshot of a model, all parameters in float32. Raises UserError (a full disk), and then no record is added.

    A snapshot of the same model that says the same is there already: that one is returned.
    """
    with library.writing():
        files.make_folder(library.incoming)
        with tempfile.TemporaryDirectory(dir=library.incoming) as name:
            try:
                snapshot.save(Path(name), teacher.model, teacher.tokeniser)
            except SafetensorError as error:  # what safetensors makes of an OSError
                raise UserError(f"cannot write to {library.folder}: {error}; make room there, and run the same command again") from error
            objects = {path.name: library.put_file(path) for path in sorted(Path(name).iterdir())}
    parameters = teacher.model.architecture.parameters()
    said = {**(arguments or {}), "origin": teacher.origin.name}
    facts = {"parameters": parameters, "family": teacher.model.architecture.family, "layers": len(teacher.model.architecture.layers)}
    record = Record(
        "snapshot", teacher.digest, domain, score=score, version=tool_version(), seed=seed, arguments=said, objects=objects, facts=facts
    )
    for known in library.find(Query("snapshot", teacher.digest, domain)):
        if replace(known, date=record.date) == record:
            return known
    return library.add(record)


def export(library: Library, record: Record, folder: Path) -> Path:
    """Write a snapshot's files into a new folder, checked; transformers and ``model.load`` read it.

    Raises OptionError for a folder that is there, DataError for damaged objects, UserError where it cannot be written.
    """
    if record.kind != "snapshot":
        raise DataError(f"record {record.id[:12]} is of kind {record.kind} and holds no model; choose a snapshot")
    if folder.exists():
        raise OptionError(f"{folder} is there already; choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            for name, digest in record.objects.items():
                _copy(library, digest, part / name)
            part.chmod(0o755)
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # gone, unless something failed
    except OSError as error:
        raise files.write_error(error, folder.parent) from error
    return folder


def _copy(library: Library, digest: str, target: Path) -> None:
    found = hashlib.sha256()
    if not library.path(digest).exists():
        raise library.damaged(digest, "gone")
    with target.open("wb") as out:
        for piece in files.pieces(library.path(digest)):
            found.update(piece)
            out.write(piece)
    if found.hexdigest() != digest:
        raise library.damaged(digest, "damaged")


def restore(library: Library, record: Record, folder: Path) -> Teacher:
    """The model of a snapshot by way of ``folder``, which keeps it, under the digest it was recorded with.

    A folder that holds just this snapshot is used as it is. Raises what ``export`` and ``model.load`` raise.
    """
    if not _holds(folder, record):
        export(library, record, folder)
    return load(folder)._replace(digest=record.model)


def _holds(folder: Path, record: Record) -> bool:
    """Whether a folder holds a snapshot's files, unchanged."""
    paths = {name: folder / name for name in record.objects}
    return all(path.is_file() and files.sha256(path) == record.objects[name] for name, path in paths.items())
