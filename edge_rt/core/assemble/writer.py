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
    def notices(self) -> list[str]:
        """What a person should know of the post-processors."""
        return self._pipeline.notices

    def feed(self, token: int) -> str:
        """Text that became final with this token. Raises PluginError if a post-processor that fails closed failed."""
        text, self.stop = self._stops.feed(self._detokeniser.feed(token))
        return self._pipeline.feed(text) if text else ""

    def finish(self) -> str:
        """The stream ended: everything still held back. After a stop string there is nothing more of the model's text."""
        rest = ""
        if self.stop is None:
            rest, self.stop = self._stops.feed(self._detokeniser.flush())
            rest += self._stops.flush() if self.stop is None else ""
        return self._pipeline.feed(rest) + self._pipeline.flush()
