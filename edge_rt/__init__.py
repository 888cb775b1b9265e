"""edge-rt: a plugin-based inference runtime for language models on edge devices.

    import edge_rt

    with edge_rt.open("model.gguf") as model, model.session() as session:
        for event in session.generate([{"role": "user", "content": "Hello"}], max_tokens=64):
            ...

Importing this package loads no native library and no NumPy; opening a model loads the first, its second token NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "open"]

if TYPE_CHECKING:
    from edge_rt.model import open as open


def __getattr__(name: str) -> Any:
    # The runtime (native code) is loaded when first asked for, so that `import edge_rt` stays light.
    if name == "open":
        from edge_rt.model import open as runtime_open

        return runtime_open
    raise AttributeError(f"module 'edge_rt' has no attribute {name!r}")
