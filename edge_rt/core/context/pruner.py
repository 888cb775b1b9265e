"""When a request prunes its cells, how far, and for what question.

Engines that show their attention prune head by head (pruning.py). For others tokens leave as wholes, chosen by what they have to do with
the question: they are evicted, and the history knows which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from edge_rt.core.context.allowance import spare
from edge_rt.core.context.pruning import NEIGHBOURS, WATCHED, Plan, budget_cells, plan
from edge_rt.core.engine import EmbedsTokens, Engine, PrunesCells, RemovesCells
from edge_rt.errors import ContextError, ContextOverflow, OptionError

if TYPE_CHECKING:
    from edge_rt.core.context.history import History
    from edge_rt.core.context.recall import Similarity
    from edge_rt.core.context.transcript import Piece
    from edge_rt.types import Pruning

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
        history: History,
        *,
        allowed: int,
        pieces: Callable[[], list[Piece]],
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
        from edge_rt.core.context.transcript import question

        return question(self._pieces())

    def _prune_heads(self, chosen: Plan, question: Sequence[int]) -> int:
        """Returns bytes given back. What of the ``question`` was not fed yet is, for the time of the pass: the cache is pruned for it."""
        from edge_rt.core.engine import Part

        assert self._heads is not None, "asked only where heads can be pruned"
        engine, sequence, before = self._engine, self._sequence, self._history.cells
        question = question[: engine.info.max_context - before]
        n = len(question)
        if n:
            engine.step([Part(sequence, question, "none")])
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

    def _unwanted(self, chosen: Plan, question: Sequence[int]) -> list[tuple[int, int]]:
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


def _head(pieces: Sequence[Piece]) -> int:
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


def choose_tokens(tokens: Sequence[int], question: Sequence[int], chosen: Plan, similarity: Similarity) -> list[int]:
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
