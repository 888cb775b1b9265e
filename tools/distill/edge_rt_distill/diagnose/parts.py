"""Parts of a diagnosis on disk: each is written whole when it is done, and found again by what it was made of."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_rt.hooks import DataError
from edge_rt_distill.files import write_file

Array = NDArray[Any]
_FACTS = "__facts__"


class Part(NamedTuple):
    """What a part gave: arrays by name, and plain data."""

    arrays: dict[str, Array]
    facts: dict[str, Any]


def key_of(*made_of: Any) -> str:
    """A digest of plain data."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def packed(arrays: Mapping[str, Array]) -> bytes:
    """Arrays as the bytes of an ``.npz``, the same for the same arrays."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:  # numpy's own writes the time of day
        for name in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(arrays[name]), allow_pickle=False)
            file.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue())
    return out.getvalue()


def unpacked(path: Path) -> dict[str, Array]:
    """The arrays of an ``.npz``. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no file of arrays ({error}); diagnose the teacher again") from None


def save(folder: Path, name: str, key: str, part: Part) -> None:
    """Keep a part under the digest of what it was made of. Raises UserError."""
    text = json.dumps({"key": key, "facts": part.facts}, allow_nan=False)
    write_file(folder / f"{name}.npz", packed({**part.arrays, _FACTS: np.frombuffer(text.encode(), np.uint8)}))


def find(folder: Path, name: str, key: str) -> Part | None:
    """A part that was kept, if it was made of the same and is whole."""
    path = folder / f"{name}.npz"
    if not path.exists():
        return None
    try:
        arrays = unpacked(path)
        kept = json.loads(arrays.pop(_FACTS).tobytes())
        return Part(arrays, kept["facts"]) if kept["key"] == key else None
    except (DataError, KeyError, ValueError):  # of another version, or damaged: it is made again
        return None
