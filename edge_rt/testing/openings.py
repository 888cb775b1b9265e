"""For plugins whose engine is ``open_ggml_engine`` with an accelerator: what they ask it for, on a machine that has none."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.hooks import EngineOptions, ModelFile

if TYPE_CHECKING:
    import pytest


class Opening(NamedTuple):
    """One call of ``open_ggml_engine``; ``more``: its keywords, ``accelerator`` and ``name``."""

    model: ModelFile
    options: EngineOptions
    more: dict[str, Any]


def note_openings(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Opening]:
    """Until the test ends, a plugin's module that has imported ``open_ggml_engine`` opens nothing, and what it asked for is noted.

    What it gets is the list's last entry. Raises AttributeError for a module that has not imported it.
    """
    found: list[Opening] = []

    def note(model: ModelFile, options: EngineOptions, **more: Any) -> Opening:
        found.append(Opening(model, options, more))
        return found[-1]

    monkeypatch.setattr(module, "open_ggml_engine", note)
    return found
