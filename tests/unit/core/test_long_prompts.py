"""Prompts far longer than the context: fast paths give the results of the plain computations, with bounded memory and steps."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.chat.transcript import Span
from edge_rt.core.context import recall
from edge_rt.core.context.eviction import candidates, keep_graded, keep_slide, keep_strict, must_stay
from edge_rt.core.context.history import Evicted, Segment, SequenceState
from edge_rt.core.context.recall import embedded, rarities, relevances, same_tokens
from edge_rt.core.kv.prefix_cache import common_prefix
from edge_rt.errors import ContextOverflow
from edge_rt.hooks import Grade

HUGE = "".join(f"Line {i} says that {i * i} people came.\n\n" for i in range(700))  # some 30,000 tokens; the context has 4,096


def one_by_one(question, segments, similarity):
    """``relevances`` as it is written down: all tokens of the question against all of the segments, in one matrix."""
    if not question or not segments:
        return [0.0] * len(segments)
    seen = Counter(token for text in segments for token in set(text))
    weights = rarities(question, seen, len(segments))
    distinct = sorted({token for text in segments for token in text})
    place = {token: i for i, token in enumerate(distinct)}
    near = similarity(sorted({*question, *distinct}))(question, distinct)
    total = float(weights.sum())
    return [float(weights @ near[:, [place[t] for t in set(text)]].max(axis=1)) / total if text else 0.0 for text in segments]


TOKENS = st.lists(st.integers(0, 30), max_size=12)


@given(st.lists(TOKENS, max_size=8), TOKENS)
def test_relevances_are_those_of_one_matrix(segments, question):
    vectors = np.random.default_rng(0).standard_normal((31, 8)).astype(np.float32)
    for similarity in (same_tokens, embedded(lambda tokens: vectors[list(tokens)])):
        assert relevances(question, segments, similarity) == one_by_one(question, segments, similarity)


@settings(max_examples=60)
@given(st.lists(TOKENS, max_size=8), TOKENS, st.integers(0, 40))
def test_relevances_in_groups_are_the_same_but_for_rounding(segments, question, at_once):
    vectors = np.random.default_rng(0).standard_normal((31, 8)).astype(np.float32)
    for similarity in (same_tokens, embedded(lambda tokens: vectors[list(tokens)])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recall, "AT_ONCE", at_once)
            found = relevances(question, segments, similarity)
        assert found == pytest.approx(one_by_one(question, segments, similarity), abs=1e-5)


def test_no_matrix_is_larger_than_is_held_at_once():
    sizes = []

    def compare(a, b):
        sizes.append(len(a) * len(b))
        return np.zeros((len(a), len(b)), np.float32)

    rng = np.random.default_rng(1)
    segments = [list(map(int, rng.integers(0, 20_000, 300))) for _ in range(100)]
    relevances(list(map(int, rng.integers(0, 5_000, 20_000))), segments, lambda tokens: compare)
    assert len(sizes) > 1
    assert max(sizes) <= recall.AT_ONCE


@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20), st.integers(0, 3000))
def test_a_common_beginning_is_found_in_blocks(a, b, same):
    a, b = [7] * same + a, [7] * same + b
    expected = next((i for i in range(min(len(a), len(b))) if a[i] != b[i]), min(len(a), len(b)))
    assert common_prefix(a, b) == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.integers(1, 500), st.integers(0, 3), st.booleans())
def test_what_cannot_fit_is_refused_ungraded_as_it_was_graded(sizes, allowed, gone, ask):
    pieces, start = [], 0
    for i, size in enumerate(sizes):
        role = "user" if i % 2 == 0 and (ask or i < len(sizes) - 1) else "assistant"
        pieces.append(Span(start, start + size, Segment(i, role, "x" * size, 0, size, "message")))
        start += size
    evicted = [Evicted(one.start, one.end, "", 0.0) for one in pieces[1 : 1 + gone] if one.segment.message < len(sizes) - 2]
    graded = []

    def grade(segment):
        graded.append(segment)
        return Grade(0.25 + segment.message / 100)

    found = candidates(pieces, evicted, fed=0, allowed=allowed, grade=grade, answer=start)
    fits = must_stay(found) <= allowed
    assert len(graded) == (len(found) if fits else 0)
    with_grades = [one._replace(score=grade(one.segment).score) for one in found]
    assert fits is (found == with_grades)
    for keep in (keep_strict, keep_slide, keep_graded):
        outcomes = []
        for given_candidates in (found, with_grades):
            try:
                outcomes.append(keep(given_candidates, allowed))
            except ContextOverflow as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


def test_a_history_with_thousands_of_gaps_is_looked_up():
    """Steps, not seconds: each question about a place looks at a few of the spans, whatever their number."""
    looked = 0

    class Counted(Evicted):
        @property
        def start(self):
            nonlocal looked
            looked += 1
            return self[0]

        @property
        def end(self):
            nonlocal looked
            looked += 1
            return self[1]

    n = 4000
    history = SequenceState(list(range(10 * n)), [Counted(10 * i, 10 * i + 5, "", 0.0) for i in range(n)])
    looked = 0
    assert history.kept(9 * n + 3) == 9 * n + 3 - 5 * (9 * n // 10) - 3
    assert history.cell(10 * n) == 5 * n
    assert history.boundary(20_002) == 20_000
    assert len(history.whole()) == 0
    assert history.pending(8) == ([], 10 * n)
    history.truncate(10 * n)
    assert looked < 200


def test_a_long_text_is_counted_as_a_short_one(monkeypatch):
    from edge_rt.core.context import grading

    patterns = [one for one in vars(grading).values() if isinstance(one, re.Pattern)]
    assert len(patterns) > 10
    assert not any(one.groups for one in patterns), "findall would give the groups"
    texts = [
        HUGE[:5000],
        "一九九八年三月，北京大学的王老师决定在上海开会，因为公司的费用是三千元。《书》" * 9,
        'see https://example.org/a, ＡＢ１２ and "x"\n- a\n' * 9,
        "On 12 March 2021 Mr. Smith of the Northern Bank paid $4,500 for 3 kg; however AB-1234 must be sent to a@b.org by 10:30. " * 9,
    ]  # fmt: skip
    short = [grading.features(text) for text in texts]
    monkeypatch.setattr(grading, "_LONG", 0)
    assert [grading.features(text) for text in texts] == short
