"""Measurements worth remembering between runs: numbers by name, valid for one build of the native library on one kind of CPU."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def keep(path: Path, text: str) -> None:
    """Write a small file of the cache beside its name, then rename it into place; where nothing can be written, nothing happens."""
    temporary = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)


class Remembered:
    """A small JSON file in the cache. What cannot be read is measured again; what cannot be written, each time."""

    def __init__(self, path: Path, build: str) -> None:
        """``build`` names what the measurements are valid for; those of another build are forgotten at the next ``put``."""
        self._path, self._build = path, build
        self._values = self._read()

    def get(self, name: str) -> float | None:
        """A number, None if it was never measured for this build."""
        return self._values.get(name)

    def put(self, name: str, value: float) -> None:
        """Keep a number for later runs."""
        self._values[name] = value
        keep(self._path, json.dumps({"build": self._build, "values": self._values}))

    def _read(self) -> dict[str, float]:
        try:
            found: Any = json.loads(self._path.read_text())
            if found["build"] == self._build:
                return {str(name): float(value) for name, value in found["values"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass  # absent, damaged or of another form: nothing is known
        return {}
