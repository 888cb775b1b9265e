"""Texts to embed in the worker, as ``Readings`` read them: one after the other, each in all of the reader's one sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_rt.core.generate.scoring import TextReader, finished, pooling_of, tokens_of
from edge_rt.daemon.account import Need
from edge_rt.daemon.frames import Message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_rt.model import Model

AT_ONCE = 1 << 14
"""Characters of texts that are tokenised between two steps; a longer text is tokenised whole."""


class Embedding:
    """A request for embeddings of texts. ``reader`` serves all such requests."""

    advice = "embed a shorter text, or let the daemon use more memory"

    def __init__(self, model: Model, command: Message, reader: TextReader) -> None:
        """Raises OptionError."""
        self._model, self._command, self._reader = model, command, reader
        self._pooling = pooling_of(model.file.header, command.get("pooling"))
        self._texts: Sequence[str | Sequence[int]] = command.get("texts") or command["tokens"]
        self._tokens: list[list[int]] = []
        self._width = 0

    @property
    def units(self) -> int:
        """How many texts there are."""
        return len(self._texts)

    def prepare(self) -> bool:
        """Tokenise some of the texts; True when all are. Raises what ``tokens_of`` does."""
        model, seen = self._model, 0
        while len(self._tokens) < len(self._texts) and seen < AT_ONCE:
            text = self._texts[len(self._tokens)]
            self._tokens.append(tokens_of(model.vocab, text, len(self._tokens), model.info.max_context))
            seen += len(text)
        return len(self._tokens) == len(self._texts)

    def need(self, unit: int) -> Need:
        """What reading a text takes."""
        return Need(len(self._tokens[unit]), len(self._tokens[unit]))

    def begin(self, unit: int) -> None:
        """Raises OutOfMemory."""
        self._reader.begin(self._tokens[unit], self._pooling)

    def read(self, unit: int, room: int) -> Message | None:
        """A piece of the text; its event when that was the last. Raises what the engine does, OptionError."""
        pooled = self._reader.read(room)
        if pooled is None:
            return None
        command = self._command
        vector = finished(pooled, normalize=command.get("normalize", True), dimensions=command.get("dimensions"))
        self._width = len(vector)
        return {"event": "embedding", "index": unit, "embedding": vector.tolist(), "tokens": len(self._tokens[unit])}

    def close(self) -> None:
        """Free the cells."""
        self._reader.close()

    def answer(self) -> Message:
        """After the last event."""
        return {"pooling": self._pooling, "dimensions": self._width, "tokens": sum(map(len, self._tokens))}
