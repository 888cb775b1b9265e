"""The automaton finds what ``re`` finds, in one pass and for every pattern at once."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.plugins.redaction.automaton import MAX_STATES, Automaton, Graph, Refused, add_pattern, add_words

_ATOMS = st.sampled_from(["a", "b", "1", " ", ".", "[ab]", "[^a]", r"\d", r"\w", r"\s", "(?<!a)", "(?<=b)", "(?<![0-9])", r"\b"])


def _combined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(parts, min_size=2, max_size=4).map("".join),
        st.lists(parts, min_size=2, max_size=3).map(lambda ways: f"(?:{'|'.join(ways)})"),
        st.tuples(parts, st.sampled_from(["?", "*", "+", "{2}", "{1,3}"])).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    )


_PATTERNS = st.recursive(_ATOMS, _combined, max_leaves=8)
_TEXTS = st.text("ab1 .", max_size=14)


def matches(patterns: list[str], text: str, most: int = 20) -> list[set[tuple[int, int]]]:
    """Every match of each pattern, as the automaton tells them: of those with one end, at least the longest."""
    graph = Graph()
    for number, pattern in enumerate(patterns):
        graph.adding = number
        add_pattern(graph, pattern, most)
    automaton = Automaton(graph)
    state, starts = automaton.start, list[int]()
    found: list[set[tuple[int, int]]] = [set() for _ in patterns]
    for position, char in enumerate([*text, None]):
        read = automaton.classify(char) if char is not None else None
        state, move = automaton.move(state, read)
        if move is not None:
            for index, number in move.matches:
                found[number].add((starts[index], position))
            starts = [*starts, position]
            starts = [starts[i] for i in move.keep]
        assert len(starts) == len(state.row)
        assert starts == sorted(starts)
    return found


def covered(spans: set[tuple[int, int]]) -> set[int]:
    return {i for a, b in spans for i in range(a, b)}


@settings(deadline=None, max_examples=250)
@given(patterns=st.lists(_PATTERNS, min_size=1, max_size=3), text=_TEXTS)
def test_the_automaton_covers_what_re_matches(patterns: list[str], text: str) -> None:
    usable = []
    for pattern in patterns:
        try:
            add_pattern(Graph(), pattern, 20)
        except Refused:
            continue
        usable.append(pattern)
    for pattern, spans in zip(usable, matches(usable, text), strict=True):
        # An end of the region would be an end of the text to \b, so the end is asked for by what follows.
        expected = set()
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                if re.compile(f"(?s:(?:{pattern})(?=.{{{len(text) - end}}}\\Z))").match(text, start):
                    expected.add((start, end))
        assert covered(spans) == covered(expected)
        assert spans <= expected


def test_lookahead() -> None:
    assert matches(["a+(?!b)", "a(?=1)", r"a\b"], "aab a1 a") == [{(0, 1), (4, 5), (7, 8)}, {(4, 5)}, {(7, 8)}]


def test_a_beginning_whose_match_is_refused_does_not_hide_a_later_one() -> None:
    spans = matches(["[0-9](?: ?[0-9]){2,4}(?![0-9])"], "12 345 x")[0]
    assert {(0, 6), (3, 6)} <= spans


def test_words() -> None:
    graph = Graph()
    add_words(graph, ["ann lee", "ann"], {" ": "[ -]{1,2}"}, "(?<![a-z])", "(?![a-z])")
    automaton = Automaton(graph)
    texts: dict[str, set[tuple[int, int]]] = {
        "Ann Lee": {(0, 3), (0, 7)}, "ann--lee": {(0, 3), (0, 8)}, "anne lee": set(), "joann": set(), "ÁNN": {(0, 3)},
    }  # fmt: skip
    for text, expected in texts.items():
        state, starts = automaton.start, list[int]()
        found: set[tuple[int, int]] = set()
        for position, char in enumerate([*text, None]):
            state, move = automaton.move(state, automaton.classify(char) if char is not None else None)
            if move is not None:
                found |= {(starts[index], position) for index, _ in move.matches}
                starts = [[*starts, position][i] for i in move.keep]
        assert found == expected


def test_memory_is_bounded() -> None:
    graph = Graph()
    add_pattern(graph, "[ab]*a[ab]{12}c", 40)  # 2^12 states and more
    automaton = Automaton(graph)
    state = automaton.start
    for char in random.Random(1).choices("ab", k=6_000):
        state, _ = automaton.move(state, automaton.classify(char))
        assert len(automaton._states) <= MAX_STATES + 1


@pytest.mark.parametrize("pattern", ["(a)(?(1)b)", "(?=ab)c", "a$", "^a", "a{6000}", "(?:a{100}){100}"])
def test_what_cannot_be_followed_is_refused(pattern: str) -> None:
    with pytest.raises(Refused, match=";"):
        add_pattern(Graph(), pattern, 20)
