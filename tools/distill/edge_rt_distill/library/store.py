"""The teacher library's folder: objects by content, records by name.

    library.json                 what this is, and its version
    objects/ab/cdef...           immutable content, named by its SHA-256
    records/KIND/NAME.json       one file a record (catalogue.py)
    unfinished/KEY/PART.json     what a recording that is under way has already put here (shards.py)
    incoming/                    files being written
    lock                         between writers and the collector

There is no file that all writers change, so several processes may add at once. Objects become durable before the record that names
them, so a crash leaves objects without a record (which ``care.collect`` removes), never a record without its objects.
Locks: a writer shares one while an object's age is renewed and its name given; only the collector's deletions are alone.
Reading takes none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from edge_rt.hooks import DataError, UserError
from edge_rt_distill import files
from edge_rt_distill.library.catalogue import KINDS, Entry, Query, Record

FORMAT = 1
_IDENTITY = "library.json"


class Library:
    """A library in a folder. Any number of processes and threads may use it at once."""

    def __init__(self, folder: Path) -> None:
        """Use ``open``, which checks the folder."""
        self.folder = folder
        self.objects, self.records, self.unfinished = folder / "objects", folder / "records", folder / "unfinished"
        self.incoming, self.lock = folder / "incoming", folder / "lock"
        self.reads = 0
        """Record files read so far: what a query costs."""

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, create: bool = False) -> Library:
        """Open a library. Raises UserError for a folder that is none; ``create`` makes one of a folder that is empty or not there."""
        library = cls(Path(folder))
        identity = library.folder / _IDENTITY
        try:
            if create and not identity.exists():
                library._create(identity)
            found = json.loads(identity.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{folder} is no teacher library; give the folder of one, or record something into a new one") from None
        except OSError as error:
            raise UserError(f"cannot open the library {folder}: {(error.strerror or str(error)).lower()}; choose another folder") from error
        except ValueError:
            raise DataError(f"{identity} is damaged; write {json.dumps({'format': FORMAT})} into it") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UserError(f"the library {folder} is of a version that this one does not know; update edge-rt-distill")
        return library

    def _create(self, identity: Path) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Names with a dot are another process that creates the same library at this moment.
            if any(not one.name.startswith(".") for one in self.folder.iterdir()) and not identity.exists():
                raise UserError(f"{self.folder} is not empty and no teacher library; choose another folder")
            descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=".library.")
            with os.fdopen(descriptor, "wb") as out:
                out.write(json.dumps({"format": FORMAT}).encode())
                out.flush()
                os.fsync(out.fileno())
            files.place(Path(name), identity)
        except OSError as error:
            raise files.write_error(error, self.folder) from error

    # ---- objects ---------------------------------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Where an object is, or would be."""
        return self.objects / digest[:2] / digest[2:]

    def put(self, data: bytes | Iterable[bytes]) -> str:
        """Add an object; returns its SHA-256. Content that is there already is stored once, and mended if it was damaged.

        Raises UserError when it cannot be written (a full disk), and then nothing is left of it.
        """
        with self.writing():
            files.make_folder(self.incoming)
            temporary, digest = files.write_temporary(self.incoming, [data] if isinstance(data, bytes) else data)
            self._adopt(temporary, digest)
        return digest

    def put_file(self, path: Path) -> str:
        """Add a file's content, as it is now. Raises UserError."""
        try:
            path.stat()
        except OSError as error:
            raise UserError(f"cannot read {path}: {(error.strerror or str(error)).lower()}; check the file") from error
        return self.put(files.pieces(path))

    def _adopt(self, temporary: Path, digest: str) -> None:
        """Make a temporary file the object ``digest``, or drop it for the one that is there."""
        target = self.path(digest)
        try:
            with files.locked(self.lock, alone=False):
                if self._renew(target) and files.sha256(target) == digest:
                    temporary.unlink()
                    return
                files.make_folder(self.objects)
                files.make_folder(target.parent)
                files.place(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @staticmethod
    def _renew(target: Path) -> bool:
        """Set an object's age to nothing, so that no collector takes it. False where it is not there, or is another user's."""
        try:
            os.utime(target)
        except (FileNotFoundError, PermissionError):
            return False
        return True

    def read(self, digest: str) -> bytes:
        """An object's content, checked. Raises DataError for one that is damaged or gone."""
        try:
            data = self.path(digest).read_bytes()
        except FileNotFoundError:
            raise self.damaged(digest, "gone") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise self.damaged(digest, "damaged")
        return data

    def damaged(self, digest: str, how: str) -> DataError:
        """What to say of an object that cannot be used."""
        return DataError(f"object {digest[:16]} in {self.folder} is {how}; see `edge-rt distill library verify`, and record it again")

    # ---- records ---------------------------------------------------------------------------------------------------------

    def add(self, record: Record) -> Record:
        """Add a record whose objects are all here. Returns it when it is durable. Raises DataError, UserError."""
        data, name = record.to_bytes(), record.entry.file_name
        folder = self.records / record.kind
        with self.writing(), files.locked(self.lock, alone=False):
            for digest in record.objects.values():
                if not self._renew(self.path(digest)) and not self.path(digest).exists():
                    raise DataError(f"object {digest} is not in {self.folder}; put it there before the record")
            files.make_folder(self.records)
            files.make_folder(folder)
            files.make_folder(self.incoming)
            temporary, _ = files.write_temporary(self.incoming, [data])
            files.place(temporary, folder / name)
        return record

    def entries(self, query: Query = Query()) -> list[Entry]:  # noqa: B008 (it is immutable)
        """What is there, newest first, told from names alone. A model longer than names tell is compared by ``find``.

        Raises OptionError for a query that cannot be.
        """
        wanted, found = query.prepared(), []
        for kind in KINDS if query.kind is None else (query.kind,):
            with contextlib.suppress(FileNotFoundError):
                entries = (Entry.parse(kind, name) for name in os.listdir(self.records / kind))
                found += [entry for entry in entries if entry is not None and wanted.has(entry)]
        return sorted(found, key=lambda entry: (entry.date, entry.id), reverse=True)

    def find(self, query: Query = Query()) -> Iterator[Record]:  # noqa: B008
        """The records a query asks for, newest first, each read when it is reached. Raises OptionError, DataError (a damaged record)."""
        for entry in self.entries(query):
            try:
                record = self.load(entry)
            except FileNotFoundError:  # removed since the folder was listed
                continue
            if query.model is None or record.model.startswith(query.model):
                yield record

    def load(self, entry: Entry) -> Record:
        """The record of an entry, checked against its id. Raises DataError, FileNotFoundError."""
        path = self.records / entry.kind / entry.file_name
        self.reads += 1
        record = Record.from_bytes(path.read_bytes())
        if record.entry != entry:
            raise DataError(f"{path} is damaged; restore or remove it")
        return record

    def get(self, start: str) -> Record:
        """The record whose id begins so. Raises DataError for none or several."""
        found = [entry for entry in self.entries() if entry.id.startswith(start)] if len(start) >= 4 else []
        if len(found) != 1:
            why = f"{len(found)} records begin so" if found else "there is none"
            raise DataError(f"no record {start!r} in {self.folder}: {why}; give four digits or more of an id that `library ls` shows")
        try:
            return self.load(found[0])
        except FileNotFoundError:
            raise DataError(f"record {start!r} was just removed from {self.folder}; see `library ls`") from None

    def remove(self, record: Record) -> None:
        """Forget a record; its objects stay until they are collected. Nothing if it is gone. Raises UserError."""
        folder = self.records / record.kind
        with self.writing(), contextlib.suppress(FileNotFoundError):
            (folder / record.entry.file_name).unlink()
            files.sync_folder(folder)

    def size(self, record: Record) -> int:
        """Bytes of a record's objects; objects that are gone count nothing."""
        total = 0
        for digest in set(record.objects.values()):
            with contextlib.suppress(FileNotFoundError):
                total += self.path(digest).stat().st_size
        return total

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Says what is wrong where the file system refuses: OSError becomes UserError."""
        try:
            yield
        except OSError as error:
            raise files.write_error(error, self.folder) from error
