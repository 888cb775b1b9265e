"""How likely a model finds given texts, log-probabilities of tokens, and embeddings of texts."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from edge_rt.core.engine import EmbedsText, Engine, SequenceBatch
from edge_rt.core.generate.loop import FreeMemory, retry_after_freeing
from edge_rt.errors import ContextOverflow, NativeError, OptionError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy.typing as npt

    from edge_rt.core.engine import Engine, Row

# Logits of a whole text, and log-probabilities of tokens, from the model's logits before any sampling.

LOGITS_CHUNK = 128
"""Tokens per step when logits of every token are wanted: 128 x 49,152 float32 are 25 MB."""


def text_logits(engine: Engine, lock: AbstractContextManager[object], tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits after every token of a text of its own: float32 [n_tokens, n_vocab]. Raises ContextError, OptionError."""
    if not tokens:
        raise OptionError("logits of no tokens were asked for; give at least one")
    rows = []
    with lock:
        sequence = engine.new_sequence()
        try:
            for start in range(0, len(tokens), LOGITS_CHUNK):
                (part,) = engine.step([SequenceBatch(sequence, tokens[start : start + LOGITS_CHUNK], "all")])
                assert part is not None, "all rows were asked for"
                rows.append(np.array(part))
        finally:
            engine.free_sequence(sequence)
    return np.concatenate(rows)


def chosen_logprobs(rows: npt.NDArray[np.float32], tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    """The natural log-probability of a token in each row: of logits float32 [n, n_vocab], float64 [n].

    Raises NativeError for logits with NaN or +inf.
    """
    if not len(tokens):
        return np.empty(0)
    shifted, total = _shifted(rows)
    found: npt.NDArray[np.float64] = shifted[np.arange(len(tokens)), list(tokens)].astype(np.float64) - np.log(total)
    return found


def _shifted(logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Logits [..., n_vocab] less the maximum of each row, in float32 (exact for nearby values), and the sum of their exponentials, in
    float64. Raises NativeError for logits with NaN or +inf.
    """
    peak = logits.max(-1, keepdims=True)
    if not np.isfinite(peak).all():
        raise NativeError(f"the logits hold {peak[~np.isfinite(peak)][0]}; the model file or the computation is damaged")
    shifted = logits - peak
    return shifted, np.asarray(np.exp(shifted).sum(-1, dtype=np.float64))


def token_logprobs(row: Row, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The natural log-probability of ``token`` and the ``n`` likeliest tokens with theirs, best first (ties: the lowest id).

    ``row`` is float32 [n_vocab]. Stable: the maximum is taken off in float32 (exact for nearby values), the exponentials are
    summed in float64; the result is good to about 1e-6. A token with logit -inf has log-probability -inf.
    Raises OptionError for a token out of range or a negative ``n``, NativeError for logits with NaN or +inf.
    """
    logits = np.asarray(row)
    if n < 0:
        raise OptionError(f"logprobs is {n}; allowed: 0 (off) or more")
    if not 0 <= token < logits.size:
        raise OptionError(f"token {token} is out of range; this model has tokens 0 to {logits.size - 1}")
    shifted, exponentials = _shifted(logits)
    total = math.log(exponentials)
    n = min(n, logits.size)
    if n == 0:
        return float(shifted[token]) - total, ()
    least = np.partition(shifted, -n)[-n]
    above = np.flatnonzero(shifted >= least)
    best = above[np.argsort(-shifted[above], kind="stable")][:n]
    return float(shifted[token]) - total, tuple((int(t), float(shifted[t]) - total) for t in best)


# Embeddings of texts: what a model's last hidden states say of a text as a whole.
#
# Poolings are llama.cpp's (enum llama_pooling_type): the mean of all tokens' hidden states, the first token's, or the last one's. Models
# that were trained for it say in their file which is theirs.

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt.core.gguf.reader import Header
    from edge_rt.native.llama import Vocab

    Vector = npt.NDArray[np.float32]
    """A text's embedding: float32 [n_embd]."""

Pooling = Literal["mean", "cls", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "last")
_NONE, _RANK = 0, 4
"""Of llama_pooling_type. Ranking: hidden states go through a head that tells how well a text answers a question."""


class Embedding(NamedTuple):
    """A text's embedding, float32 [n_embd], and how many tokens the text has."""

    vector: Vector
    tokens: int


def pooling_of(header: Header, asked: str | None = None) -> Pooling:
    """How a model's hidden states are pooled: as ``asked``, else as its file says, else by the mean.

    Raises OptionError for a pooling that there is not, and for a model whose embeddings are made in another way.
    """
    arch = header.architecture
    if header.get(f"{arch}.attention.causal", True) is False:
        raise OptionError(f"{arch} models read a text in both directions, which is not done here; use a model such as Qwen3-Embedding")
    if asked is not None:
        if asked not in POOLINGS:
            raise OptionError(f"there is no pooling {asked:.40}; choose from {', '.join(POOLINGS)}")
        return asked
    kind = header.get(f"{arch}.pooling_type")
    if kind == _RANK:
        raise OptionError("the model ranks texts by a question and was not trained for embeddings; name a pooling to have some anyway")
    if kind in (None, _NONE):
        return "mean"
    if not isinstance(kind, int) or not 1 <= kind <= len(POOLINGS):
        raise OptionError(f"the model's pooling {kind!r:.40} is not known here; name one of {', '.join(POOLINGS)}")
    return POOLINGS[kind - 1]


def tokens_of(vocab: Vocab, text: str | Sequence[int], index: int, room: int) -> list[int]:
    """A text's tokens as llama.cpp's embedding has them, between the tokens that the vocabulary wants around a text.

    ``text`` may be tokens already, which stay as they are. ``index``: which text it is, for messages. ``room``: tokens that may be.
    Raises OptionError if there are none, or one that is no token, ContextOverflow if they are too many.
    """
    if isinstance(text, str):
        tokens = vocab.tokenize(text, special=True) if text else []
        if tokens and vocab.add_eos and vocab.eos is not None and tokens[-1] != vocab.eos:
            tokens.append(vocab.eos)
    else:
        tokens = list(text)
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab.n_tokens):
            raise OptionError(f"text {index + 1} has a token outside the vocabulary of {vocab.n_tokens}; tokenize with this model")
    if not tokens:
        raise OptionError(f"text {index + 1} is empty and has no embedding; leave it out")
    if len(tokens) > room:
        message = f"text {index + 1} has {len(tokens)} tokens and the context {room}; divide it, or raise --ctx"
        raise ContextOverflow(message, len(tokens), room)
    return tokens


def finished(pooled: Vector, *, normalize: bool = True, dimensions: int | None = None) -> Vector:
    """An embedding as it is handed out. ``dimensions``: so many of its first numbers. ``normalize``: of length 1, after that.

    Raises OptionError for more dimensions than there are, NativeError for numbers that are none.
    """
    if dimensions is not None and not 1 <= dimensions <= len(pooled):
        raise OptionError(f"an embedding of this model has {len(pooled)} numbers and not {dimensions}; ask for fewer")
    found = pooled[:dimensions]
    exact = found.astype(np.float64)
    length = math.sqrt(float(exact @ exact))
    if not math.isfinite(length):
        raise NativeError("the hidden states hold numbers that are none; the model file or the computation is damaged")
    return (exact / length).astype(np.float32) if normalize and length else found


class TextReader:
    """Reads texts one after the other, in one sequence for all of them: graphs over its cells serve the next text too.

    The caller holds the engine's lock. ``relieve`` is asked for memory when there is none, and says whether it could free any.
    """

    def __init__(self, engine: Engine, relieve: FreeMemory = lambda: False) -> None:
        """Raises OptionError if the engine shows no hidden states."""
        if not isinstance(engine, EmbedsText):
            raise OptionError(f"the engine {engine.info.engine} makes no embeddings; choose another with --engine")
        self._engine: Engine = engine
        self._shows: EmbedsText = engine
        self._relieve = relieve
        self._sequence: int | None = None
        self._tokens: Sequence[int] = ()
        self._pooling: Pooling = "mean"
        self._fed = 0
        self._sum: npt.NDArray[np.float64] | None = None

    def begin(self, tokens: Sequence[int], pooling: Pooling) -> None:
        """Start with a text, which has tokens and fits the context. Raises OutOfMemory."""
        if self._sequence is None:
            self._sequence = retry_after_freeing(self._relieve, self._engine.new_sequence)
        self._engine.truncate(self._sequence, 0)
        # No token sees what comes after it, so of the first one's hidden state the others change nothing.
        self._tokens, self._pooling = (tokens[:1] if pooling == "cls" else tokens), pooling
        self._fed, self._sum = 0, None

    def read(self, most: int) -> Vector | None:
        """Read at most so many tokens further: the pooled hidden states, float32 [n_embd], when that was the last of them, else None.

        Raises what the engine does; the reader is to be closed then.
        """
        assert self._sequence is not None, "begin comes first"
        sequence = self._sequence
        piece = self._tokens[self._fed : self._fed + most]
        whole = self._fed + len(piece) == len(self._tokens)
        # Of the last piece always all rows: libllama pools that way, and kernels round otherwise for one row than for several.
        part = SequenceBatch(self._sequence, piece, "all" if whole or self._pooling == "mean" else "none")
        (rows,) = retry_after_freeing(self._relieve, lambda: self._shows.hidden([part]), lambda: self._engine.length(sequence) == self._fed)
        self._fed += len(piece)
        if self._pooling == "mean":
            assert rows is not None, "all were asked for"
            if self._sum is None:
                self._sum = np.zeros(rows.shape[1])
            for row in rows:  # one by one: the sum is the same however the text was divided
                self._sum += row
            return (self._sum / self._fed).astype(np.float32) if whole else None
        return np.array(rows[-1]) if whole and rows is not None else None

    def close(self) -> None:
        """Free the sequence; the next text gets another."""
        if self._sequence is not None:
            self._engine.free_sequence(self._sequence)
            self._sequence = None


# How likely a model finds texts that are given: the log-probability of every token behind those before it, from logits before sampling.

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
    relieve: FreeMemory = lambda: False,
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
    sequence = retry_after_freeing(relieve, engine.new_sequence)
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
                own.append(retry_after_freeing(relieve, lambda: engine.fork_sequence(sequence, len(tokens))))
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


def _read(engine: Engine, sequence: int, tokens: Sequence[int], wanted: Wanted, relieve: FreeMemory) -> Rows:
    """Logits that are ours: the engine's may change with its next step. None wanted: none [0, n_vocab]."""
    length = engine.length(sequence)

    def work() -> Rows:
        (rows,) = engine.step([SequenceBatch(sequence, tokens, wanted)])
        return np.empty((0, engine.info.n_vocab), np.float32) if rows is None else np.array(rows)

    return retry_after_freeing(relieve, work, lambda: engine.length(sequence) == length)


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
