"""Finds every match of many patterns in one pass over a stream, and knows exactly what may still become one.

A lazily built deterministic automaton (Thompson's construction, subsets as in RE2), with two additions. A state tells matches apart by
where they began: it is a row of sets of nodes, the set of the earliest beginning first, and a node that two beginnings reach is kept
for the earlier, whose match covers the other's. So nothing is scanned twice, whatever the patterns and the text. And what a pattern
wants to see before its secret is followed in a set of its own, ``ahead``, which holds nothing back.

Assertions look at one character before or after, characters that are passed over aside.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from edge_rt.plugins.redaction.characters import SKIP, folded, plain

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
