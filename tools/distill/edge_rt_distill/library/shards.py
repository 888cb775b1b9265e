"""Recordings that take long, shard by shard: what is done is kept, and a process that is killed goes on where it was.

A shard's objects go into the library at once; a small file under ``unfinished/`` says which they are. When all are done the record is
added and that file's folder removed. The record's date is when the recording began, so going on after a kill between the two adds the
same record once more, which changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from edge_rt.hooks import DataError
from edge_rt_distill import files
from edge_rt_distill.library.catalogue import Query, Record
from edge_rt_distill.library.store import Library
from edge_rt_distill.progress import Told, quiet


class Part(NamedTuple):
    """What a shard gave: objects (SHA-256 by name) and facts (plain JSON)."""

    objects: Mapping[str, str]
    facts: Mapping[str, Any]


class Merged(NamedTuple):
    """What becomes of all parts: the record's objects, facts and score."""

    objects: Mapping[str, str]
    facts: Mapping[str, Any]
    score: float | None = None


def digest_of(items: Iterable[Any]) -> str:
    """SHA-256 over plain data: which samples a recording is of."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def record_shards(
    library: Library,
    draft: Record,
    count: int,
    size: int,
    work: Callable[[range, Told], Part],
    merge: Callable[[Sequence[Part]], Merged],
    told: Told = quiet,
) -> Record:
    """Record ``count`` samples, ``size`` a shard, and add the record.

    ``draft``: the record without objects, facts and score; with its date left out it says what is recorded, of what and how, and so
    finds its own unfinished parts (its ``arguments`` must hold ``digest_of`` the samples). A record that is there already and was
    made of just this is returned, and nothing is recorded: a step of a run that is done again, or another run, shares it.
    ``work``: gets the indices of a shard, and whom to tell of samples done within it. ``merge``: puts the parts together, in order.
    Raises DataError without samples, and what ``work`` raises.
    """
    if count == 0:
        raise DataError("there are no samples to record; give some")
    if size < 1:
        raise ValueError("a shard has at least one sample")
    folder = library.unfinished / _key(draft)
    known = _known(library, draft)
    if known is not None:
        _finish(library, folder)  # a process that was killed between the record and this left it
        told(count, count)
        return known
    begun = _part_file(library, folder / "begun.json", lambda: Part({}, {"date": draft.date}))
    parts = []
    for start in range(0, count, size):
        indices = range(start, min(start + size, count))
        tell = _within(told, start, count)
        parts.append(_part_file(library, folder / f"{start:08d}.json", partial(work, indices, tell)))
        told(indices.stop, count)
    merged = merge(parts)
    record = replace(draft, date=begun.facts["date"], objects=merged.objects, facts=merged.facts, score=merged.score)
    library.add(record)
    _finish(library, folder)
    return record


def _known(library: Library, draft: Record) -> Record | None:
    """The newest whole record that says what the draft says."""
    for record in library.find(Query(draft.kind, draft.model, draft.domain)):
        same = replace(draft, date=record.date, objects=record.objects, facts=record.facts, score=record.score)
        if same.id == record.id and all(library.path(digest).exists() for digest in record.objects.values()):
            return record
    return None


def _within(told: Told, start: int, count: int) -> Told:
    return lambda done, total: told(start + done, count)


def _key(draft: Record) -> str:
    """Names a recording: all that decides its result."""
    said = [draft.kind, draft.model, draft.domain, draft.version, draft.seed, dict(draft.arguments)]
    return digest_of([said])[:32]


def _part_file(library: Library, path: Path, make: Callable[[], Part]) -> Part:
    """The part that is there already, or a new one. The collector spares objects that such files name."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # a damaged file is made again
        found = json.loads(path.read_bytes())
        part = Part(dict(found["objects"]), dict(found["facts"]))
        if all(library.path(digest).exists() for digest in part.objects.values()):
            return part
    part = make()
    data = json.dumps({"objects": dict(part.objects), "facts": dict(part.facts)}, allow_nan=False).encode()
    with library.writing():
        try:
            _place(library, path, data)
        except FileNotFoundError:  # another process finished the same recording at this moment, and removed the folder
            _place(library, path, data)
    return part


def _place(library: Library, path: Path, data: bytes) -> None:
    for folder in (library.unfinished, path.parent, library.incoming):
        files.make_folder(folder)
    temporary, _ = files.write_temporary(library.incoming, [data])
    files.place(temporary, path)


def _finish(library: Library, folder: Path) -> None:
    """Remove a recording's parts; another process may be at the same recording."""
    with library.writing():
        files.remove_folder(folder)
