"""Recall: which of what left the context is close to the question.

Late interaction (ColBERT, Khattab and Zaharia, 2020): every token of the question looks for the most similar token of a segment, and
rare tokens count more. The vectors are the model's own token embeddings, which lie in its file: a segment leaves nothing behind but its
tokens. One vector for a whole segment, the mean of the same embeddings, put the right one of 24 to 56 segments first in 65 to 75 % of
scripted conversations, English and Chinese; late interaction in all of 60.

An embedder of a plugin takes its place where one was chosen: of every segment it makes one vector, once.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.core.engine import EmbedsTokens, Engine, MovesCells
from edge_rt.core.kv.swap import KVSwap
from edge_rt.errors import ContextError, SessionFileError

if TYPE_CHECKING:
    from edge_rt.core.context.history import Evicted, SequenceState

Compare = Callable[[Sequence[int], Sequence[int]], Any]
"""Of tokens [a] and [b]: float32 [a, b], 1 for the same token."""
Similarity = Callable[[Sequence[int]], Compare]
"""Given all tokens that will be compared, each once and rising: what compares them."""

RELEVANT = 0.55
"""Relevance from which a segment comes back. In scripted conversations the right one had 0.58 to 0.85, the next best 0.5 on average."""
SHARE = 4
"""At most a quarter of the context comes back for one question."""
LIMIT = 16_384
"""Summary vectors a session remembers, about a million tokens of conversation; beyond, those not needed for longest are made again."""
AT_ONCE = 1 << 23
"""Similarities of two tokens that are in memory together (32 MiB), and so is one product of matrices."""
ROWS = 1 << 10
"""Token embeddings that are read together: the engine takes no step meanwhile."""


class Passage(NamedTuple):
    """A segment or a question: its tokens in the context, and its text without the chat template's."""

    tokens: Sequence[int]
    text: str


def same_tokens(_: Sequence[int]) -> Compare:
    """Similarity for engines that do not show their embeddings: 1 for the same token, else 0."""
    import numpy as np

    return lambda a, b: (np.asarray(a)[:, None] == np.asarray(b)[None, :]).astype(np.float32)


def embedded(vectors: Callable[[Sequence[int]], Any]) -> Similarity:
    """Cosines of token vectors, float32 [n, E], without the direction that all of them share."""

    def similarity(tokens: Sequence[int]) -> Compare:
        import numpy as np

        found = np.array(vectors(tokens), dtype=np.float32)
        found -= found.mean(axis=0)
        found /= np.linalg.norm(found, axis=1, keepdims=True) + 1e-9
        place = {token: i for i, token in enumerate(tokens)}
        return lambda a, b: found[[place[t] for t in a]] @ found[[place[t] for t in b]].T

    return similarity


def rarities(question: Sequence[int], seen: Mapping[int, int], n: int) -> Any:
    """How much each token of a question counts, float32 [len(question)], where ``seen`` of ``n`` have it."""
    import numpy as np

    return np.array([math.log(1 + n / (0.5 + seen[token])) for token in question], dtype=np.float32)


def relevances(question: Sequence[int], segments: Sequence[Sequence[int]], similarity: Similarity) -> list[float]:
    """How close each segment is to the question, up to 1.

    A token's weight falls with the number of segments it is in: log(1 + n / (0.5 + segments with it)).
    """
    if not question or not segments:
        return [0.0] * len(segments)

    words = [set(text) for text in segments]
    seen = Counter(token for text in words for token in text)
    weights = rarities(question, seen, len(words))
    distinct = set().union(*words)
    compare = similarity(sorted(distinct.union(question)))
    total = float(weights.sum())
    groups: Iterable[Sequence[set[int]]] = [words]
    if len(question) * len(distinct) > AT_ONCE:  # equal tokens of the question have equal neighbours
        times = Counter(question)
        question = sorted(times)
        weights = rarities(question, seen, len(words)) * [times[token] for token in question]
        groups = _groups(words, max(1, AT_ONCE // len(question)))
    near = (one for group in groups for one in _nearest(question, group, compare))
    return [0.0 if one is None else float(weights @ one) / total for one in near]


def _nearest(question: Sequence[int], segments: Sequence[set[int]], compare: Compare) -> Iterator[Any]:
    """For each segment, how similar each token of the question is to the most similar in it: float32 [len(question)]; None if empty."""
    import numpy as np

    distinct = sorted(set().union(*segments))
    place = {token: i for i, token in enumerate(distinct)}
    near = np.ascontiguousarray(compare(question, distinct).T) if distinct else None  # a token's row is in one place
    for segment in segments:
        yield near[[place[token] for token in segment]].max(axis=0) if near is not None and segment else None


def _groups(segments: Sequence[set[int]], most: int) -> Iterator[Sequence[set[int]]]:
    """Segments in a row that have ``most`` distinct tokens together, or one that has more."""
    start, held = 0, set[int]()
    for i, segment in enumerate(segments):
        if i > start and len(held | segment) > most:
            yield segments[start:i]
            start, held = i, set()
        held |= segment
    yield segments[start:]


class Summaries:
    """One vector a segment, by an embedder; made when it is first compared, and remembered by the segment's text."""

    def __init__(self, embed: Callable[[Sequence[str]], Any], relevant: float, limit: int = LIMIT) -> None:
        """``embed`` makes vectors of length 1, float32 [n, E]. ``relevant``: the cosine that stands for RELEVANT."""
        self._embed, self._relevant, self._limit = embed, relevant, limit
        self._made: OrderedDict[str, Any] = OrderedDict()

    def relevances(self, question: str, segments: Sequence[str]) -> list[float]:
        """How close each segment is to the question, from -1 to 1, on the scale of late interaction. Raises what ``embed`` raises.

        Embedders differ in the cosines they give to strangers, and grades are compared with these numbers.
        """
        import numpy as np

        asked, *vectors = self._vectors([question, *segments])
        return list(map(float, np.interp(np.stack(vectors) @ asked, (-1, self._relevant, 1), (-1, RELEVANT, 1))))

    def _vectors(self, texts: Sequence[str]) -> list[Any]:
        if new := [text for text in dict.fromkeys(texts) if text not in self._made]:
            self._made.update((text, vector.copy()) for text, vector in zip(new, self._embed(new), strict=True))
        found = [self._made[text] for text in texts]
        for text in texts:
            self._made.move_to_end(text)
        while len(self._made) > self._limit:
            self._made.popitem(last=False)
        return found


class Recall:
    """What a session remembers of segments that left: their cells, on disk, and how to tell which of them a question is about."""

    def __init__(
        self,
        engine: Engine,
        lock: AbstractContextManager[object],
        summaries: Summaries | None = None,
        store: KVSwap | None = None,
    ) -> None:
        """``lock`` is the engine's. ``summaries`` None: the model's token embeddings tell what is close to a question.

        ``store`` None: a private folder under the cache directory. Nothing is written before something leaves.
        """
        self._engine, self._lock, self._summaries = engine, lock, summaries
        self._store = KVSwap() if store is None else store
        self._similarity = embedded(partial(self._embeddings, engine)) if isinstance(engine, EmbedsTokens) else same_tokens

    def relevances(self, question: Passage, segments: Sequence[Passage]) -> list[float]:
        """How close each segment is to the question, up to 1. That takes its time, and the engine's lock is free meanwhile."""
        if self._summaries is not None and question.text and segments:
            return self._summaries.relevances(question.text, [segment.text for segment in segments])
        return relevances(question.tokens, [segment.tokens for segment in segments], self._similarity)

    def _embeddings(self, engine: EmbedsTokens, tokens: Sequence[int]) -> Any:
        """Of tokens, float32 [len(tokens), E]; a few at a time, so that others can take their steps."""
        import numpy as np

        found = []
        for at in range(0, len(tokens), ROWS):
            with self._lock:
                found.append(engine.token_embeddings(tokens[at : at + ROWS]))
        return np.concatenate(found)

    def keep(self, sequence: int, history: SequenceState, leaving: Sequence[Evicted]) -> None:
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

    def bring_back(self, sequence: int, history: SequenceState, gone: Evicted) -> bool:
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
