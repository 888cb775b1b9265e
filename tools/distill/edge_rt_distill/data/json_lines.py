"""Files of JSON, a value a line, of whoever wrote them: every mistake by its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_rt.hooks import DataError


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not blank, counted from 1, and its value. Raises DataError."""
    yield from values(read_text(path), str(path))


def values(text: str, where: str) -> Iterator[tuple[int, Any]]:
    """The same of a text that came from ``where``."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}, line {number}: not JSON ({error})") from None


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without a mark of it. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); name another file") from error
