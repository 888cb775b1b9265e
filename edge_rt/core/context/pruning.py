"""Which cells of a cache to keep, layer by layer and head by head: what the last queries look at, and the two ends.

``METHODS`` give every cell a score; the protected ends and the highest of the rest stay. ``defensive`` is what edge-rt uses, the others
are what it is compared with:

- ``defensive`` (DefensiveKV, Feng et al. 2025): the highest attention any of the last queries pays, and at least the mean of these over
  all cells, times the length of the value. What one query needed once may be needed again, which an average would hide.
- ``snapkv`` (Li et al. 2024): mean attention of the last queries. ``h2o`` (Zhang et al. 2023): the same without regard to neighbours; of
  the attention accumulated since the beginning only the part of the queries still held is known.
- ``keydiff`` (Park et al. 2025): keys least like the mean of the others; asks no queries.
- ``random`` and ``window`` (the newest) are the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from edge_rt.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.types import Pruning

    Scores = npt.NDArray[np.float32]
    """One score for every cell of every head: [G, N]."""

NEIGHBOURS = 13
"""Scores are averaged over so many cells: a statement is several tokens, and they are of use only together.

Of 96 questions about 1,000 and 2,000 tokens (SmolLM2-135M, the benchmark's seeds for tuning), a tenth of the cells answers 103 % of what
all of them answer with 13, 85 % with 7, which is usual; a fifth of the cells 102 % and 97 %.
"""
WINDOW = 8
"""Queries to watch: the question's last tokens. In the same test 16 were no better (100 % and 101 %); a pass took half as long again."""
SINKS = 4
"""First cells that always stay."""
LEAST = 64
"""Cells that a share is never less than: a short prompt is worth having whole."""


class Layer(Protocol):
    """What a method may ask about one layer of N cells and G heads (``CachedLayer`` of graph/scores.py)."""

    number: int
    n_heads: int
    n_cells: int

    def attention(self) -> npt.NDArray[np.float32]:
        """What the last queries attend to: [G, queries of the head's group, N]."""
        ...

    def value_norms(self) -> npt.NDArray[np.float32]:
        """[G, N]."""
        ...

    def keys(self) -> npt.NDArray[np.float32]:
        """[G, N, D]."""
        ...


def choose(layers: Iterable[Layer], keep: int, first: int, last: int, method: str) -> npt.NDArray[np.intp]:
    """The ``keep`` cells of each head to keep, rising, the ``first`` and ``last`` ones among them: [L, G, keep]. See ``check``."""
    import numpy as np

    return np.stack([_best(METHODS[method](layer), keep, first, last) for layer in layers])


def check(keep: int, first: int, last: int, method: str) -> None:
    """Raise OptionError for what is no way to prune."""
    if method not in METHODS:
        raise OptionError(f"there is no such way to prune as {method!r}; choose from {', '.join(METHODS)}")
    if keep < 1 or min(first, last) < 0 or first + last > keep:
        raise OptionError(f"{keep} cells cannot be kept with {first} protected at the beginning and {last} at the end; keep more")


def _best(scores: Scores, keep: int, first: int, last: int) -> npt.NDArray[np.intp]:
    """Indices [G, keep], rising, of the highest scores [G, N], both ends included."""
    import numpy as np

    n = scores.shape[1]
    scores = np.where(np.isnan(scores), -np.inf, scores)
    scores[:, :first] = scores[:, n - last :] = np.inf
    return np.sort(np.argpartition(scores, n - keep, axis=1)[:, n - keep :], axis=1)


def _pooled(scores: Scores) -> Scores:
    """Each score's mean over it and its nearest neighbours, fewer at the ends."""
    import numpy as np

    n, side = scores.shape[1], NEIGHBOURS // 2
    totals = np.cumsum(np.pad(scores, ((0, 0), (1, 0))), axis=1, dtype=np.float64)
    start, end = np.maximum(np.arange(n) - side, 0), np.minimum(np.arange(n) + side + 1, n)
    means: Scores = ((totals[:, end] - totals[:, start]) / (end - start)).astype(np.float32)
    return means


def _defensive(layer: Layer) -> Scores:
    import numpy as np

    most = layer.attention().max(axis=1)
    return _pooled(np.maximum(most, most.mean(axis=1, keepdims=True))) * layer.value_norms()


def _keydiff(layer: Layer) -> Scores:
    import numpy as np

    keys = layer.keys()
    directions = keys / np.linalg.norm(keys, axis=2, keepdims=True)
    mean = directions.mean(axis=1, keepdims=True)
    unlike: Scores = -(directions * mean).sum(axis=2)
    return unlike


def _random(layer: Layer) -> Scores:
    import numpy as np

    return np.random.default_rng(layer.number).random((layer.n_heads, layer.n_cells), np.float32)


def _window(layer: Layer) -> Scores:
    import numpy as np

    return np.tile(np.arange(layer.n_cells, dtype=np.float32), (layer.n_heads, 1))


METHODS: dict[str, Callable[[Layer], Scores]] = {
    "defensive": _defensive,
    "snapkv": lambda layer: _pooled(layer.attention().mean(axis=1)),
    "h2o": lambda layer: layer.attention().mean(axis=1),
    "keydiff": _keydiff,
    "random": _random,
    "window": _window,
}


# ---- budgets ---------------------------------------------------------------------------------------------------------


def budget_cells(pruning: Pruning, tokens: int, cell_bytes: int | None) -> int:
    """What a pass leaves, in cells, at least one, and LEAST of a share. ``tokens`` were said so far. Raises OptionError."""
    if pruning.unit == "bytes" and cell_bytes is None:
        raise OptionError("this engine does not say how large a cell is; give the pruning budget in cells or as a share")
    size = {"cells": 1.0, "bytes": 1 / (cell_bytes or 1), "share": float(tokens)}[pruning.unit]
    return max(LEAST if pruning.unit == "share" else 1, int(pruning.budget * size))


class Plan(NamedTuple):
    """How many cells to keep, and how many of them are protected at each end: arguments of ``PrunesCells.prune``."""

    keep: int
    first: int
    last: int


def plan(keep: int, head: int = 0, since: int = 0) -> Plan:
    """How to prune to ``keep`` cells. ``head``: cells of the system prompt; ``since``: cells since the question began.

    A tenth is protected at the end, and the question with what was answered so far as long as that takes no more than half. At the
    beginning the system prompt is, up to a quarter, and the first cells always: much attention rests there whatever is asked.
    """
    first = min(keep, max(SINKS, head if head <= keep // 4 else 0))
    return Plan(keep, first, min(keep - first, max(keep // 10, min(since + keep // 10, keep // 2))))
