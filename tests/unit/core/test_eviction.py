"""What the built-in policies keep, and why candidates are protected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.chat.transcript import Span
from edge_rt.core.context.eviction import (
    ANSWER_PIECE,
    ANSWER_SCORE,
    SINKS,
    Candidate,
    answer_pieces,
    candidates,
    keep_graded,
    keep_slide,
    keep_strict,
    parts,
)
from edge_rt.core.context.grading import Grade
from edge_rt.core.context.history import Evicted, Segment
from edge_rt.errors import ContextOverflow

QUESTION = ("current question",)


def candidate(tokens: int, score: float = 0.5, *protections: str) -> Candidate:
    return Candidate(Segment(0, "user", "x", 0, 1, "message"), ((0, tokens),), 0, score, protections)  # type: ignore[arg-type]


def piece(start: int, end: int, *, role: str = "user", message: int = 0, kind: str = "message") -> Span:
    return Span(start, end, Segment(message, role, "x", 0, 1, kind))  # type: ignore[arg-type]


TALK = [candidate(10, 0.9, "system prompt"), candidate(10, 0.6), candidate(10, 0.1), candidate(10, 0.3), candidate(10, 0.0, *QUESTION)]


def test_strict_keeps_all_or_says_by_how_much_not() -> None:
    assert keep_strict(TALK, 50) == [0, 1, 2, 3, 4]
    with pytest.raises(ContextOverflow, match="has 50 tokens and the context leaves room for 49") as caught:
        keep_strict(TALK, 49)
    assert (caught.value.needed, caught.value.available) == (50, 49)


@pytest.mark.parametrize(("budget", "kept"), [(49, [0, 2, 3, 4]), (40, [0, 2, 3, 4]), (39, [0, 3, 4]), (29, [0, 4]), (20, [0, 4])])
def test_slide_lets_the_oldest_go(budget: int, kept: list[int]) -> None:
    assert keep_slide(TALK, budget) == kept


@pytest.mark.parametrize(("budget", "kept"), [(49, [0, 1, 3, 4]), (39, [0, 1, 4]), (29, [0, 4])])
def test_graded_lets_the_lowest_go(budget: int, kept: list[int]) -> None:
    assert keep_graded(TALK, budget) == kept


def test_of_equal_grades_the_oldest_goes() -> None:
    assert keep_graded([candidate(5), candidate(5), candidate(5)], 10) == [1, 2]


@pytest.mark.parametrize("keep", [keep_slide, keep_graded])
def test_protected_parts_that_do_not_fit_are_named(keep: object) -> None:
    with pytest.raises(ContextOverflow, match=r"20 tokens \(system prompt 10, current question 10\) and there is room for 19") as caught:
        keep(TALK, 19)  # type: ignore[operator]
    assert (caught.value.needed, caught.value.available) == (20, 19)


@given(
    st.lists(st.builds(candidate, st.integers(1, 30), st.sampled_from([0, 0.1, 1.0])) | st.just(candidate(7, 0.2, *QUESTION)), max_size=20),
    st.integers(0, 200),
)
def test_every_policy_keeps_the_rules(found: list[Candidate], budget: int) -> None:
    protected = {i for i, one in enumerate(found) if one.protections}
    for keep in (keep_strict, keep_slide, keep_graded):
        must = range(len(found)) if keep is keep_strict else protected
        if (needed := sum(found[i].tokens for i in must)) > budget:
            with pytest.raises(ContextOverflow) as caught:
                keep(found, budget)
            assert (caught.value.needed, caught.value.available) == (needed, budget)
            continue
        kept = keep(found, budget)
        assert kept == sorted(set(kept))
        assert protected <= set(kept)
        assert sum(found[i].tokens for i in kept) <= budget
        if sum(one.tokens for one in found) <= budget:
            assert kept == list(range(len(found)))


# ---- candidates ------------------------------------------------------------------------------------------------------


def made(pieces: list[Span], evicted: list[Evicted] | None = None, *, allowed: int = 1000, fed: int = 0) -> list[Candidate]:
    return candidates(pieces, evicted or [], fed=fed, allowed=allowed, grade=lambda segment: Grade(0.5), answer=pieces[-1].end)


def test_sinks_are_cut_off_an_unprotected_beginning() -> None:
    found = made([piece(0, 50, role="text"), piece(50, 100, role="text")])
    assert [(one.spans, one.protections) for one in found] == [
        (((0, SINKS),), ("attention sinks",)),
        (((SINKS, 50),), ()),
        (((50, 90),), ()),
        (((90, 100),), ("newest part",)),
    ]


def test_a_short_piece_that_reaches_into_the_newest_part_stays_whole() -> None:
    found = made([piece(0, 50, role="text"), piece(50, 95, role="text"), piece(95, 100, role="text")])
    assert [(one.tokens, one.protections) for one in found[-2:]] == [(5, ("newest part",)), (5, ("newest part",))]
    found = made([piece(0, 88, role="text"), piece(88, 92, role="text"), piece(92, 100, role="text")])
    assert [(one.tokens, one.protections) for one in found[-2:]] == [(4, ("newest part",)), (8, ("newest part",))]


def test_the_newest_part_is_one_of_the_window_and_not_of_all_history() -> None:
    pieces = [piece(at, at + 100, message=at, role="assistant") for at in range(0, 10000, 100)]
    found = made(pieces, allowed=200)
    assert sum(one.tokens for one in found if "newest part" in one.protections) == 20


def test_system_and_question_are_never_divided() -> None:
    found = made([piece(0, 50, role="system", kind="system"), piece(50, 80, message=1, role="assistant"), piece(80, 100, message=2)])
    assert [one.tokens for one in found] == [50, 30, 20]
    assert found[0].protections == ("system prompt", "attention sinks")
    assert found[1].protections == ()
    assert found[2].protections == ("current question", "newest part")


def test_what_was_evicted_is_no_candidate() -> None:
    found = made(
        [piece(0, 20, role="a", message=1), piece(20, 40, role="a", message=2), piece(40, 100)],
        [Evicted(10, 25, "", 0), Evicted(30, 40, "", 0)],
        fed=27,
    )
    assert [(one.spans, one.resident) for one in found] == [(((0, 4),), 4), (((4, 10),), 6), (((25, 30),), 2), (((40, 100),), 0)]


def test_the_answer_under_way_comes_in_pieces_that_leave_last() -> None:
    prompt = [piece(0, 10, role="text")]
    answer = answer_pieces(prompt, 10 + 2 * ANSWER_PIECE + 5, lambda start, end: f"{start}-{end}")
    assert [(one.start, one.end, one.segment.text) for one in answer] == [(10, 42, "10-42"), (42, 74, "42-74"), (74, 79, "74-79")]
    found = candidates([*prompt, *answer], [], fed=79, allowed=64, grade=lambda segment: Grade(0.9), answer=10)
    assert [one.score for one in found] == [0.9, 0.9, ANSWER_SCORE, ANSWER_SCORE, ANSWER_SCORE, ANSWER_SCORE][: len(found)]
    assert found[-1].protections == ("newest part",)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["user", "assistant", "system"])), min_size=1, max_size=12), st.integers(1, 300)
)
def test_parts_cover_the_pieces(sizes: list[tuple[int, str]], allowed: int) -> None:
    pieces, at = [], 0
    for i, (size, role) in enumerate(sizes):
        pieces.append(piece(at, at + size, message=i, role=role, kind="system" if role == "system" else "message"))
        at += size
    found = list(parts(pieces, allowed))
    assert [part.start for part in found] == [0, *[part.end for part in found[:-1]]]
    assert found[-1].end == at
    assert all(part.start < part.end for part in found)
    assert found[-1].protections, "the last token must be fed"
    assert found[0].protections, "the first cells are sinks"
