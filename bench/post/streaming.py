"""Texts as a model would say them: in tokens that end anywhere, even within a character, and with any kind of end."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from bench.post.secret import Sample
from edge_rt.core.generate.output import Detokeniser, OutputStream, StopMatcher
from edge_rt.postprocess.pipeline import Pipeline

LONGEST = 8
"""Characters of a token, at most."""
STOPS = ("\n\n", "###", "</s>", "。", "<|im_end|>")
Tokenise = Callable[[str], Sequence[bytes]]


class Stream(NamedTuple):
    """A text to be said. ``end``: how it ends; ``tokens`` are all that are said, ``shown`` characters of ``text`` come before the end."""

    text: str
    tokens: Sequence[bytes]
    end: Literal["whole", "limit", "stop", "cancel"]
    stop: str
    shown: int


class _Spoken(NamedTuple):
    """A vocabulary of the tokens of one text."""

    tokens: Sequence[bytes]

    def piece(self, token: int) -> bytes:
        return self.tokens[token]


def at_random(rng: random.Random, text: str) -> list[bytes]:
    """Tokens of one to eight characters, or as many bytes, which may end within a character."""
    data: str | bytes = text.encode() if rng.random() < 0.25 else text
    pieces, start = [], 0
    while start < len(data):
        piece = data[start : start + rng.randrange(1, LONGEST + 1)]
        start += len(piece)
        pieces.append(piece.encode() if isinstance(piece, str) else piece)
    return pieces


def stream(rng: random.Random, sample: Sample, tokenise: Tokenise | None) -> Stream:
    """Say a text: in the tokenizer's tokens at times, to its end, or cut by the limit, a stop string or a cancel close to a secret."""
    text, stop, end = sample.text, "", rng.choices(("whole", "limit", "stop", "cancel"), (35, 35, 15, 15))[0]
    span = rng.choice(sample.spans) if sample.spans else None
    if end == "stop":
        if span is not None and rng.random() < 0.6 and span.end - span.start > 1:
            place = rng.randrange(span.start + 1, span.end)
            stop = text[place : place + rng.choice((1, 2, 3))]
        else:
            stop = rng.choice(STOPS)
            place = span.end if span is not None else len(text)
            text = text[:place] + stop + text[place:]
    tokens = list(tokenise(text) if tokenise is not None and rng.random() < 0.25 else at_random(rng, text))
    if end in ("limit", "cancel"):
        near = rng.randrange(max(0, span.start - 3), span.end + 4) if span is not None else rng.randrange(len(text) + 1)
        tokens = tokens[: _count(tokens, len(text[:near].encode()))]
        return Stream(text, tokens, end, "", len(b"".join(tokens).decode(errors="ignore")))  # type: ignore[arg-type]
    return Stream(text, tokens, end, stop, text.index(stop) if stop else len(text))  # type: ignore[arg-type]


def _count(tokens: Sequence[bytes], size: int) -> int:
    """How many tokens hold at least so many bytes."""
    held = 0
    for number, token in enumerate(tokens):
        if held >= size:
            return number
        held += len(token)
    return len(tokens)


def said(spoken: Stream, pipeline: Pipeline) -> str:
    """What comes out of a pipeline; of a cancelled stream, what came before it was dropped."""
    writer = OutputStream(Detokeniser(_Spoken(spoken.tokens)), StopMatcher([spoken.stop] if spoken.stop else []), pipeline)
    parts = []
    for token in range(len(spoken.tokens)):
        parts.append(writer.feed(token))
        if writer.stop is not None:
            break
    if spoken.end != "cancel":
        parts.append(writer.finish(whole=spoken.end != "limit"))
    return "".join(parts)
