"""An open model that reads a context once and answers questions about it, greedily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import numpy as np

from edge_rt.core.engine import SequenceBatch
from edge_rt.model import Model

KEPT = 2
"""Contexts whose cells are kept: the whole one, which several methods may start from, and the last that a method made of it."""
_ENDS = (".", "。", "\n")


class Reader:
    """A context manager over an open Model, which stays the caller's. Contexts are known by their tokens, so none is taken for another."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._cells: dict[tuple[int, ...], int] = {}  # tokens -> sequence, the one used last at the end

    def tokens(self, text: str) -> list[int]:
        """A text's tokens, without one for its beginning."""
        return self.model.tokenize(text, bos=False)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokens(text))

    @contextmanager
    def after(self, tokens: Sequence[int]) -> Iterator[int]:
        """A fresh sequence that holds these tokens, freed afterwards. Raises ContextError where they do not fit."""
        engine = self.model.engine
        sequence = engine.fork_sequence(self._read(tuple(tokens)), len(tokens))
        try:
            yield sequence
        finally:
            engine.free_sequence(sequence)

    def _read(self, tokens: tuple[int, ...]) -> int:
        """The sequence kept for these tokens. It is never changed, only forked."""
        engine = self.model.engine
        sequence = self._cells.pop(tokens, None)
        if sequence is None:
            while len(self._cells) >= KEPT:
                engine.free_sequence(self._cells.pop(next(iter(self._cells))))
            sequence = engine.new_sequence()
            try:
                self._feed(sequence, tokens)
            except BaseException:
                engine.free_sequence(sequence)
                raise
        self._cells[tokens] = sequence
        return sequence

    def _feed(self, sequence: int, tokens: Sequence[int]) -> None:
        chunk = self.model.info.chunk
        for start in range(0, len(tokens), chunk):
            self.model.engine.step([SequenceBatch(sequence, tokens[start : start + chunk], "none")])

    def answer(self, sequence: int, question: Sequence[int], limit: int) -> str:
        """Feed a question's tokens to a sequence and return the greedy answer: its first sentence, ``limit`` tokens at most."""
        found: list[int] = []
        tokens = list(question)
        text = ""
        while True:
            (logits,) = self.model.engine.step([SequenceBatch(sequence, tokens)])
            assert logits is not None, "logits of the last token were asked for"
            token = int(np.argmax(np.asarray(logits[0])))
            if self.model.vocab.is_eog(token):
                return text
            found.append(token)
            text = self.model.detokenize(found)
            if len(found) == limit or any(end in text for end in _ENDS):
                return text
            tokens = [token]

    def losses(self, sequence: int, tokens: Sequence[int]) -> list[float]:
        """Minus the natural logarithm of each token's probability, but the first one's, after a sequence."""
        (logits,) = self.model.engine.step([SequenceBatch(sequence, tokens, "all")])
        assert logits is not None, "logits of all tokens were asked for"
        rows = np.asarray(logits, dtype=np.float64)[:-1]
        rows = rows - rows.max(axis=1, keepdims=True)
        chosen = rows[np.arange(len(rows)), np.asarray(tokens[1:])]
        return list(np.log(np.exp(rows).sum(axis=1)) - chosen)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sequence in self._cells.values():
            self.model.engine.free_sequence(sequence)
        self._cells.clear()
