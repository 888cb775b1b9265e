"""Which cells of a cache to keep, layer by layer and head by head: what the last queries look at, and the two ends.

``METHODS`` give every cell a score; the protected ends and the highest of the rest stay. edge-rt uses the first two: ``ASKED`` where
a question is the end of the cache, ``UNASKED`` where nobody knows what comes. The others are what they are compared with:

- ``defensive`` (DefensiveKV, Feng et al. 2025): the highest attention any of the last queries pays, and at least the mean of these over
  all cells, times the length of the value. What one query needed once may be needed again, which an average would hide.
- ``obcache`` (OBCache, Gu et al. 2025, its score of values): the root of the mean squared attention, times the length of the value. That
  is by how much outputs are off without the cell, over queries that are as likely as these: between the mean, which does not see what
  few of them need, and the highest, which sees nothing else.
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
SINKS = 4
"""First cells that always stay."""
LEAST = 64
"""Cells that a share is never less than: a short prompt is worth having whole."""


class Way(NamedTuple):
    """How to make a kind of pass. ``queries``: the last so many tokens are what is asked. ``newest``: share of what is kept that stays
    because it is the newest.
    """

    method: str
    queries: int
    newest: float


ASKED = Way("defensive", 8, 0.1)
"""For a pass after a question. In the test above 16 queries were no better (100 % and 101 %); a pass took half as long again. 64 reach back
before the question: of 12 such questions a tenth of the cells then answers less than half as many.
"""
UNASKED = Way("obcache", 64, 0.4)
"""For a pass with no question to go by. With half of the cells kept, perplexity rises by 0.4 % [-0.1, 0.9] after 17 texts of 2,000 tokens
(SmolLM2-135M; none that the benchmark reports), after 28 others by 1.4 % with a standard error of 0.4; with mean attention, or with 5
neighbours, after the 17 by 0.8 %.

After 10 of them by 0.5 %; with 32 queries by 1.2 %, with 128 by 1.5 %; with a fifth and three fifths for the newest by 0.7 % and 1.0 %; in
the way of ``ASKED`` by 3.1 %, after one of them by 17 %: eight tokens that are no question say little about what will be needed.
An engine need not ask all 64 (ENOUGH of graph/scores.py): with 16 spread over them, as many of the questions about texts of 1,000 and
2,000 tokens are answered after a pass, a fifth kept (+0.02 [-0.02, 0.05]; the benchmark's seeds for tuning). Their memory is that of 192
cells.
"""
WATCHED = max(ASKED.queries, UNASKED.queries)
"""Queries to watch where a pass may be of either kind."""


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


def check(keep: int, first: int, last: int, method: str, queries: int | None = None) -> None:
    """Raise OptionError for what is no way to prune."""
    if method not in METHODS:
        raise OptionError(f"there is no such way to prune as {method!r}; choose from {', '.join(METHODS)}")
    if keep < 1 or min(first, last) < 0 or first + last > keep:
        raise OptionError(f"{keep} cells cannot be kept with {first} protected at the beginning and {last} at the end; keep more")
    if queries is not None and queries < 1:
        raise OptionError(f"pruning cannot ask with {queries} queries; ask with one or more")


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


def _obcache(layer: Layer) -> Scores:
    import numpy as np

    asked = layer.attention()
    squares = np.einsum("gqn,gqn->gn", asked, asked)  # makes no array as large as the attention
    return _pooled(np.sqrt(squares / asked.shape[1])) * layer.value_norms()


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
    "obcache": _obcache,
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
    """How many cells to keep, how many of them are protected at each end, and how the others are chosen: arguments of ``prune``."""

    keep: int
    first: int
    last: int
    method: str
    queries: int


def plan(keep: int, *, head: int = 0, asked: bool = False, since: int = 0) -> Plan:
    """How to prune to ``keep`` cells. ``head``: cells of the system prompt. ``asked``: a question is the end of the cache.
    ``since``: cells since the last question began.

    The newest cells are protected, and what was said since the question as long as that takes no more than half. At the beginning the
    system prompt is, up to a quarter, and the first cells always: much attention rests there whatever is asked.
    """
    way = ASKED if asked else UNASKED
    first = min(keep, max(SINKS, head if head <= keep // 4 else 0))
    newest = int(way.newest * keep)
    return Plan(keep, first, min(keep - first, max(newest, min(since + newest, keep // 2))), way.method, way.queries)
