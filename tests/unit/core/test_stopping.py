"""Stop strings against a reference that looks at the whole text, for every way of splitting it."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.core.generate.output import StopMatcher
from edge_rt.errors import OptionError


def reference(text, stops):
    """(text before the stop string, stop string): complete first, then longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def run(pieces, stops):
    matcher = StopMatcher(stops)
    out, stop = [], None
    for piece in pieces:
        emitted, stop = matcher.feed(piece)
        out.append(emitted)
    rest = matcher.flush()
    return "".join(out) + rest, stop


def split(text, cuts):
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


SMALL = st.text("ab", max_size=24)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@given(SMALL, STOPS, st.lists(st.integers(0, 100), max_size=6))
def test_any_split_gives_the_reference(text, stops, cuts):
    assert run(split(text, cuts), stops) == reference(text, stops)
    assert run(list(text), stops) == reference(text, stops)


@given(SMALL, STOPS)
def test_only_a_possible_beginning_is_held_back(text, stops):
    matcher, out = StopMatcher(stops), ""
    for i, c in enumerate(text):
        emitted, stop = matcher.feed(c)
        out += emitted
        if stop:
            return
        held = text[: i + 1][len(out) :]
        possible = [n for n in range(1, len(text) + 1) if any(s[:n] == text[: i + 1][-n:] and n < len(s) for s in stops)]
        assert len(held) == max((n for n in possible if n <= i + 1), default=0)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("Hello\nUser: hi", ["\nUser:"], ("Hello", "\nUser:")),
        ("abcd", ["abcde", "bc"], ("a", "bc")),  # complete first, though another began first
        ("xabc", ["c", "abc", "bc"], ("x", "abc")),  # complete together: the longest
        ("aaab", ["aab"], ("a", "aab")),
        ("ab", ["ab"], ("", "ab")),
        ("no stop", ["#"], ("no stop", None)),
        ("日本語。続き", ["。"], ("日本語", "。")),
        ("anything", [], ("anything", None)),
        ("twice a a", ["a", "a"], ("twice ", "a")),
    ],
)
def test_cases(text, stops, expected):
    assert run(list(text), stops) == expected
    assert run([text], stops) == expected


def test_nothing_comes_after_a_stop():
    matcher = StopMatcher(["END"])
    assert matcher.feed("one END two") == ("one ", "END")
    assert matcher.feed("three END") == ("", "END")
    assert matcher.flush() == ""
    assert matcher.stopped == "END"


@pytest.mark.parametrize("stops", [[""], ["a", ""], [b"a"], [None], "abc"])
def test_wrong_stops_are_option_errors(stops):
    with pytest.raises(OptionError):
        StopMatcher(stops)


def test_cost_is_linear_and_does_not_grow_with_the_number_of_stops():
    def seconds(length, stops):
        matcher, start = StopMatcher(stops), time.perf_counter()
        for _ in range(length // 10):
            matcher.feed("aaaaaaaaaa")
        return time.perf_counter() - start

    worst = ["a" * 200 + "b"]  # held back again and again: quadratic for a matcher that searches anew
    many = [f"a{i}" for i in range(500)]
    base = min(seconds(20_000, ["xyz"]) for _ in range(3))
    assert min(seconds(20_000, worst) for _ in range(3)) < 20 * base
    assert min(seconds(20_000, many) for _ in range(3)) < 20 * base
