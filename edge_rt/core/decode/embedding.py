"""Embeddings of texts: what a model's last hidden states say of a text as a whole.

Poolings are llama.cpp's (enum llama_pooling_type): the mean of all tokens' hidden states, the first token's, or the last one's. Models
that were trained for it say in their file which is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from edge_rt.core.decode.relief import Relieve, relieved
from edge_rt.core.engine import EmbedsText, Engine, Part
from edge_rt.errors import ContextOverflow, NativeError, OptionError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt.core.load.header import Header
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

    def __init__(self, engine: Engine, relieve: Relieve = lambda: False) -> None:
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
            self._sequence = relieved(self._relieve, self._engine.new_sequence)
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
        part = Part(self._sequence, piece, "all" if whole or self._pooling == "mean" else "none")
        (rows,) = relieved(self._relieve, lambda: self._shows.hidden([part]), lambda: self._engine.length(sequence) == self._fed)
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
