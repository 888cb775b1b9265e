"""Recall: which of what left the context is close to the question.

Late interaction (ColBERT, Khattab and Zaharia, 2020): every token of the question looks for the most similar token of a segment, and
rare tokens count more. The vectors are the model's own token embeddings, which lie in its file: a segment leaves nothing behind but its
tokens. One vector for a whole segment, the mean of the same embeddings, put the right one of 24 to 56 segments first in 65 to 75 % of
scripted conversations, English and Chinese; late interaction in all of 60.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edge_rt.core.context.cell_store import CellStore
from edge_rt.core.engine import EmbedsTokens, Engine, MovesCells
from edge_rt.errors import ContextError, SessionFileError

if TYPE_CHECKING:
    from edge_rt.core.context.history import Evicted, History

Similarity = Callable[[Sequence[int], Sequence[int]], Any]
"""Of tokens [a] and [b]: float32 [a, b], 1 for the same token."""

RELEVANT = 0.55
"""Relevance from which a segment comes back. In scripted conversations the right one had 0.58 to 0.85, the next best 0.5 on average."""
SHARE = 4
"""At most a quarter of the context comes back for one question."""


def same_tokens(a: Sequence[int], b: Sequence[int]) -> Any:
    """Similarity for engines that do not show their embeddings: 1 for the same token, else 0."""
    import numpy as np

    return (np.asarray(a)[:, None] == np.asarray(b)[None, :]).astype(np.float32)


def embedded(vectors: Callable[[Sequence[int]], Any]) -> Similarity:
    """Cosines of token vectors, float32 [n, E], without the direction that all of them share."""

    def similarity(a: Sequence[int], b: Sequence[int]) -> Any:
        import numpy as np

        distinct = sorted({*a, *b})
        found = np.asarray(vectors(distinct), dtype=np.float32)
        found = found - found.mean(axis=0)
        found /= np.linalg.norm(found, axis=1, keepdims=True) + 1e-9
        place = {token: i for i, token in enumerate(distinct)}
        return found[[place[t] for t in a]] @ found[[place[t] for t in b]].T

    return similarity


def relevances(question: Sequence[int], segments: Sequence[Sequence[int]], similarity: Similarity) -> list[float]:
    """How close each segment is to the question, up to 1.

    A token's weight falls with the number of segments it is in: log(1 + n / (0.5 + segments with it)).
    """
    if not question or not segments:
        return [0.0] * len(segments)
    import numpy as np

    seen = Counter(token for text in segments for token in set(text))
    n = len(segments)
    weights = np.array([math.log(1 + n / (0.5 + seen[token])) for token in question], dtype=np.float32)
    distinct = sorted({token for text in segments for token in text})
    place = {token: i for i, token in enumerate(distinct)}
    near = similarity(question, distinct)
    total = float(weights.sum())
    return [
        float(weights @ near[:, [place[t] for t in set(text)]].max(axis=1)) / total if text else 0.0 for text in segments
    ]  # fmt: skip


class Recall:
    """What a session remembers of segments that left: their cells, on disk, and how to tell which of them a question is about."""

    def __init__(self, engine: Engine, store: CellStore | None = None) -> None:
        """``store`` None: a private folder under the cache directory. Nothing is written before something leaves."""
        self._engine = engine
        self._store = CellStore() if store is None else store
        self._similarity = embedded(engine.token_embeddings) if isinstance(engine, EmbedsTokens) else same_tokens

    def relevances(self, question: Sequence[int], segments: Sequence[Sequence[int]]) -> list[float]:
        """How close each segment is to the question, up to 1. The engine's lock is held."""
        return relevances(question, segments, self._similarity)

    def keep(self, sequence: int, history: History, leaving: Sequence[Evicted]) -> None:
        """Keep the cells of tokens that are about to leave them. The engine's lock is held."""
        if not isinstance(self._engine, MovesCells):
            return
        for gone in leaving:
            if gone.end <= history.fed:
                try:
                    cells = self._engine.export_cells(sequence, history.cell(gone.start), history.cell(gone.end))
                except ContextError:  # pruned: these cells no longer belong to one segment
                    continue
                self._store.put(gone.start, history.tokens[gone.start : gone.end], cells)

    def bring_back(self, sequence: int, history: History, gone: Evicted) -> bool:
        """Put a segment's cells back where they were; False if they must be computed again. The engine's lock is held."""
        if not isinstance(self._engine, MovesCells):
            return False
        cells = self._store.take(gone.start, history.tokens[gone.start : gone.end])
        if cells is None:
            return False
        try:
            self._engine.insert_cells(sequence, history.cell(gone.start), cells)
        except (ContextError, SessionFileError):  # what was before them is pruned by now, or the file is damaged
            return False
        history.restore(gone)
        return True

    def forget(self) -> None:
        """Drop the cells: the session ends."""
        self._store.close()
