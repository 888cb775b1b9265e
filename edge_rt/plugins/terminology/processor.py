"""The post-processor ``terminology``: writes terms as a glossary wants them. Its rules, ``[terminology]``:

- ``terms``: a table of variants and preferred forms, ``"PV" = "photovoltaic (PV)"`` or ``"PV" = { to = ..., case = ..., first = ... }``.
- ``glossary``: tables ``[[terminology.glossary]]``, each with a ``domain`` and a ``file``, CSV or TSV in UTF-8, a term a line:
  ``variant,preferred form,flags``. Flags, which may be left out, are a case and ``first``. Lines that begin with ``#`` are comments.
- ``domains``: those whose glossaries are used; all if it is not there.
- ``case``: ``exact``: a variant is found as it is written. ``ignore``: in any case. ``follow``: in any case, and a preferred form in lower
  case is written in that of the text. ``smart`` (the default): exact for a variant with capitals, else follow.
- ``first_only``: a term is replaced only where it is first used, and later left as it is. (``first`` of a single term.) Default false.
- ``in_code``, ``in_addresses``: terms are also replaced in code, in addresses of the web and of mail. Default false.

Of all terms in a text the leftmost is replaced, of those that begin together the longest. One that begins or ends with a letter or digit
of a script with spaces is no part of a longer word: the ``AI`` in ``MAIN`` and in ``AIs`` is not meant, that in ``AI's`` and ``用AI写`` is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_rt.hooks import PostProcessor, Rules
from edge_rt.plugins.terminology.glossary import MAX_TERM, Glossary, read, written
from edge_rt.plugins.terminology.prose import MAX_LOOK, Prose, may_be_address
from edge_rt.plugins.terminology.words import begins, continues, fold, in_word, joins, unbound

MAX_HELD = MAX_TERM + MAX_LOOK
"""Characters that may be held back: a term, and what follows it while that may make an address of it. A glossary's own longest term and
a character are the rule."""


def compile_rules(rules: Rules) -> Callable[[], PostProcessor]:
    """What makes a post-processor for one stream. Raises RuleError."""
    in_code, in_addresses = rules.flag("in_code", False), rules.flag("in_addresses", False)
    glossary = Glossary(read(rules))
    return lambda: Terminology(glossary, in_code=in_code, in_addresses=in_addresses)


class Terminology:
    """One stream."""

    def __init__(self, glossary: Glossary, *, in_code: bool, in_addresses: bool) -> None:
        self._glossary, self._automaton = glossary, glossary.automaton
        self._prose = Prose(in_code=in_code, in_addresses=in_addresses)
        self._look = not in_addresses
        self._state = 0
        self._text = ""  # what is held, after two characters more
        self._start = 0  # of what is held
        self._found: dict[int, list[int]] = {}  # where terms begin and, shorter ones first, end; not sorted
        self._used: set[str] = set()  # preferred forms, folded, of terms to be replaced once
        self._counts: dict[str, int] = {}

    @property
    def held(self) -> str:
        """Text that may be part of a term."""
        return self._text[self._start :]

    @property
    def counts(self) -> Mapping[str, int]:
        """Replacements, of each domain if there are several."""
        return self._counts

    def feed(self, text: str) -> str:
        """Take more text and return what can no longer change."""
        at, state = len(self._text), self._state
        self._text += text
        for piece, prose in self._prose.feed(text):
            if prose:
                state, ends = self._automaton.scan(fold(piece), state)
                if ends:
                    self._note(at, ends)
            else:
                state = 0
            at += len(piece)
        self._state = self._pruned(state, self._start)
        return self._settle(None, None)

    def flush(self) -> str:
        """The text is complete: the rest."""
        self._state = 0
        return self._settle("", True)

    def cut(self, following: str) -> str:
        """The text was cut off: the rest. A word at its very end may have gone on, so it is left alone."""
        self._state = 0
        return self._settle(following, False)

    def _note(self, at: int, ends: list[tuple[int, int]]) -> None:
        """Patterns end in a piece that begins at a place."""
        for i, state in ends:
            end = at + i + 1
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
            self._counts[kind] = self._counts.get(kind, 0) + 1
        return result
