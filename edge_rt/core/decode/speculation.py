"""Drafts from the text itself: what followed the last few tokens the last time they occurred (prompt look-up, Saxena 2023).

It costs a few dictionary look-ups a token and pays wherever the output repeats the input: extraction, code, tables, quotes.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
"""Tokens matched: the longest context that occurred before wins."""
_FIRST = 4
_PAUSE = 16
"""Tokens without drafts after several drafts in a row were wrong."""


class NgramDrafter:
    """One stream's index. It drafts more while drafts come true and pauses while they do not, so plain text is not slowed down."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST + 1)]
        self._expected: list[int] = []
        self._hits = 0
        self._limit = _FIRST
        self._pause = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """These tokens are certain now, in this order."""
        for token in tokens:
            self._judge(token)
            at = len(self._tokens)
            for n in range(SHORTEST, min(LONGEST, at) + 1):
                self._after[n][tuple(self._tokens[at - n :])] = at
            self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may follow; empty where nothing is known or drafting does not pay."""
        self._settle()
        if self._pause > 0:
            self._pause -= 1
            return []
        at = self._look_up()
        if at is None:
            return []
        period = len(self._tokens) - at  # a match that runs up to the end repeats from there
        self._expected = [self._tokens[at + i % period] for i in range(min(most, self._limit))]
        self._hits = 0
        return list(self._expected)

    def _look_up(self) -> int | None:
        """Where the text went on after the longest earlier occurrence of its end."""
        for n in range(min(LONGEST, len(self._tokens)), SHORTEST - 1, -1):
            at = self._after[n].get(tuple(self._tokens[-n:]))
            if at is not None:
                return at
        return None

    def _judge(self, token: int) -> None:
        """Compare a token with what was drafted for its place."""
        if self._hits < len(self._expected):
            if self._expected[self._hits] == token:
                self._hits += 1
            else:
                self._finish()

    def _settle(self) -> None:
        if self._expected:
            self._finish()

    def _finish(self) -> None:
        """Adjust the length of drafts: double what came true entirely, shorten what did not, pause after total failures."""
        drafted, hits = len(self._expected), self._hits
        self._expected, self._hits = [], 0
        if hits == drafted:
            self._limit = min(2 * self._limit, 64)
        elif hits:
            self._limit = max(_FIRST, hits + 1)
        elif self._limit > 1:
            self._limit //= 2
        else:
            self._pause, self._limit = _PAUSE, 1
