"""Embeddings of texts by an open model: numbers that lie close for texts of close meaning."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING

from edge_rt.core.decode.embedding import Embedding, TextReader, finished, pooling_of, tokens_of

if TYPE_CHECKING:
    from edge_rt.core.decode.embedding import Vector
    from edge_rt.runtime import Model


def embeddings(
    model: Model, texts: Iterable[str | Sequence[int]], *, pooling: str | None = None, normalize: bool = True
) -> Generator[Embedding, None, None]:  # fmt: skip
    """Each text's embedding, when it is asked for. Texts are tokenised as llama.cpp's embedding does it, or given as tokens.

    ``pooling``: mean, cls or last; left out: what the file says, else the mean. ``normalize``: to length 1.
    Sessions on other threads go on between two chunks of a text. Raises OptionError for an empty text, and for a model or an engine that
    makes none, ContextOverflow for a text longer than the context, OutOfMemory, NativeError.
    """
    how, info = pooling_of(model.file.header, pooling), model.info
    reader = TextReader(model.engine, model.prefixes.clear)
    try:
        for index, text in enumerate(texts):
            tokens = tokens_of(model.vocab, text, index, info.max_context)
            with model.lock:
                reader.begin(tokens, how)
            pooled: Vector | None = None
            while pooled is None:
                with model.lock:
                    pooled = reader.read(info.chunk)
            yield Embedding(finished(pooled, normalize=normalize), len(tokens))
    finally:
        with model.lock:
            reader.close()
