"""The INT4 error compensation of a model that is being opened: found, opened and handed to the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.core.engine import AppliesCompensation
from edge_rt.core.weights.error_correction import AUTO, WITHOUT, compensation_path, find_compensation, open_compensation
from edge_rt.deployment import COMPENSATION
from edge_rt.errors import OptionError

if TYPE_CHECKING:
    from edge_rt.core.engine import Engine
    from edge_rt.core.gguf.model_file import ModelFile
    from edge_rt.core.weights.error_correction import Compensation
    from edge_rt.deployment import Deployed


class Applied(NamedTuple):
    """The compensation of an open model: ``key`` of its content, ``facts`` as `inspect` and the daemon show them."""

    key: str
    facts: Mapping[str, Any]

    @property
    def sentence(self) -> str:
        """All that is known, in a few words."""
        return f"{Path(self.facts['path']).name} at {self.facts['sites']} products"


def opened(
    path: Path, model: ModelFile, asked: str | os.PathLike[str], undo: ExitStack, deployed: Deployed | None = None
) -> Compensation | None:
    """The compensation of the model at a path, as ``asked`` of ``edge_rt.open``, None for none. It is closed with ``undo`` at the latest,
    and has to be open until an engine has taken it up. One that was compiled with a ``deployed`` model has to be there.

    Raises ModelFileError, UnsupportedModel.
    """
    where = find_compensation(path, asked)
    if where is None and asked == AUTO and deployed and COMPENSATION in deployed.files:
        where = compensation_path(path)
    if where is None:
        return None
    found = open_compensation(where, model)
    undo.callback(found.file.close)
    return found


def applied(engine: Engine, compensation: Compensation | None) -> Applied | None:
    """What an engine was opened with, whose file can be closed now. Raises OptionError for an engine that would compute without it."""
    if compensation is None:
        return None
    if not (isinstance(engine, AppliesCompensation) and engine.compensated() == compensation.key):
        what = f"the engine {engine.info.engine} applies no compensation, and {compensation.file.path} is there"
        raise OptionError(f"{what}; run it with ggml, {WITHOUT}")
    found = Applied(compensation.key, compensation.facts())
    compensation.file.close()
    return found
