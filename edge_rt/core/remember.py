"""Measurements worth remembering between runs: numbers by name, valid for one build of the native library on one kind of CPU."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


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
        temporary = self._path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"build": self._build, "values": self._values}))
            os.replace(temporary, self._path)

    def _read(self) -> dict[str, float]:
        try:
            found: Any = json.loads(self._path.read_text())
            if found["build"] == self._build:
                return {str(name): float(value) for name, value in found["values"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass  # absent, damaged or of another form: nothing is known
        return {}
