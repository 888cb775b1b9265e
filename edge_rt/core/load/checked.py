"""Remembers which files passed the checks of their metadata, so that opening one again does not walk its vocabulary.

The mark is the file's key (size, time of change, checksums), so a file that changed is checked again.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt import __version__, config
from edge_rt.core.load.hyperparameter_check import check_hyperparameters
from edge_rt.core.load.vocabulary_check import check_vocabulary
from edge_rt.core.remember import keep

if TYPE_CHECKING:
    from edge_rt.core.load.model_file import ModelFile


def check_metadata(file: ModelFile) -> None:
    """Check all that native code relies on, once for each file. Raises ModelFileError or UnsupportedModel."""
    mark = f"{__version__} {file.key()}"
    path = config.cache_dir() / "checked" / f"{zlib.crc32(mark.encode()):08x}"
    if _read(path) == mark:
        return
    check_vocabulary(file.header)
    check_hyperparameters(file.header)
    keep(path, mark)  # where nothing can be written, the file is checked again next time


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None
