"""Files of tensors that are there whole or not at all, and a log that ends where the last of them was written."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from edge_rt.hooks import DataError
from edge_rt_distill import files

VERSION = 1


def save(path: Path, data: Mapping[str, Any]) -> str:
    """Write tensors and plain data. "" when that is done; else why it is not, and what stood there before still stands there."""
    try:
        with files.replacing(path) as part, part.open("wb") as file:
            torch.save({"version": VERSION, **data}, file)
    except (OSError, RuntimeError) as error:  # torch wraps what goes wrong in writing into a RuntimeError
        cause = _os_error(error)
        return files.reason(cause) if isinstance(cause, OSError) else _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or "it ends too early"


def _os_error(error: BaseException) -> BaseException:
    """The error of the system behind another, if there is one."""
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error


def load(path: Path) -> dict[str, Any]:
    """What ``save`` wrote. Raises DataError for a file that is damaged or of another version; nothing in it is executed."""
    try:
        data: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise DataError(f"the checkpoint {path} cannot be read ({_first_line(error)}); delete it to begin again") from error
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise DataError(f"the checkpoint {path} is of another version; delete it to begin again")
    return data


class Log:
    """One JSON object a line. What a run that was killed wrote after its last checkpoint is cut off, as it will be written again.

    ``told`` gets one message when a line cannot be written (the disk is full); the run goes on, and half a line never stays.
    """

    def __init__(self, path: Path, length: int, told: Callable[[str], None]) -> None:
        self._file = path.open("ab")
        self._file.truncate(length)
        self.length, self._told, self._lost = length, told, False

    def write(self, **values: Any) -> None:
        """Append a line."""
        line = json.dumps(values).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            self.length += len(line)
        except OSError as error:
            if not self._lost:
                self._told(f"the log cannot be written: {files.reason(error)}; the run goes on without")
            self._lost = True
            self._restart()

    def _restart(self) -> None:
        """Drop what was buffered, and the piece of a line that was written."""
        path = self._file.name
        with contextlib.suppress(OSError):  # the same failure again: closing flushes what could not be written
            self._file.close()
        self._file = open(path, "ab")  # noqa: SIM115 (it stays open)
        self._file.truncate(self.length)

    def close(self) -> None:
        """No more lines."""
        self._file.close()
