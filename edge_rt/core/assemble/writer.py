"""Tokens in, text out that can no longer change: detokenise, stop, post-process, in this order."""

from __future__ import annotations

from edge_rt.core.assemble.detokenise import Detokeniser
from edge_rt.core.assemble.pipeline import Pipeline
from edge_rt.core.assemble.stopping import StopMatcher


class Writer:
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
