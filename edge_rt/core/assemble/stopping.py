"""Ends a text at a stop string.

The stop string whose occurrence is complete first ends the text; of several complete at the same character, the longest. The text is
cut where that occurrence begins: nothing from there on comes out, everything before does. Only text that may still turn out to be
the beginning of a stop string is held back. Each character costs the same, however many stop strings there are (Aho-Corasick).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from edge_rt.errors import OptionError


class StopMatcher:
    """One stream. After a stop string it gives out nothing more."""

    def __init__(self, stops: Iterable[str]) -> None:
        """Raises OptionError for an empty stop string, or anything that is no text."""
        if isinstance(stops, str):
            raise OptionError(f"stop is the text {stops!r}; give a list of texts")
        self._next: list[dict[str, int]] = [{}]  # state -> character -> state; a state is the longest beginning of a stop string just read
        self._depth = [0]  # its length
        self._stop: list[str | None] = [None]  # the longest stop string that ends here
        self._shorter = [0]  # the next shorter such beginning
        for stop in stops:
            self._add(stop)
        self._link()
        self._state, self._held = 0, ""
        self.stopped: str | None = None

    def _add(self, stop: str) -> None:
        if not isinstance(stop, str) or not stop:
            raise OptionError(f"stop string {stop!r} is no text or empty; leave it out")
        state = 0
        for c in stop:
            if c not in self._next[state]:
                self._next[state][c] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._stop.append(None)
                self._shorter.append(0)
            state = self._next[state][c]
        self._stop[state] = stop

    def _link(self) -> None:
        """Fill ``_shorter`` from the shallow states to the deep, and let states end the stop strings their shorter ones end."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            if self._stop[state] is None:
                self._stop[state] = self._stop[self._shorter[state]]
            for c, deeper in self._next[state].items():
                self._shorter[deeper] = self._step(self._shorter[state], c)
                queue.append(deeper)

    def _step(self, state: int, c: str) -> int:
        while c not in self._next[state]:
            if not state:
                return 0
            state = self._shorter[state]
        return self._next[state][c]

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take text; returns the text that is certain to come before any stop string, and the stop string if one is complete."""
        if self.stopped is not None:
            return "", self.stopped
        if not self._next[0]:
            return text, None
        state = self._state
        for i, c in enumerate(text):
            state = self._step(state, c)
            stop = self._stop[state]
            if stop is not None:
                self.stopped = stop
                whole = self._held + text[: i + 1]
                self._held = ""
                return whole[: len(whole) - len(stop)], stop
        whole = self._held + text
        certain = len(whole) - self._depth[state]
        self._state, self._held = state, whole[certain:]
        return whole[:certain], None

    def flush(self) -> str:
        """The stream ended without a stop string: the text held back."""
        held, self._held, self._state = self._held, "", 0
        return held
