"""Regular expressions of Python's ``re`` as nodes of the automaton. Raises Refused for what an automaton cannot follow exactly."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from edge_rt.plugins.redaction.automaton import Charset, Graph, Look
from edge_rt.plugins.redaction.characters import SKIP, folded, plain

if sys.version_info >= (3, 11):
    from re import _constants as sre
    from re import _parser as sre_parser
else:
    import sre_constants as sre
    import sre_parse as sre_parser

MAX_NODES = 5000
"""Nodes of one pattern: what a step may cost at most."""
SECRET, RUN = "secret", "run"
"""Groups: what a concealed part begins with, and (of built-in patterns) a repeat that it may begin with anywhere."""

_REFUSED = {
    sre.GROUPREF: "a reference to a group cannot be followed as text streams; write the alternatives out",
    sre.GROUPREF_EXISTS: "a condition on a group cannot be followed as text streams; write the alternatives out",
    sre.MIN_REPEAT: "a lazy repeat means nothing here, the longest match counts; write [^x]* instead of .*?",
    sre.AT: "of anchors there are only \\b and \\B, a stream has no lines; use (?<![^\\n]) for the beginning of one",
}
for _name in ("POSSESSIVE_REPEAT", "ATOMIC_GROUP"):
    if hasattr(sre, _name):
        _REFUSED[getattr(sre, _name)] = "nothing is tried twice here; write an ordinary repeat or group"

_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
}
_NOT_CATEGORIES = {
    sre.CATEGORY_NOT_DIGIT: sre.CATEGORY_DIGIT,
    sre.CATEGORY_NOT_SPACE: sre.CATEGORY_SPACE,
    sre.CATEGORY_NOT_WORD: sre.CATEGORY_WORD,
}
_WORD = [(sre.IN, [(sre.CATEGORY, sre.CATEGORY_WORD)])]


class Refused(Exception):
    """A pattern that cannot be followed; says why and what to do."""


def add_pattern(graph: Graph, regex: str, most: int | None, *, flags: int = 0) -> int:
    """Add a pattern to the graph and return the most characters its secret can have. ``most``: how often an unbounded repeat repeats;
    None: without end, then the returned number means nothing.

    Raises Refused.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = sre_parser.parse(regex, flags)
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise Refused(f"it is not a regular expression ({error}); see Python's module re") from error
    if tree.getwidth()[0] == 0:
        raise Refused("it matches the empty text; let it ask for at least one character")
    builder = _Builder(graph, most, tree.state.groupdict.get(RUN) if most is None else None)
    end = graph.add("accept")
    if SECRET not in tree.state.groupdict:
        graph.starts.append(graph.add("mark", [builder.sequence(tree, end, tree.state.flags)]))
        return _width(tree, most or 1)
    secret = tree.state.groupdict[SECRET]
    items: list[Any] = list(tree)  # type: ignore[call-overload]
    at = next((i for i, (op, arg) in enumerate(items) if op is sre.SUBPATTERN and arg[0] == secret), None)
    if at is None:
        raise Refused("the group secret is inside of something; let it stand alone")
    if items[at][1][3].getwidth()[0] == 0:
        raise Refused("the group secret may be empty; let it ask for at least one character")
    mark = graph.add("mark", [builder.sequence(items[at:], end, tree.state.flags)])
    graph.starts.append(builder.sequence(items[:at], mark, tree.state.flags))
    return _width(items[at:], most or 1)


def _width(items: Any, most: int) -> int:
    """Characters that a match can have, at most."""
    total = 0
    for op, arg in items:
        if op in (sre.LITERAL, sre.NOT_LITERAL, sre.IN, sre.ANY):
            total += 1
        elif op is sre.BRANCH:
            total += max(_width(one, most) for one in arg[1])
        elif op is sre.SUBPATTERN:
            total += _width(arg[3], most)
        elif op is sre.MAX_REPEAT:
            total += (max(most, arg[0]) if arg[1] is sre.MAXREPEAT else int(arg[1])) * _width(arg[2], most)
    return total


def add_words(graph: Graph, words: Iterable[str], gaps: Mapping[str, str], before: str, after: str) -> None:
    """Add a list of words without case, as a trie. ``gaps``: what some characters of words stand for, as patterns.

    ``before`` and ``after``: patterns, of no width, of what must be around a word.
    """
    builder = _Builder(graph, None)
    end = builder.small(sre_parser.parse(after), graph.add("accept"))
    fillers = {char: partial(builder.small, sre_parser.parse(gap)) for char, gap in gaps.items()}
    root = _trie(graph, {tuple(word): end for word in words}, fillers)
    graph.starts.append(graph.add("mark", [builder.small(sre_parser.parse(before), root)]))


def _trie(graph: Graph, words: dict[tuple[str, ...], int], gaps: Mapping[str, Callable[[int], int]]) -> int:
    """Words and the nodes that follow them as one node."""
    entry = graph.add("trie")
    at: dict[tuple[str, ...], int] = {(): entry}
    for word, end in words.items():
        for length, char in enumerate(word, 1):
            if word[:length] in at:
                continue
            parent, node = at[word[: length - 1]], graph.add("trie")
            if char in gaps:
                graph.out[parent] = [*graph.out[parent], gaps[char](node)]
            else:
                low = folded(plain(char))
                graph.folded.add(low)
                graph.trie.setdefault(parent, {})[low] = node
            at[word[:length]] = node
        graph.out[at[word]] = [*graph.out[at[word]], end]
    return entry


class _Builder:
    """Adds a pattern from its end to its beginning: each part is given the node that follows it and returns its own first."""

    def __init__(self, graph: Graph, most: int | None, run: int | None = None) -> None:
        self._graph, self._most, self._run = graph, most, run
        self._least = len(graph.kind)

    def small(self, tree: Any, follow: int) -> int:
        """The first node of a small pattern, one of many."""
        self._least = len(self._graph.kind)
        return self.sequence(tree, follow, 0)

    def sequence(self, items: Any, follow: int, flags: int) -> int:
        """The first node of items one after the other."""
        for op, arg in reversed(list(items)):
            follow = self._item(op, arg, follow, flags)
        return follow

    def _item(self, op: Any, arg: Any, follow: int, flags: int) -> int:
        graph = self._graph
        if len(graph.kind) - self._least > MAX_NODES:
            raise Refused(f"it is too large (over {MAX_NODES} parts once its repeats are written out); use smaller counts or max_length")
        if op is sre.LITERAL:
            return self._literal(chr(arg), follow, flags)
        if op in (sre.NOT_LITERAL, sre.IN, sre.ANY):
            return graph.add("set", [follow], number=self._set(op, arg, flags))
        if op is sre.BRANCH:
            return self._branch(arg[1], follow, flags)
        if op is sre.SUBPATTERN:
            group, added, removed, inner = arg
            first = self.sequence(inner, follow, (flags | added) & ~removed)
            if group is not None and group == self._run:
                graph.runs.add(first)
            return first
        if op is sre.MAX_REPEAT:
            return self._repeat(arg, follow, flags)
        if op in (sre.ASSERT, sre.ASSERT_NOT):
            return self._look(arg, op is sre.ASSERT_NOT, follow, flags)
        if op is sre.AT and arg in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
            sides = [(False, True), (True, False)] if arg is sre.AT_BOUNDARY else [(False, False), (True, True)]
            return graph.add("fork", [self._edge(behind, ahead, follow) for behind, ahead in sides])
        raise Refused(_REFUSED.get(op, f"{str(op).lower()} is not understood here; write it otherwise"))

    def _literal(self, char: str, follow: int, flags: int) -> int:
        seen = plain(char)
        if seen == SKIP:
            raise Refused(f"U+{ord(char):04X} is among the characters that are passed over in the text; leave it out")
        if flags & re.IGNORECASE:
            self._graph.folded.add(folded(seen))
            return self._graph.add("folded", [follow], literal=folded(seen))
        self._graph.exact.add(seen)
        return self._graph.add("exact", [follow], literal=seen)

    def _branch(self, ways: Any, follow: int, flags: int) -> int:
        if self._most is None and len(ways) > 8 and all(one and all(op is sre.LITERAL for op, _ in one) for one in ways):
            # One of ours: a list of words, quicker as a trie, and in any case.
            return _trie(self._graph, {tuple(chr(code) for _, code in one): follow for one in ways}, {})
        return self._graph.add("fork", [self.sequence(one, follow, flags) for one in ways])

    def _repeat(self, arg: Any, follow: int, flags: int) -> int:
        least, most, inner = arg
        if most is sre.MAXREPEAT and self._most is None:
            fork = self._graph.add("fork", [follow])
            self._graph.out[fork] = [self.sequence(inner, fork, flags), follow]
            self._graph.ends.discard(fork)
            follow, most = fork, least
        elif most is sre.MAXREPEAT:
            most = max(self._most, least)
        if most - least > MAX_NODES:
            raise Refused(f"it repeats up to {most} times; use a smaller count")
        last = follow
        for _ in range(int(most) - int(least)):
            follow = self._graph.add("fork", [self.sequence(inner, follow, flags), last])
        for _ in range(int(least)):
            follow = self.sequence(inner, follow, flags)
        return follow

    def _edge(self, behind: bool, ahead: bool, follow: int) -> int:
        """One of the two sides of a boundary: is there a letter behind, is there one ahead."""
        return self._look((-1, _WORD), not behind, self._look((1, _WORD), not ahead, follow, 0), 0)

    def _look(self, arg: Any, negated: bool, follow: int, flags: int) -> int:
        direction, inner = arg
        if len(inner) != 1 or inner[0][0] not in (sre.LITERAL, sre.NOT_LITERAL, sre.IN, sre.ANY):
            raise Refused("a look ahead or behind can be at one character only, as in (?<![0-9]); write a smaller one")
        self._graph.looks.append(Look(self._set(inner[0][0], inner[0][1], flags), direction > 0, negated))
        return self._graph.add("look", [follow], number=len(self._graph.looks) - 1)

    def _set(self, op: Any, arg: Any, flags: int) -> int:
        """The number of a set of characters."""
        if op is sre.ANY:
            items, negated = [] if flags & re.DOTALL else [(sre.LITERAL, 10)], True
        elif op is sre.IN:
            items, negated = [item for item in arg if item[0] is not sre.NEGATE], arg[0][0] is sre.NEGATE
        else:
            items, negated = [(sre.LITERAL, arg)], op is sre.NOT_LITERAL
        ignore = bool(flags & re.IGNORECASE)
        return self._graph.charset((tuple(items), negated, ignore), Charset(_test(items, ignore), negated, _last(items)))


def _last(items: Iterable[tuple[Any, Any]]) -> int:
    """The highest code of the characters listed."""
    codes = [sys.maxunicode if op is sre.CATEGORY else arg[1] if op is sre.RANGE else arg for op, arg in items]
    return max(codes, default=0)


def _test(items: Iterable[tuple[Any, Any]], ignore_case: bool) -> Callable[[str], bool]:
    """Whether a character is one of those listed."""
    single = {chr(arg) for op, arg in items if op is sre.LITERAL}
    single |= {plain(char) for char in single} - {SKIP}
    ranges = [arg for op, arg in items if op is sre.RANGE]
    kinds = [_CATEGORIES[arg] for op, arg in items if op is sre.CATEGORY and arg in _CATEGORIES]
    others = [_CATEGORIES[_NOT_CATEGORIES[arg]] for op, arg in items if op is sre.CATEGORY and arg in _NOT_CATEGORIES]

    def has(char: str) -> bool:
        if char in single:
            return True
        code = ord(char)
        for low, high in ranges:  # a loop, as it is asked of every character for every set
            if low <= code <= high:
                return True
        return bool(kinds or others) and (any(kind(char) for kind in kinds) or not all(kind(char) for kind in others))

    if not ignore_case:
        return has
    return lambda char: has(char) or any(len(other) == 1 and has(other) for other in (char.lower(), char.upper()))
