"""Characters as the detectors see them: full-width forms are ordinary ones, dashes are dashes, invisible characters are passed over.

``plain`` maps one character to one, so that positions in what is seen are positions in the text."""

from __future__ import annotations

import re
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

SKIP = "\u200b"
"""What every character that is passed over is seen as."""

_MARKS = ("Cf", "Mn", "Me")
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"
_OTHER_DOTS = "•∙⋅‧・･●"
# Full-width forms, small forms, mathematical letters, and letters and digits in circles.
_FORMS = ((0xFF00, 0xFF5F), (0xFE50, 0xFE70), (0x1D400, 0x1D800), (0x2460, 0x2469), (0x24B6, 0x24EA))
_OTHER_DASHES = "\u2212\u02d7\u2043\u207b\u208b"


def plain(char: str) -> str:
    """One character as it is seen: SKIP for those that show nothing or only mark another (zero width, soft hyphen, accents, keycaps)."""
    code = ord(char)
    if code < 0xA0:
        return char
    category = unicodedata.category(char)
    if category in _MARKS or char in _BLANK_LETTERS:
        return SKIP
    if category == "Zs":
        return " "
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category == "Pd" or char in _OTHER_DASHES:
        return "-"
    if char in _OTHER_DOTS:
        return "·"
    if any(low <= code < high for low, high in _FORMS):
        wide = unicodedata.normalize("NFKC", char)
        return wide if len(wide) == 1 else char
    return char


def folded(char: str) -> str:
    """A plain character without case and accent."""
    if char.isascii():
        return char.lower()
    low = unicodedata.normalize("NFD", char)[0].lower()
    return low if len(low) == 1 else char


class _Table(dict[int, str]):
    """For ``str.translate``; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        if len(self) > 20_000:  # a text of all of Unicode must not fill the memory
            self.clear()
        self[code] = seen = plain(chr(code))
        return seen


_PLAIN = _Table()
_LETTERS_AND_DIGITS = str.maketrans("", "", " \t\r\n-·()" + SKIP)


def view(text: str) -> str:
    """A text as the detectors see it, of the same length."""
    return text if text.isascii() else text.translate(_PLAIN)


def significant(text: str) -> str:
    """What is left of a text without what may separate the parts of a secret."""
    return view(text).translate(_LETTERS_AND_DIGITS)


# Finds every match of many patterns in one pass over a stream, and knows exactly what may still become one.
#
# A lazily built deterministic automaton (Thompson's construction, subsets as in RE2), with two additions. A state tells matches apart by
# where they began: it is a row of sets of nodes, the set of the earliest beginning first, and a node that two beginnings reach is kept
# for the earlier, whose match covers the other's. So nothing is scanned twice, whatever the patterns and the text. And what a pattern
# wants to see before its secret is followed in a set of its own, ``ahead``, which holds nothing back.
#
# Assertions look at one character before or after, characters that are passed over aside.

MAX_STATES = 4000
"""States kept. Then they are forgotten and built again as they are needed: memory is bounded whatever is read."""
_FIRST_OF_NO_CASE, _LAST_OF_NO_CASE = 0x3040, 0xA000  # Chinese and Japanese
_FEW_MOVES = 2
MAX_JUMPS = 20_000
"""Jumps kept, in the same way."""


class Charset(NamedTuple):
    """A set of characters, or of all others. ``test`` is asked about a character as it is written and as it is seen. ``last``: no code
    of a character in it is higher.
    """

    test: Callable[[str], bool]
    negated: bool
    last: int


class Look(NamedTuple):
    """An assertion: the next character, or the one before, is in a set, or is not. The ends of the text are in none."""

    charset: int
    ahead: bool
    negated: bool


class Tested(NamedTuple):
    """What is asked of a character: which sets it is in, and whether it is one of those."""

    bits: int
    exact: set[str]
    folded: set[str]


class Graph:
    """Nodes of a non-deterministic automaton. ``owner``: which pattern a node belongs to.

    A node reads a character (``exact``; ``folded``: without case and accent), one of a ``set``, or a letter of a ``trie`` (folded; what is
    in ``out`` follows without one). Or it reads nothing: an assertion (``look``), the beginning of the secret (``mark``), the end of a
    match (``accept``), or just a ``fork`` to ``out``.
    """

    def __init__(self) -> None:
        self.charsets: list[Charset] = []
        self.exact: set[str] = set()
        self.folded: set[str] = set()
        self.kind: list[str] = []
        self.literal: list[str] = []
        self.number: list[int] = []  # of the set, or of the assertion
        self.out: list[Sequence[int]] = []
        self.trie: dict[int, dict[str, int]] = {}
        self.owner: list[int] = []
        self.looks: list[Look] = []
        self._known_sets: dict[object, int] = {}
        self.starts: list[int] = []
        self.ends: set[int] = set()
        """Nodes that read nothing and lead to the end of a match alone."""
        self.runs: set[int] = set()
        """Forks of repeats without end that a secret may begin with anywhere."""
        self.adding = 0  # the pattern that nodes are added for

    def add(self, kind: str, out: Sequence[int] = (), literal: str = "", number: int = -1) -> int:
        """A new node."""
        self.kind.append(kind)
        self.literal.append(literal)
        self.number.append(number)
        self.out.append(out)
        self.owner.append(self.adding)
        node = len(self.kind) - 1
        if kind == "accept" or (kind in ("look", "fork") and self.out[node] and self.ends.issuperset(self.out[node])):
            self.ends.add(node)
        return node

    def charset(self, key: object, charset: Charset) -> int:
        """The number of a set; equal keys share one."""
        if key not in self._known_sets:
            self._known_sets[key] = len(self.charsets)
            self.charsets.append(charset)
        return self._known_sets[key]

    def tested(self, nodes: Iterable[int]) -> Tested:
        """What nodes, and those that follow them without reading, ask of a character."""
        bits, exact, low = 0, set[str](), set[str]()
        stack, seen = list(nodes), set[int]()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            kind = self.kind[node]
            if kind == "set":
                bits |= 1 << self.number[node]
            elif kind == "exact":
                exact.add(self.literal[node])
            elif kind == "folded":
                low.add(self.literal[node])
            else:
                stack += self.out[node]
                low.update(self.trie.get(node, ()))
                look = self.looks[self.number[node]] if kind == "look" else None
                if look is not None and look.ahead:
                    bits |= 1 << look.charset
        return Tested(bits, exact, low)


class Class:
    """What of a character matters to the patterns: sets that it is in, and itself if they name it. Equal ones are one object, so
    characters of a class share their moves.
    """

    __slots__ = ("bits", "exact", "folded")

    def __init__(self, bits: int, exact: str, folded: str) -> None:
        self.bits, self.exact, self.folded = bits, exact, folded


class Move(NamedTuple):
    """What a character does. ``keep``: which beginnings live on, by their index in the row; the number of those there were stands for one
    at this character. ``matches``: (index of the beginning, pattern) that end before it.
    """

    state: State
    keep: tuple[int, ...]
    matches: tuple[tuple[int, int], ...]


Kernel = tuple[int, ...]


class State:
    """A row of sets of nodes, and moves from it as far as they are known: a state if nothing but it changes, else a Move.

    ``alike``: the same by what it asks of a character, as most classes make no difference to it.
    ``jumps``: what short texts of several characters do, if no match ends in them. That is one look-up for a token, which matters after
    a step of the model, when nothing is in the CPU's caches. ``tells``: is something that began surely a secret; None: not known yet.
    """

    __slots__ = ("ahead", "alike", "before", "jumps", "moves", "row", "tells", "tested")

    def __init__(self, ahead: Kernel, row: tuple[Kernel, ...], before: int) -> None:
        self.ahead, self.row, self.before = ahead, row, before
        self.moves: dict[Class, tuple[State, Move | None]] = {}
        self.alike: dict[object, tuple[State, Move | None]] = {}
        self.tested: Tested | None = None
        self.jumps: dict[str, Jump] = {}
        self.tells: bool | None = None


Jump = tuple[State, "tuple[int, ...] | None"]
"""The state after a text and which beginnings live on, by their index; -1, -2, ... are new ones at its first, second, ... character.
None: the same as before."""


class Automaton:
    """Shared by all streams: what it learns while it runs depends on the patterns alone."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._looked_back = 0  # sets that some assertion looks back at
        for look in graph.looks:
            if not look.ahead:
                self._looked_back |= 1 << look.charset
        self._classes: dict[tuple[int, str, str], Class] = {}
        self.of: dict[str, Class | None] = {}
        """The class of a character, None for one that is passed over; only of those met so far."""
        self._states: dict[tuple[Kernel, tuple[Kernel, ...], int], State] = {}
        self._begun: dict[tuple[int, Class | None], tuple[Kernel, Kernel]] = {}
        self._jumps = 0
        self._lock = threading.Lock()
        self.start = self._state((), (), 0)

    def classify(self, char: str) -> Class | None:
        """The class of a character, None for one that is passed over."""
        with self._lock:
            if len(self.of) > 30_000:
                self.of.clear()
            seen = plain(char)
            if seen == SKIP:
                self.of[char] = None
                return None
            graph = self._graph
            bits, code = 0, ord(char)
            code = code if _FIRST_OF_NO_CASE <= code < _LAST_OF_NO_CASE and seen == char else 0
            for number, (test, negated, last) in enumerate(graph.charsets):
                if (code <= last and (test(char) or (seen != char and test(seen)))) is not negated:
                    bits |= 1 << number
            low = folded(seen)
            key = (bits, seen if seen in graph.exact else "", low if low in graph.folded else "")
            if key not in self._classes:
                self._classes[key] = Class(*key)
            self.of[char] = found = self._classes[key]
            return found

    def empty(self, state: State) -> State:
        """The state after the same character if nothing had begun."""
        with self._lock:
            return self._state((), (), state.before)

    def owners(self, state: State, index: int) -> set[int]:
        """Patterns that a beginning may still become."""
        return {self._graph.owner[node] for node in state.row[index]}

    def may_slide(self, state: State, index: int) -> bool:
        """Is what began only a run so far, which may as well have begun later?"""
        return self._graph.runs.issuperset(state.row[index])

    def move(self, state: State, read: Class | None) -> tuple[State, Move | None]:
        """What a character does; None: the end of the text."""
        with self._lock:
            known = state.moves.get(read) if read is not None else None
            if known is not None:
                return known
            if len(self._states) > MAX_STATES:
                self._states = {((), (), 0): self.start}
                self.start.moves.clear()
                self.start.alike.clear()
                self.start.jumps.clear()
                self._jumps = 0
            if read is None:
                return self._result(state, None)
            if len(state.moves) < _FEW_MOVES:  # most states are seen once or twice
                result = self._result(state, read)
            else:
                key = self._asked(state, read)
                if key not in state.alike:
                    state.alike[key] = self._result(state, read)
                result = state.alike[key]
            state.moves[read] = result
            return result

    def _asked(self, state: State, read: Class) -> object:
        """What of a class matters in a state: classes of which it is equal have the same move."""
        if state.tested is None:
            state.tested = self._graph.tested([*state.ahead, *(node for kernel in state.row for node in kernel)])
        bits, exact, low = state.tested
        asked = (bits | self._looked_back) & read.bits
        return (asked, read.exact in exact and read.exact, read.folded in low and read.folded, self._begin(state.before, read))

    def _result(self, state: State, read: Class | None) -> tuple[State, Move | None]:
        step = self._step(state, read)
        same = step.keep == tuple(range(len(state.row))) and not step.matches
        return step.state, None if same else step

    def learn(self, state: State, text: str, jump: Jump) -> None:
        """Keep what a text does from a state."""
        with self._lock:
            self._jumps += 1
            if self._jumps > MAX_JUMPS:
                self._jumps = 1
                for one in self._states.values():
                    one.jumps.clear()
            state.jumps[text] = jump

    def _state(self, ahead: Kernel, row: tuple[Kernel, ...], before: int) -> State:
        key = (ahead, row, before)
        if key not in self._states:
            self._states[key] = State(*key)
        return self._states[key]

    def _step(self, state: State, read: Class | None) -> Move:
        fresh_ahead, fresh = self._begin(state.before, read)
        walk = _Walk(self._graph, state.before, read)
        ahead = walk.follow(state.ahead) if state.ahead else ()
        row, keep, matches = [], [], []
        for index, kernel in enumerate(state.row):
            walk.accepted = []
            reached = walk.follow(kernel)
            matches += [(index, pattern) for pattern in walk.accepted]
            if reached:
                row.append(reached)
                keep.append(index)
        new = {*walk.follow(tuple(walk.marked)), *(node for node in fresh if node not in walk.taken)}
        if new:
            row.append(tuple(sorted(new)))
            keep.append(len(state.row))
        ahead = tuple(sorted({*fresh_ahead, *ahead}))
        before = read.bits & self._looked_back if read is not None else 0
        return Move(self._state(ahead, tuple(row), before), tuple(keep), tuple(matches))

    def _begin(self, before: int, read: Class | None) -> tuple[Kernel, Kernel]:
        """What begins with a character, whatever was before it but for assertions: what is ahead of a secret, and secrets."""
        if (before, read) not in self._begun:
            walk = _Walk(self._graph, before, read)
            ahead = walk.follow(tuple(self._graph.starts))
            self._begun[before, read] = (ahead, walk.follow(tuple(walk.marked)))
        return self._begun[before, read]


class _Walk:
    """One step of all sets of a state. Sets are followed in order, and a node belongs to the first that reaches it; but a match that
    ends is told for every beginning, as the check may accept one and not the other.
    """

    def __init__(self, graph: Graph, before: int, read: Class | None) -> None:
        self.graph, self.before, self.read = graph, before, read
        self.taken: set[int] = set()
        self.marked: list[int] = []
        self.accepted: list[int] = []

    def follow(self, kernel: Kernel) -> Kernel:
        """The set after the character. Notes in ``accepted`` matches that end before it, in ``marked`` where a secret begins."""
        graph, read = self.graph, self.read
        bits, stack, reached = read.bits if read is not None else 0, list(kernel), set[int]()
        seen: set[int] = set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            kind = graph.kind[node]
            if kind == "set":
                taken = bits >> graph.number[node] & 1
            elif kind == "exact":
                taken = read is not None and read.exact == graph.literal[node]
            elif kind == "folded":
                taken = read is not None and read.folded == graph.literal[node]
            elif kind == "trie":
                stack += graph.out[node]
                child = graph.trie[node].get(read.folded) if read is not None and node in graph.trie else None
                if child is not None:
                    reached.add(child)
                continue
            else:
                self._pass(node, kind, bits, stack)
                continue
            if taken:
                reached.update(graph.out[node])
        reached -= self.taken
        self.taken |= reached - graph.ends
        return tuple(sorted(reached))

    def _pass(self, node: int, kind: str, bits: int, stack: list[int]) -> None:
        """A node that reads nothing."""
        graph = self.graph
        if kind == "mark":
            self.marked += graph.out[node]
        elif kind == "accept":
            self.accepted.append(graph.owner[node])
        elif kind == "fork":
            stack += graph.out[node]
        else:
            look = graph.looks[graph.number[node]]
            there = (bits if look.ahead else self.before) >> look.charset & 1
            if bool(there) is not look.negated:
                stack += graph.out[node]


# Regular expressions of Python's ``re`` as nodes of the automaton. Raises Refused for what an automaton cannot follow exactly.

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
