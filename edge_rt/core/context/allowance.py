"""How many cells a request may use: what was asked for, or fewer where memory is short."""

from __future__ import annotations

from edge_rt.core.engine import Engine
from edge_rt.core.load.prefetch import available_memory

SHARE = 0.75
"""Of the memory that is free: growing moves a cache, and others live here too."""


def affordable(engine: Engine, cells: int) -> int | None:
    """Cells that a sequence of ``cells`` cells may have in free memory; None where nobody can say, or the engine has it already."""
    hyper = getattr(engine, "hyper", None)
    free = available_memory()
    if hyper is None or free is None:
        return None
    cell_bytes: int = hyper.n_layer * 4 * hyper.kv_width  # a key and a value, of at most two bytes a number
    return cells + int(SHARE * free) // cell_bytes


def spare(cells: int) -> int:
    """An eighth, at least one: so many become free at once, so that not every token makes something leave."""
    return max(1, cells // 8)
