"""The post-processor ``terminology``: replaces terms as they stream. docs/post/terminology.md explains the rules.

The leftmost term is replaced, and of those that begin at the same place the longest. A term that begins or ends with a letter or digit of
a script with spaces does not match inside a longer word: ``AI`` matches in ``AI's`` and ``用AI写``, not in ``MAIN`` or ``AIs``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from edge_rt.hooks import CodeSpans, PostProcessor, Rules
from edge_rt_text.glossary import MAX_TERM, Glossary, begins, continues, fold, in_word, joins, read, unbound, written

_MARK = re.compile(r"[a-z0-9]://|(?<![a-z0-9_.-])www\.|[a-z0-9._%+-]@", re.IGNORECASE | re.ASCII)
"""From here on it is an address. Four characters at most, the one before ``www`` included."""
_END = re.compile(r"[^a-z0-9._~:/?#\[\]@!$&'()*+,;=%-]", re.IGNORECASE | re.ASCII)
"""What is in no address (RFC 3986)."""
_LONGEST_LOCAL = 64  # characters before the @ (RFC 5321)
_LOCAL = re.compile(rf"[a-z0-9._%+-]{{0,{_LONGEST_LOCAL}}}", re.IGNORECASE | re.ASCII)
MAX_LOOK = _LONGEST_LOCAL + len("://")
"""Most characters after a term that are needed to see whether it is the beginning of an address."""
MAX_HELD = MAX_TERM + MAX_LOOK
"""Most characters held back: a term and what follows it. Usually it is the glossary's longest term and one character."""


class Prose:
    """Tells prose from code and addresses in one stream.

    Nothing is held back, so the beginning of an address, up to its ``://`` or ``@``, counts as prose.
    """

    def __init__(self, *, in_code: bool, in_addresses: bool) -> None:
        """``in_code``, ``in_addresses``: whether these are prose too."""
        self._code = None if in_code else CodeSpans()
        self._find_addresses = not in_addresses
        self._in_address = False
        self._before = ""  # prose just before, in which a mark may begin

    def feed(self, text: str) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is prose."""
        pieces = [(text, False)] if self._code is None else self._code.feed(text)
        if not self._find_addresses:
            return [(piece, not code) for piece, code in pieces]
        found = []
        for piece, code in pieces:
            if code:
                self._in_address, self._before = False, ""
                found.append((piece, False))
            elif self._in_address or "@" in piece or "/" in piece or "." in piece:
                found += self._divide(piece)
            else:
                self._before = (self._before + piece[-4:])[-4:]
                found.append((piece, True))
        return found

    def _divide(self, piece: str) -> list[tuple[str, bool]]:
        whole, at, start = self._before + piece, len(self._before), 0  # start: of the prose
        found = []
        while at < len(whole):
            if self._in_address:
                match = _END.search(whole, at)
                end = start = match.start() if match else len(whole)
            else:
                match = _MARK.search(whole, max(start, at - 3))  # one that ends after at
                end = match.end() if match else len(whole)
            if end > at:
                found.append((whole[at:end], not self._in_address))
            at = end
            if match:
                self._in_address = not self._in_address
        self._before = "" if self._in_address else whole[start:][-4:]
        return found


def may_be_address(text: str, at: int) -> bool | None:
    """Whether the word that goes on at a place turns out to be the beginning of an address; None: the text does not say yet."""
    found = _LOCAL.match(text, at)
    end = found.end() if found else at
    if end - at == _LONGEST_LOCAL:
        return False
    rest = text[end : end + 3]
    if rest[:1] == "@" or rest == "://":
        return True
    return None if "://".startswith(rest) else False


def compile_rules(rules: Rules) -> Callable[[], PostProcessor]:
    """Return a function that makes the post-processor of one stream. Raises RuleError."""
    in_code, in_addresses = rules.flag("in_code", False), rules.flag("in_addresses", False)
    glossary = Glossary(read(rules))
    return lambda: Terminology(glossary, in_code=in_code, in_addresses=in_addresses)


class Terminology:
    """The post-processor of one stream."""

    def __init__(self, glossary: Glossary, *, in_code: bool, in_addresses: bool) -> None:
        self._glossary, self._automaton = glossary, glossary.automaton
        self._prose = Prose(in_code=in_code, in_addresses=in_addresses)
        self._look = not in_addresses
        self._state = 0
        self._text = ""  # what is held, after two characters more
        self._start = 0  # of what is held
        self._found: dict[int, list[int]] = {}  # where terms begin and, shorter ones first, end; not sorted
        self._used: set[str] = set()  # preferred forms, folded, of terms to be replaced once
        self.counts: dict[str, int] = {}  # replacements, by domain if there are several

    @property
    def held(self) -> str:
        """Text that may be part of a term."""
        return self._text[self._start :]

    def feed(self, text: str) -> str:
        """Take more text and return what can no longer change."""
        at, state = len(self._text), self._state
        self._text += text
        for piece, prose in self._prose.feed(text):
            if prose:
                state, ends = self._automaton.scan(fold(piece), state)
                for i, ending in ends:
                    self._note(at + i + 1, ending)
            else:
                state = 0
            at += len(piece)
        self._state = self._pruned(state, self._start)
        return self._settle(None, None)

    def flush(self) -> str:
        """The text is complete: return the rest."""
        self._state = 0
        return self._settle("", True)

    def cut(self, following: str) -> str:
        """The text was cut off: return the rest. A word at its very end may have gone on, so it is left alone."""
        self._state = 0
        return self._settle(following, False)

    def _note(self, end: int, state: int) -> None:
        """Keep the terms that end at a place, where the automaton is in a state."""
        for pattern in self._automaton.ending(state):
            start = end - self._automaton.lengths[pattern]
            if start >= self._start and begins(self._text, start):
                self._found.setdefault(start, []).append(end)

    def _pruned(self, state: int, start: int) -> int:
        """The state without what began before a place or where no term may begin, or is a whole term that no other begins with."""
        automaton, text = self._automaton, self._text
        while state:
            at = len(text) - automaton.depth[state]
            if at >= start and automaton.goes_on(state) and begins(text, at):
                break
            state = automaton.shorter[state]
        return state

    def _settle(self, following: str | None, ends: bool | None) -> str:
        """Return all that begins before what the state stands for: no longer term can begin there.

        ``following``: what is known to come, None if more text will be fed. ``ends``: whether a word ends where nothing more is known.
        """
        text, done = self._text, self._start
        limit = len(text) - self._automaton.depth[self._state]
        result = ""
        if self._found:
            result, done, limit = self._replace(limit, following or "", ends)
        self._start = min(limit, 2)  # of what is behind, begins needs that much
        self._text = text[limit - self._start :]
        return result + text[done:limit]

    def _replace(self, limit: int, following: str, ends: bool | None) -> tuple[str, int, int]:
        """Replace the terms that begin before a limit. Returns the result, the place in the text up to which it goes, and the new limit."""
        text, done, out = self._text, self._start, []
        known = text + following
        for start in sorted(self._found):
            if start >= limit:
                break
            if start < done:
                continue
            end = self._longest(start, known, ends)
            if end is None:
                limit = start
                break
            if end:
                out += [text[done:start], self._replaced(text[start:end])]
                done = end
                self._state = self._pruned(self._state, done)
                limit = len(text) - self._automaton.depth[self._state]
        dropped = limit - min(limit, 2)
        self._found = {start - dropped: [end - dropped for end in self._found[start]] for start in self._found if start >= limit}
        return "".join(out), done, limit

    def _longest(self, start: int, text: str, ends: bool | None) -> int | None:
        """The end of the longest term that begins at a place, 0 if there is none, None if the text does not say yet."""
        for end in reversed(self._found[start]):
            candidate = text[start:end]
            if self._glossary.term(candidate) is None and not self._glossary.preferred(candidate):
                continue
            here = self._ends(text, end, ends)
            if here is not False:
                return end if here else None
        return 0

    def _ends(self, text: str, end: int, ends: bool | None) -> bool | None:
        """Whether a term may end at a place, by what follows it; None if the text does not say yet. ``ends``: what its own end says."""
        last = text[end - 1]
        if unbound(last):
            return True
        if end == len(text):
            return ends
        c = text[end]
        if continues(c):
            return False
        if not in_word(last):
            return True
        if in_word(c):
            return False
        further = None if ends is None else True  # the word is over; that it is no address after all is likely
        if c in ".,":
            if end + 1 == len(text):
                return further
            if joins(last, c, text[end + 1]):
                return False
        if self._look and last.isascii():
            address = may_be_address(text, end)
            return further if address is None else not address
        return True

    def _replaced(self, text: str) -> str:
        """What is written for a term of the text."""
        term = self._glossary.term(text)
        if term is None:  # a preferred form
            self._used.add(fold(text))
            return text
        if term.first:
            preferred = fold(term.preferred)
            if preferred in self._used:
                return text
            self._used.add(preferred)
        result = written(term, text)
        if result != text:
            kind = term.domain if len(self._glossary.domains) > 1 else "replacements"
            self.counts[kind] = self.counts.get(kind, 0) + 1
        return result
