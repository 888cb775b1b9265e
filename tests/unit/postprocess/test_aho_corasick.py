"""The automaton against a search of the whole text, for every way of splitting it, and what many patterns cost."""

import itertools
import random
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.hooks import AhoCorasick

SMALL = st.text("ab中", max_size=24)
PATTERNS = st.lists(st.text("ab中", min_size=1, max_size=5), max_size=6, unique=True)


def found(automaton, patterns, pieces):
    """(end, pattern) of all occurrences, the longest first at each end; and the depth after each piece."""
    state, at, out, depths = 0, 0, [], []
    for piece in pieces:
        state, ends = automaton.scan(piece, state)
        out += [(at + i + 1, patterns[p]) for i, there in ends for p in automaton.ending(there)]
        at += len(piece)
        depths.append(automaton.depth[state])
    return out, depths


def reference(patterns, text):
    ends = range(1, len(text) + 1)
    return [(end, p) for end in ends for p in sorted(patterns, key=len, reverse=True) if text[:end].endswith(p)]


@given(SMALL, PATTERNS, st.lists(st.integers(0, 100), max_size=5))
def test_any_split_finds_what_is_there(text, patterns, cuts):
    automaton = AhoCorasick(patterns)
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    assert found(automaton, patterns, [text[a:b] for a, b in itertools.pairwise(edges)])[0] == reference(patterns, text)
    assert [automaton.lengths[i] for i in range(len(patterns))] == [len(p) for p in patterns]


@given(SMALL, PATTERNS)
def test_the_depth_is_the_longest_beginning_at_the_end(text, patterns):
    automaton, state = AhoCorasick(patterns), 0
    for end, (c, depth) in enumerate(zip(text, found(AhoCorasick(patterns), patterns, text)[1], strict=True), 1):
        state = automaton.step(state, c)
        possible = [p[:n] for p in patterns for n in range(1, len(p) + 1) if text[:end].endswith(p[:n])]
        assert automaton.depth[state] == depth == max(map(len, possible), default=0)
        longest = max(possible, key=len, default="")
        assert automaton.goes_on(state) == any(p.startswith(longest) and p != longest for p in patterns)
        shorter, depths = state, set()
        while shorter:
            depths.add(automaton.depth[shorter])
            shorter = automaton.shorter[shorter]
        assert depths == {len(one) for one in possible}


def test_equal_patterns_have_the_index_of_the_first():
    automaton = AhoCorasick(["b", "a", "a"])
    assert [list(automaton.ending(automaton.step(0, c))) for c in "abc"] == [[1], [0], []]


def test_an_empty_pattern_is_refused():
    with pytest.raises(ValueError, match="empty"):
        AhoCorasick(["a", ""])
    assert len(AhoCorasick([])) == 1


def test_five_thousand_patterns_are_compact():
    draw = random.Random(1)
    patterns = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(4, 16))) for _ in range(5000)]
    tracemalloc.start()
    automaton = AhoCorasick(patterns)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 24 * len(automaton) + 4096


def test_cost_is_linear():
    def seconds(automaton, text):
        best = 1e9
        for _ in range(3):
            start, state = time.process_time(), 0
            for i in range(0, len(text), 4):
                state, _ = automaton.scan(text[i : i + 4], state)
            best = min(best, time.process_time() - start)
        return best

    deep = AhoCorasick(["a" * 5000 + "b", "aaab"])  # falls back again and again
    assert seconds(deep, "a" * 80_000) < 24 * seconds(deep, "a" * 10_000) + 0.01
    prefixes = AhoCorasick(["a" * n for n in range(1, 400)])
    assert seconds(prefixes, "aab" * 20_000) < 10 * seconds(AhoCorasick(["xyz"]), "aab" * 20_000) + 0.01
