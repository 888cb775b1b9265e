"""Tells code from prose in Markdown as it streams, for post-processors that leave code alone."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"`+|\n|[^`\n]+")
_INDENT = 3
"""Spaces before a fence, at most (CommonMark 4.5)."""


class CodeSpans:
    """One stream. Nothing is held back: a character's kind depends on those before it alone, and backticks are always code.

    Fenced code begins and ends with a line that starts with three backticks or more, at least as many at its end. Code in a line is
    between runs of as many backticks, or ends with the line. (Of CommonMark, fences of tildes and code indented by four are prose here.)
    """

    def __init__(self) -> None:
        self._fence = 0  # backticks that began the fenced code we are in
        self._inline = 0  # backticks that began the code in a line that we are in
        self._run = 0  # backticks just before
        self._indent = 0  # spaces since the line began; more than _INDENT: something else was there

    def feed(self, text: str) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is code."""
        pieces = []
        for token in _TOKEN.findall(text):
            if token[0] == "`":
                self._run += len(token)
                pieces.append((token, True))
                continue
            self._end_run()
            if token == "\n":
                self._inline = self._indent = 0
            else:
                blank = self._indent <= _INDENT and not token.strip(" ")
                self._indent = min(self._indent + len(token), _INDENT + 1) if blank else _INDENT + 1
            pieces.append((token, bool(self._fence or self._inline)))
        return pieces

    def _end_run(self) -> None:
        """The backticks just before are all: they begin or end code, or are in it."""
        run, self._run = self._run, 0
        if not run:
            return
        fence = self._indent <= _INDENT and run >= 3
        self._indent = _INDENT + 1
        if self._fence:
            self._fence = 0 if fence and run >= self._fence else self._fence
        elif fence:
            self._fence = run
        elif run == self._inline:
            self._inline = 0
        elif not self._inline:
            self._inline = run
