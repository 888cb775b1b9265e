"""Remembers which files are sound, so that opening one again neither walks its metadata nor waits for its vocabulary.

A file is sound once its metadata passed our checks and libllama has loaded its vocabulary. The mark names this very state of the file
(device, inode, size, times of change: also that of its inode, which programs cannot set), this version and the installed libllama:
when one of them changes, the file is checked again. It is known before a byte of the file is read.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt import __version__, config
from edge_rt.errors import ModelFileError
from edge_rt.native import libs

if TYPE_CHECKING:
    from edge_rt.core.load.model_file import ModelFile


def mark(fd: int) -> str:
    """What is remembered of an open file if it turns out to be sound."""
    found = os.fstat(fd)
    state = f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    return f"{__version__} {state} {libs.identity()}"


def known(mark: str) -> bool:
    """Whether a file in this state was found sound."""
    try:
        return _path(mark).read_text() == mark
    except (OSError, ValueError):
        return False


def remember(mark: str) -> None:
    """The file was sound. Where nothing can be written, it is checked again next time."""
    from edge_rt.core.remember import keep

    keep(_path(mark), mark)


def check_metadata(file: ModelFile) -> None:
    """Check all that native code relies on. Raises ModelFileError or UnsupportedModel."""
    from edge_rt.core.load.hyperparameter_check import check_hyperparameters
    from edge_rt.core.load.vocabulary_check import check_vocabulary

    if file.header.get("general.type") == "adapter":
        raise ModelFileError("this is a LoRA adapter and no model; open the model that it was trained for, and give this as its adapter")
    if file.header.get("general.type") == "compensation":
        raise ModelFileError("this is the compensation of a model and no model; open the model that it lies beside")
    check_vocabulary(file.header)
    check_hyperparameters(file.header)


def _path(mark: str) -> Path:
    return config.cache_dir() / "checked" / f"{zlib.crc32(mark.encode()):08x}"
