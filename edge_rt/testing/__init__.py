"""What the tests of a plugin need, with no hardware and no download; docs/plugins.md describes it.

The names below are imported from their modules when they are first used, because the suites need pytest and hypothesis.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_rt.testing.conformance import DeviceConformance, EmbedderConformance, EngineConformance, PostProcessorConformance
    from edge_rt.testing.engine_helpers import note_openings
    from edge_rt.testing.null_device import NullPlugin
    from edge_rt.testing.random_models import write_random_adapter, write_random_compensation, write_random_model

__all__ = [
    "DeviceConformance",
    "EmbedderConformance",
    "EngineConformance",
    "NullPlugin",
    "PostProcessorConformance",
    "note_openings",
    "write_random_adapter",
    "write_random_compensation",
    "write_random_model",
]

_MODULES = {
    "NullPlugin": "null_device",
    "note_openings": "engine_helpers",
    **dict.fromkeys(("DeviceConformance", "EmbedderConformance", "EngineConformance", "PostProcessorConformance"), "conformance"),
    **dict.fromkeys(("write_random_adapter", "write_random_compensation", "write_random_model"), "random_models"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
