"""A JSONL file that grows record by record and survives being stopped at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edge_rt.hooks import DataError


class Journal:
    """Records behind a first line that says what they are of. Without a file it keeps nothing.

    A line counts when its line end was written: what a stopped writer left behind it is cut off when the file is opened again.
    """

    def __init__(self, file: Path | None, header: Mapping[str, Any]) -> None:
        """Raises ``DataError`` if the file is of another header, or damaged before its last line; what the system refuses is that too."""
        self._file = file
        self._records: list[dict[str, Any]] = []
        if file is not None:
            self._open(file, json.loads(json.dumps(dict(header))))

    def records(self) -> list[dict[str, Any]]:
        """Those the file had when it was opened."""
        return self._records

    def _open(self, file: Path, header: dict[str, Any]) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            data = file.read_bytes() if file.exists() else b""
        except OSError as error:
            raise DataError(f"{file} cannot be used: {error.strerror}; choose another place") from error
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            self._write(file, "wb", _line(header))
            return
        found = [_parse(file, number, line) for number, line in enumerate(lines, 1)]
        if found[0] != header:
            changed = sorted(key for key in found[0].keys() | header.keys() if found[0].get(key) != header.get(key))
            raise DataError(f"{file} was made with other settings ({', '.join(changed)}); delete it, or name another file")
        self._records = found[1:]
        if len(whole) < len(data):
            with file.open("r+b") as stream:
                stream.truncate(len(whole))

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append ``records``; they are on disk when this returns. Raises ``DataError`` if the disk is full."""
        if self._file is not None:
            self._write(self._file, "ab", b"".join(map(_line, records)))

    def _write(self, file: Path, mode: str, data: bytes) -> None:
        try:
            with file.open(mode) as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise DataError(f"{file} cannot be written: {error.strerror}; make room and run again, what is in it is kept") from error


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(record), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _parse(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{file}, line {number}: not a record; delete the file to make it anew")
    return record
