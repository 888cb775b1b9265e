"""Which cells of a cache to keep, layer by layer and head by head, when, and for what question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol

from edge_rt.core.context.manager import spare
from edge_rt.core.engine import EmbedsTokens, Engine, PrunesCells, RemovesCells
from edge_rt.errors import ContextError, ContextOverflow, OptionError

if TYPE_CHECKING:
    from edge_rt.chat.transcript import Span
    from edge_rt.core.context.history import SequenceState
    from edge_rt.core.context.recall import Similarity
    from edge_rt.types import Pruning

# Which cells of a cache to keep, layer by layer and head by head: what the last queries look at, and the two ends.
#
# ``METHODS`` give every cell a score; the protected ends and the highest of the rest stay. edge-rt uses the first two: ``ASKED`` where
# a question is the end of the cache, ``UNASKED`` where nobody knows what comes. The others are what they are compared with:
#
# - ``defensive`` (DefensiveKV, Feng et al. 2025): the highest attention any of the last queries pays, and at least the mean of these over
#   all cells, times the length of the value. What one query needed once may be needed again, which an average would hide.
# - ``obcache`` (OBCache, Gu et al. 2025, its score of values): the root of the mean squared attention, times the length of the value. That
#   is by how much outputs are off without the cell, over queries that are as likely as these: between the mean, which does not see what
#   few of them need, and the highest, which sees nothing else.
# - ``snapkv`` (Li et al. 2024): mean attention of the last queries. ``h2o`` (Zhang et al. 2023): the same without regard to neighbours; of
#   the attention accumulated since the beginning only the part of the queries still held is known.
# - ``keydiff`` (Park et al. 2025): keys least like the mean of the others; asks no queries.
# - ``random`` and ``window`` (the newest) are the floor.

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


class PruningMethod(NamedTuple):
    """How to make a kind of pass. ``queries``: the last so many tokens are what is asked. ``newest``: share of what is kept that stays
    because it is the newest.
    """

    method: str
    queries: int
    newest: float


ASKED = PruningMethod("defensive", 8, 0.1)
"""For a pass after a question. In the test above 16 queries were no better (100 % and 101 %); a pass took half as long again. 64 reach back
before the question: of 12 such questions a tenth of the cells then answers less than half as many.
"""
UNASKED = PruningMethod("obcache", 64, 0.4)
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


def choose_cells(layers: Iterable[Layer], keep: int, first: int, last: int, method: str) -> npt.NDArray[np.intp]:
    """The ``keep`` cells of each head to keep, rising, the ``first`` and ``last`` ones among them: [L, G, keep]. See ``check``."""
    import numpy as np

    return np.stack([_best(METHODS[method](layer), keep, first, last) for layer in layers])


def check_pruning(keep: int, first: int, last: int, method: str, queries: int | None = None) -> None:
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


class PruningPlan(NamedTuple):
    """How many cells to keep, how many of them are protected at each end, and how the others are chosen: arguments of ``prune``."""

    keep: int
    first: int
    last: int
    method: str
    queries: int


def plan(keep: int, *, head: int = 0, asked: bool = False, since: int = 0) -> PruningPlan:
    """How to prune to ``keep`` cells. ``head``: cells of the system prompt. ``asked``: a question is the end of the cache.
    ``since``: cells since the last question began.

    The newest cells are protected, and what was said since the question as long as that takes no more than half. At the beginning the
    system prompt is, up to a quarter, and the first cells always: much attention rests there whatever is asked.
    """
    way = ASKED if asked else UNASKED
    first = min(keep, max(SINKS, head if head <= keep // 4 else 0))
    newest = int(way.newest * keep)
    return PruningPlan(keep, first, min(keep - first, max(newest, min(since + newest, keep // 2))), way.method, way.queries)


# When a request prunes its cells, how far, and for what question.
#
# Engines that show their attention prune head by head (pruning.py). For others tokens leave as wholes, chosen by what they have to do with
# the question: they are evicted, and the history knows which.

_LEAST = 2  # cells to be allowed: one that is kept, one for the next token
LONGEST = 32
"""Tokens of a question, its last ones, that are fed for a pass before their turn."""
TEMPLATE = 8
"""Queries that a pass asks with besides those of a question from a chat template: that ends the turn and begins the answer."""


class Pruner:
    """The passes of one request. ``cells`` counts what left every head, ``released`` the bytes that gave back to the system."""

    def __init__(
        self,
        pruning: Pruning,
        engine: Engine,
        lock: AbstractContextManager[object],
        sequence: int,
        history: SequenceState,
        *,
        allowed: int,
        pieces: Callable[[], list[Span]],
        evict: Callable[[Sequence[tuple[int, int]]], None],
    ) -> None:
        """``allowed``: cells of the request. ``pieces`` of the prompt are asked for when something has to be pruned. ``evict`` lets
        tokens [start, end) leave as wholes, for engines that prune no heads. The lock is held now, and by no other call.

        Raises OptionError where cells cannot leave, or a budget in bytes where nobody knows how many a cell takes.
        """
        self.cells = self.released = 0
        self._pruning, self._engine, self._lock, self._sequence, self._history = pruning, engine, lock, sequence, history
        self._allowed, self._pieces, self._evict = allowed, pieces, evict
        self._heads = engine if isinstance(engine, PrunesCells) else None
        self._cell_bytes: int | None = getattr(engine, "cell_bytes", None)
        budget_cells(pruning, 1, self._cell_bytes)
        if self._heads is None and not _loses_tokens(engine, sequence):
            raise OptionError(f"{engine.info.architecture} models on {engine.info.engine} cannot lose cells; ask for no pruning")
        self._asked = False  # a pass for the question was made
        self._answered = 0  # tokens of the answer at the last pass
        self._told = 0

    @property
    def keep(self) -> int:
        """Cells that a pass leaves, fewer than are allowed."""
        wanted = budget_cells(self._pruning, len(self._history.tokens), self._cell_bytes)
        return max(1, min(wanted, self._allowed - spare(self._allowed)))

    def start(self) -> int:
        """Before a prompt is fed: have the engine keep queries from now on. Returns the token to feed from, that its question be heard.

        Raises ContextOverflow where there is room for no pass.
        """
        history, asked = self._history, len(self._history.tokens)
        if asked > self._allowed < _LEAST:
            raise ContextOverflow(f"pruning needs a context of {_LEAST} tokens, not {self._allowed}; raise --ctx", _LEAST, self._allowed)
        if history.cell(asked) > self.keep:  # there will be a pass
            asked = max(self._question(), history.condensed.tokens)
        if self._heads is not None:
            with self._lock:
                self._heads.watch(self._sequence, WATCHED)
        return asked

    def ready(self, coming: int, answered: int | None) -> int:
        """Prune if it is time, and say how many of ``coming`` tokens there is room for.

        ``answered``: tokens of the answer so far, None while the prompt is read.
        """
        if self._due(coming, answered):
            self.prune(answered)
        return max(1, min(coming, self._allowed - self._history.cells))

    def _due(self, coming: int, answered: int | None) -> bool:
        cells, keep, pruning = self._history.cells, self.keep, self._pruning
        if cells <= keep:
            return False
        if cells >= keep + spare(keep) or cells + coming > self._allowed:
            return True
        if answered is None:
            return False
        return (pruning.question and not self._asked) or 0 < pruning.every <= answered - self._answered

    def prune(self, answered: int | None) -> None:
        """One pass. Raises OutOfMemory; then nothing has changed."""
        history, start, before = self._history, self._question(), self._history.cells
        since = max(0, history.kept(history.fed) - history.kept(start))
        end, head = self._pieces()[-1].end, history.kept(_head(self._pieces()))
        chosen = plan(self.keep, head=head, asked=history.fed <= end, since=since)
        if history.fed <= end and self._message() >= 0:
            chosen = chosen._replace(queries=chosen.queries + TEMPLATE)
        if self._heads is not None:
            with self._lock:
                self.released += self._prune_heads(chosen, history.tokens[max(start, history.fed) : end][-LONGEST:])
            history.condense(before - self._engine.length(self._sequence), chosen.last)
        else:
            self._evict(self._unwanted(chosen, history.tokens[start:end][-LONGEST:]))
        self.cells += before - history.cells
        self._asked, self._answered = True, answered or 0

    def notice(self) -> str | None:
        """What left since the last call, in words."""
        gone, self._told = self.cells - self._told, self.cells
        return f"{gone:,} cells were pruned, {self._history.cells:,} are left" if gone else None

    def _question(self) -> int:
        """The token where the question begins: with the user's last message, or, if that is long or there is none, near the end."""
        pieces, asked = self._pieces(), self._message()
        near = max(0, pieces[-1].end - LONGEST)
        return max(near, next((piece.start for piece in pieces if piece.segment.message == asked >= 0), near))

    def _message(self) -> int:
        """The number of the user's last message, -1 if there is none."""
        from edge_rt.chat.transcript import question

        return question(self._pieces())

    def _prune_heads(self, chosen: PruningPlan, question: Sequence[int]) -> int:
        """Returns bytes given back. What of the ``question`` was not fed yet is, for the time of the pass: the cache is pruned for it."""
        from edge_rt.core.engine import SequenceBatch

        assert self._heads is not None, "asked only where heads can be pruned"
        engine, sequence, before = self._engine, self._sequence, self._history.cells
        question = question[: engine.info.max_context - before]
        n = len(question)
        if n:
            engine.step([SequenceBatch(sequence, question, "none")])
        try:
            pruned = self._heads.prune(
                sequence, chosen.keep + n, first=chosen.first, last=chosen.last + n, method=chosen.method, queries=chosen.queries
            )  # fmt: skip
        except BaseException:
            if n:
                engine.truncate(sequence, before)
            raise
        if n:
            engine.truncate(sequence, chosen.keep)
        return pruned.released_bytes

    def _unwanted(self, chosen: PruningPlan, question: Sequence[int]) -> list[tuple[int, int]]:
        """Tokens of the history that should leave as wholes: spans, rising, apart."""
        from edge_rt.core.context.recall import embedded, same_tokens

        history, engine = self._history, self._engine
        places = history.places()
        tokens = [history.tokens[place] for place in places]
        with self._lock:
            similarity = embedded(engine.token_embeddings) if isinstance(engine, EmbedsTokens) else same_tokens
            kept = {places[i] for i in choose_tokens(tokens, question, chosen, similarity)}
        return list(spans(place for place in places if place not in kept))


def _loses_tokens(engine: Engine, sequence: int) -> bool:
    """Whether tokens can be taken out of the middle of a sequence: asked with none."""
    if not isinstance(engine, RemovesCells):
        return False
    try:
        engine.remove_cells(sequence, [])
    except ContextError:
        return False
    return True


def _head(pieces: Sequence[Span]) -> int:
    """The token after the system prompt and the tool schemas that a prompt begins with."""
    return next((piece.start for piece in pieces if piece.segment.kind not in ("system", "schema")), 0)


def spans(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Runs [start, end) of rising numbers."""
    start = end = -1
    for number in numbers:
        if number != end and start < end:
            yield start, end
        start, end = (start if number == end else number), number + 1
    if start < end:
        yield start, end


def choose_tokens(tokens: Sequence[int], question: Sequence[int], chosen: PruningPlan, similarity: Similarity) -> list[int]:
    """Which tokens to keep: indices, rising, both ends of the plan among them.

    A token counts as much as its neighbourhood has to do with the question: every token of the question looks for the likest one there,
    and rare ones count more (late interaction, as in recall.py).
    """
    import numpy as np

    from edge_rt.core.context.recall import rarities

    n, distinct = len(tokens), sorted(set(tokens))
    place = {token: i for i, token in enumerate(distinct)}
    near = np.asarray(similarity(sorted({*question, *distinct}))(question, distinct))[:, [place[token] for token in tokens]]
    around = np.pad(near, ((0, 0), (NEIGHBOURS, NEIGHBOURS)), mode="edge")
    best = np.lib.stride_tricks.sliding_window_view(around, 2 * NEIGHBOURS + 1, axis=1).max(axis=2)
    scores = rarities(question, Counter(tokens), n) @ best
    scores[: chosen.first] = scores[n - chosen.last :] = np.inf
    kept: list[int] = np.sort(np.argsort(-scores, kind="stable")[: chosen.keep]).tolist()
    return kept
