"""Searching text that streams: many words at once, code apart from prose, full-width forms."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping

# Finds many texts in one that streams, at a cost that does not grow with their number (Aho and Corasick, 1975).
#
# States are numbered breadth first, so those that follow one are neighbours: the characters that lead to them are a slice of one text,
# in which ``str.find`` searches. A state takes 16 bytes and its character.

# Why no library: for 5,000 terms pyahocorasick takes 1.4 MB and 0.4 microseconds for four characters, this 0.8 MB and 1.3; but neither it
# nor ahocorasick-rs tells how much of the text's end may yet become a pattern, so the longest pattern's length would always be held back.


class AhoCorasick:
    """The automaton of some patterns. Nothing of it changes, so streams on any thread may share it; a stream keeps its state, an int.

    A state stands for the longest beginning of a pattern that the text read so far ends with; 0 is none, where a stream begins.
    """

    __slots__ = ("_characters", "_first", "_longest", "_next", "_root", "depth", "lengths", "shorter")

    def __init__(self, patterns: Iterable[str]) -> None:
        """A pattern's index is its place in ``patterns``; equal ones have that of the first. Raises ValueError for an empty one."""
        given = list(patterns)
        if "" in given:
            raise ValueError("a pattern is empty")
        self.lengths = array("i", map(len, given))
        """Characters of each pattern."""
        self.depth = array("i", [0])
        """State -> characters of the beginning it stands for: what may yet turn out to be part of a pattern."""
        self._first = array("i")  # state -> the first that follows it; those of the next state begin where its own end
        self._longest = array("i")  # state -> the longest pattern that ends there, or -1
        self._characters = self._plant(given)  # state -> the character that leads to it
        self._root = {c: state for state, c in enumerate(self._characters[1 : self._first[1]], 1)}
        self.shorter = array("i", [0]) * len(self.depth)
        """State -> that of the next shorter beginning."""
        self._next = array("i", [-1]) * len(given)  # pattern -> the longest other one that ends it, or -1
        self._link()

    def __len__(self) -> int:
        """The number of states."""
        return len(self.depth)

    def _plant(self, given: list[str]) -> str:
        """Number the states of all beginnings, shallow before deep."""
        index: dict[str, int] = {}
        for i, pattern in enumerate(given):
            index.setdefault(pattern, i)
        ordered = sorted(index)  # so patterns with a common beginning are a range
        characters, depth = ["\0"], 0
        level = [(0, len(ordered))]
        while level:
            deeper = []
            for low, high in level:
                self._first.append(len(characters))
                complete = low < high and len(ordered[low]) == depth
                self._longest.append(index[ordered[low]] if complete else -1)
                low += complete
                while low < high:
                    start, c = low, ordered[low][depth]
                    while low < high and ordered[low][depth] == c:
                        low += 1
                    characters.append(c)
                    deeper.append((start, low))
            depth += 1
            self.depth.extend([depth] * len(deeper))
            level = deeper
        self._first.append(len(characters))
        return "".join(characters)

    def _link(self) -> None:
        """Find each state's next shorter one, shallow before deep, and what ends there because it ends at that."""
        first, longest = self._first, self._longest
        for state in range(1, len(self)):
            for child in range(first[state], first[state + 1]):
                self.shorter[child] = self.step(self.shorter[state], self._characters[child])
        for state in range(1, len(self)):
            own, other = longest[state], longest[self.shorter[state]]
            if own < 0:
                longest[state] = other
            else:
                self._next[own] = other

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state:
            found = self._characters.find(character, self._first[state], self._first[state + 1])
            if found >= 0:
                return found
            state = self.shorter[state]
        return self._root.get(character, 0)

    def goes_on(self, state: int) -> bool:
        """Whether there are patterns longer than what the state stands for. If not, ``shorter`` is as good a state."""
        return self._first[state] < self._first[state + 1]

    def scan(self, text: str, state: int = 0) -> tuple[int, list[tuple[int, int]]]:
        """The state after a text, and where in it patterns end: the index of each last character and the state there."""
        find, root, first, shorter, longest = self._characters.find, self._root, self._first, self.shorter, self._longest
        ends = []
        for i, c in enumerate(text):
            while state:  # this is ``step``, whose call would take most of the time
                found = find(c, first[state], first[state + 1])
                if found >= 0:
                    state = found
                    break
                state = shorter[state]
            else:
                state = root.get(c, 0)
            if longest[state] >= 0:
                ends.append((i, state))
        return state, ends

    def ending(self, state: int) -> Iterator[int]:
        """The patterns that end at a state, the longest first."""
        pattern = self._longest[state]
        while pattern >= 0:
            yield pattern
            pattern = self._next[pattern]


# Tells code from prose in Markdown as it streams, for post-processors that leave code alone.

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


# Full-width forms of ASCII, as Chinese and Japanese input methods write them.

HALF_WIDTH: Mapping[int, int] = {**{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}, 0x3000: 0x20}
"""Full-width character -> ASCII, the ideographic space included; for ``str.translate``."""
