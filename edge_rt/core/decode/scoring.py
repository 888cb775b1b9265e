"""How likely a model finds texts that are given: the log-probability of every token behind those before it, from logits before sampling."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_rt.core.decode.logprobs import LOGITS_CHUNK, chosen_logprobs, token_logprobs
from edge_rt.core.decode.relief import Relieve, relieved
from edge_rt.core.engine import Part
from edge_rt.errors import OptionError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy.typing as npt

    from edge_rt.core.engine import Engine, Wanted

    Rows = npt.NDArray[np.float32]
    """Logits: float32 [n, n_vocab]."""

Rivals = tuple[tuple[int, float], ...]
"""Tokens and their log-probabilities, the likeliest first."""


class Scored(NamedTuple):
    """A continuation's natural log-probabilities, float64 [n_tokens]. ``top``: of each token's place the likeliest tokens, if asked for.
    ``beyond``: the same of what would come behind the last token.
    """

    logprobs: npt.NDArray[np.float64]
    top: tuple[Rivals, ...] = ()
    beyond: Rivals = ()


def scoring(
    engine: Engine,
    tokens: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    top: int = 0,
    beyond: bool = False,
    relieve: Relieve = lambda: False,
) -> Generator[Scored | None, int, None]:
    """Score continuations of the same ``tokens``, which are read once, piece by piece: after the first ``next``, ``send`` how many tokens
    may be read; what comes is a continuation's score in their order, or None where there is none yet. Who drives it holds the engine's
    lock while it does, also to close it. ``relieve`` is asked for memory when there is none, and says whether it could free any.

    Raises OptionError where there are no tokens or one is out of range, NativeError for logits that are no numbers, what the engine raises.
    """
    if not tokens:
        raise OptionError("a continuation of nothing has no likelihood; give at least one token before it")
    if unknown := [token for one in (tokens, *continuations) for token in one if not 0 <= token < engine.info.n_vocab]:
        raise OptionError(f"token {unknown[0]} is out of range; this model has tokens 0 to {engine.info.n_vocab - 1}")
    room = yield None
    sequence = relieved(relieve, engine.new_sequence)
    own = [sequence]
    try:
        first, fed = None, 0
        while fed < len(tokens):
            piece = tokens[fed : fed + min(room, engine.info.chunk)]
            fed += len(piece)
            first = _read(engine, sequence, piece, "last" if fed == len(tokens) else "none", relieve)
            room = yield None
        assert first is not None, "the last row was asked for"
        for index, one in enumerate(continuations):
            if index + 1 < len(continuations):
                own.append(relieved(relieve, lambda: engine.fork_sequence(sequence, len(tokens))))
            found = _Sum(first, top)
            fed, end = 0, len(one) if beyond else len(one) - 1
            while fed < end:
                piece = one[fed : min(end, fed + min(room, LOGITS_CHUNK))]
                rows = _read(engine, own[-1], piece, "all", relieve)
                found.add(one[fed : fed + len(piece)], rows)
                fed += len(piece)
                room = yield None
            room = yield found.scored(one[fed:], beyond)
            if len(own) > 1:
                engine.free_sequence(own.pop())
    finally:
        for one_sequence in reversed(own):
            engine.free_sequence(one_sequence)


class _Sum:
    """What is known of a continuation so far. ``row``: logits before its next token."""

    def __init__(self, row: Rows, top: int) -> None:
        self._row, self._top = row, top
        self._logprobs: list[npt.NDArray[np.float64]] = []
        self._rivals: list[Rivals] = []

    def add(self, tokens: Sequence[int], rows: Rows) -> None:
        """``rows``: logits behind each of these tokens."""
        before = np.concatenate((self._row, rows[:-1]))
        self._note(before, tokens)
        self._row = np.array(rows[-1:])

    def _note(self, before: Rows, tokens: Sequence[int]) -> None:
        self._logprobs.append(chosen_logprobs(before, tokens))
        if self._top:
            self._rivals += [token_logprobs(row, token, self._top)[1] for row, token in zip(before, tokens, strict=True)]

    def scored(self, rest: Sequence[int], beyond: bool) -> Scored:
        """``rest``: the last token, which needs not be read, or none."""
        self._note(self._row[: len(rest)], rest)
        behind = token_logprobs(self._row[0], 0, max(1, self._top))[1] if beyond else ()
        return Scored(np.concatenate(self._logprobs), tuple(self._rivals), behind)


def _read(engine: Engine, sequence: int, tokens: Sequence[int], wanted: Wanted, relieve: Relieve) -> Rows:
    """Logits that are ours: the engine's may change with its next step. None wanted: none [0, n_vocab]."""
    length = engine.length(sequence)

    def work() -> Rows:
        (rows,) = engine.step([Part(sequence, tokens, wanted)])
        return np.empty((0, engine.info.n_vocab), np.float32) if rows is None else np.array(rows)

    return relieved(relieve, work, lambda: engine.length(sequence) == length)


def divided(before: Sequence[int], rows: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Token rows of texts that begin with the same text, which alone has the tokens ``before``: what all keep of it, and the rest of each,
    which is never empty. Where a text goes on, its tokens may be others than those of its beginning.
    """
    most = min(len(before), *(len(row) - 1 for row in rows))
    shared = next((at for at in range(most) if any(row[at] != before[at] for row in rows)), most)
    return list(before[:shared]), [list(row[shared:]) for row in rows]


def continuation_logprobs(
    engine: Engine, lock: AbstractContextManager[object], tokens: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[npt.NDArray[np.float64]]:
    """Natural log-probabilities of every token of each continuation of the same ``tokens``, which are computed once.

    Raises what ``scoring`` raises.
    """
    steps = scoring(engine, tokens, continuations)
    found: list[npt.NDArray[np.float64]] = []
    with lock:
        try:
            next(steps)
            while len(found) < len(continuations):
                if (one := steps.send(LOGITS_CHUNK)) is not None:
                    found.append(one.logprobs)
        finally:
            steps.close()
    return found
