"""Tokens in, text out that can no longer change: detokenise, stop, post-process, in this order."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol

from edge_rt.errors import OptionError
from edge_rt.postprocess.pipeline import Pipeline
from edge_rt.postprocess.text_search import AhoCorasick

# Tokens to text, one at a time: bytes wait until they make whole characters.


class Pieces(Protocol):
    """What a vocabulary must know here."""

    def piece(self, token: int) -> bytes:
        """The bytes of a token; none for control tokens."""
        ...


class Detokeniser:
    """Joined, the results are ``bytes.decode("utf-8", "replace")`` of the joined pieces, however the bytes are spread over tokens.

    At most three bytes wait. Control tokens render as nothing. A space that a SentencePiece vocabulary has in front of its
    first word stays: the text goes on after a prompt.
    """

    def __init__(self, vocab: Pieces) -> None:
        self._piece = vocab.piece
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, token: int) -> str:
        """The text that became certain with this token."""
        return self._decode(self._piece(token))

    def flush(self) -> str:
        """The stream ended: U+FFFD for an unfinished character, else nothing."""
        return self._decode(b"", final=True)


# Ends a text at a stop string.
#
# The stop string whose occurrence is complete first ends the text; of several complete at the same character, the longest. The text is
# cut where that occurrence begins: nothing from there on comes out, everything before does. Only text that may still turn out to be
# the beginning of a stop string is held back. Each character costs the same, however many stop strings there are (Aho-Corasick).


class StopMatcher:
    """One stream. After a stop string it gives out nothing more."""

    def __init__(self, stops: Iterable[str]) -> None:
        """Raises OptionError for an empty stop string, or anything that is no text."""
        if isinstance(stops, str):
            raise OptionError(f"stop is the text {stops!r}; give a list of texts")
        given = list(stops)
        for stop in given:
            if not isinstance(stop, str) or not stop:
                raise OptionError(f"stop string {stop!r} is no text or empty; leave it out")
        self._stops, self._automaton = given, AhoCorasick(given)
        self._state, self._held = 0, ""
        self.stopped: str | None = None

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take text; returns the text that is certain to come before any stop string, and the stop string if one is complete."""
        if self.stopped is not None:
            return "", self.stopped
        if not self._stops:
            return text, None
        self._state, ends = self._automaton.scan(text, self._state)
        whole = self._held + text
        if ends:
            last, state = ends[0]
            self.stopped = self._stops[next(self._automaton.ending(state))]
            before = len(self._held) + last + 1 - len(self.stopped)
            self._held = ""
            return whole[:before], self.stopped
        certain = len(whole) - self._automaton.depth[self._state]
        self._held = whole[certain:]
        return whole[:certain], None

    def flush(self) -> str:
        """The stream ended without a stop string: the text held back."""
        held, self._held, self._state = self._held, "", 0
        return held


# Tokens in, text out that can no longer change: detokenise, stop, post-process, in this order.


class OutputStream:
    """The ASSEMBLE stage of one stream. ``stop`` is the stop string that ended it, if one did."""

    def __init__(self, detokeniser: Detokeniser, stops: StopMatcher, pipeline: Pipeline) -> None:
        self._detokeniser, self._stops, self._pipeline = detokeniser, stops, pipeline
        self.stop: str | None = None

    @property
    def pipeline(self) -> Pipeline:
        """The post-processors, for what they say of themselves."""
        return self._pipeline

    def feed(self, token: int) -> str:
        """Text that became final with this token. Raises PluginError if a post-processor that fails closed failed."""
        text, self.stop = self._stops.feed(self._detokeniser.feed(token))
        return self._pipeline.feed(text) if text else ""

    def finish(self, *, whole: bool) -> str:
        """The stream ended: everything still held back. ``whole``: the model had no more to say. Raises PluginError as ``feed`` does.

        After a stop string there is nothing more of the model's text, and what comes next of it is known: the stop string. Half of a
        character that a cut leaves is no text for post-processors: it would look like the end of what came before.
        """
        rest = ""
        if self.stop is None:
            half = self._detokeniser.flush()
            rest, self.stop = self._stops.feed(half if whole or not self._pipeline.held else "")
            rest += self._stops.flush() if self.stop is None else ""
        text = self._pipeline.feed(rest)
        if self.stop is None and whole:
            return text + self._pipeline.flush()
        return text + self._pipeline.cut(self.stop or "")
