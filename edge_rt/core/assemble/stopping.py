"""Ends a text at a stop string.

The stop string whose occurrence is complete first ends the text; of several complete at the same character, the longest. The text is
cut where that occurrence begins: nothing from there on comes out, everything before does. Only text that may still turn out to be
the beginning of a stop string is held back. Each character costs the same, however many stop strings there are (Aho-Corasick).
"""

from __future__ import annotations

from collections.abc import Iterable

from edge_rt.core.assemble.aho_corasick import AhoCorasick
from edge_rt.errors import OptionError


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
