"""A folder for parked sessions: this daemon's alone, and gone with it, however it ends."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "parked-"


class Parking:
    """Made when it is first asked for. It is locked as long as its daemon lives, so that the next can tell what was left behind."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._folder: Path | None = None
        self._lock = -1

    def folder(self) -> Path | None:
        """None where there is no place for one: then sessions stay in memory."""
        if self._folder is None:
            try:
                self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
                _sweep(self._state)
                made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._state))
                self._lock = _locked(made)
                self._folder = made
            except OSError as error:
                logging.getLogger("edge_rt.daemon").warning("sessions cannot be parked in %s: %s", self._state, error.strerror or error)
        return self._folder

    def close(self) -> None:
        """Remove it, with what is in it."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # what is left is swept by the next
            os.close(self._lock)
            self._folder = None


def _locked(folder: Path) -> int:
    """A descriptor that holds the folder's lock. Raises OSError: somebody else has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(state: Path) -> None:
    """Remove folders of daemons that died."""
    for folder in state.glob(f"{_PREFIX}*"):
        try:
            descriptor = _locked(folder)
        except OSError:
            continue  # its daemon lives, or another has just removed it
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)
