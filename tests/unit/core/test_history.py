"""What is in the cells and what was evicted, against a list of flags that says the same token by token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.core.context.history import Condensed, Evicted, SequenceState


def gone(start: int, end: int) -> Evicted:
    return Evicted(start, end, "", 0.0)


def spans(flags: list[bool]) -> list[tuple[int, int]]:
    """Runs of True."""
    found: list[tuple[int, int]] = []
    for i, flag in enumerate(flags):
        if flag and found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        elif flag:
            found.append((i, i + 1))
    return found


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 40), st.integers(1, 9))
def test_it_agrees_with_flags(away: list[bool], fed: int, most: int) -> None:
    fed = min(fed, len(away))
    tokens = list(range(100, 100 + len(away)))
    history = SequenceState(tokens, [gone(*span) for span in spans(away)])
    resident = [token for token, left in zip(tokens, away, strict=True) if not left]
    assert (history.resident(), history.cells) == (resident, len(resident))
    history.rewind(fed)
    assert history.resident() == [token for token in resident if token < 100 + fed]
    assert history.cells == len(history.resident())
    assert [history.cell(i) for i in range(len(away) + 1)] == [away[:i].count(False) for i in range(len(away) + 1)]
    assert history.whole() == tokens[: min([fed, *[start for start, _ in spans(away)]])]
    fresh: list[int] = []
    for _ in range(len(away) + 2):  # ends
        part, end = history.pending(most)
        assert len(part) <= most
        fresh += part
        history.advance(end)
    assert history.fed == len(away)
    assert fresh == [token for token in resident if token >= 100 + fed]


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.data())
def test_evicting_and_truncating(away: list[bool], data: st.DataObject) -> None:
    tokens = list(range(len(away)))
    history = SequenceState(tokens, [gone(*span) for span in spans(away)])
    more = [not left and data.draw(st.booleans()) for left in away]
    leaving = [gone(*span) for span in spans(more)]
    cells = history.resident()
    for start, end in reversed(history.cell_spans(leaving)):
        assert start < end
        del cells[start:end]
    history.evict(leaving)
    assert cells == history.resident()
    at = history.boundary(data.draw(st.integers(0, len(away))))
    history.truncate(at)
    assert history.resident() == [token for token in cells if token < at]
    history.append([7, 8])
    assert history.resident()[-2:] == [7, 8]
    again = SequenceState(history.tokens, history.evicted)
    assert again.resident() == history.resident()


def test_what_is_not_fed_yet_has_no_cells() -> None:
    history = SequenceState([1, 2, 3, 4, 5, 6])
    history.rewind(3)
    assert history.cell_spans([gone(1, 2), gone(4, 5)]) == [(1, 2)]
    assert history.cell_spans([gone(2, 5)]) == [(2, 3)]
    history.evict([gone(4, 5)])
    assert history.pending(9) == ([4, 6], 6)


@pytest.mark.parametrize("bad", [[gone(0, 9)], [gone(2, 1)], [gone(1, 3), gone(2, 4)], [gone(-1, 2)], [gone(1, 1)]])
def test_spans_that_cannot_be_are_refused(bad: list[Evicted]) -> None:
    with pytest.raises(ValueError, match="do not rise"):
        SequenceState([1, 2, 3, 4], bad)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.data())
def test_condensed_tokens_go_or_stay_together(away: list[bool], data: st.DataObject) -> None:
    history = SequenceState(range(len(away)), [gone(*span) for span in spans(away)])
    resident = history.resident()
    missing = 0
    for _ in range(data.draw(st.integers(1, 3))):
        before = history.cells
        last = data.draw(st.integers(0, before))
        pruned = data.draw(st.integers(0, before - last))
        history.condense(pruned, last)
        missing += pruned
        assert (history.cells, history.condensed.missing) == (before - pruned, missing)
        assert history.resident() == resident
        apart = history.kept(len(away)) - history.kept(history.condensed.tokens)
        assert apart <= last or not pruned
        assert history.cell(history.condensed.tokens) == history.cells - apart or not history.condensed.tokens
    restored = SequenceState(history.tokens, history.evicted, history.condensed)
    assert restored.cells == history.cells
    at = data.draw(st.integers(0, len(away)))
    bound = history.boundary(at)
    assert bound == 0 or bound >= history.condensed.tokens
    if history.condensed.tokens:
        assert history.whole() == []
    history.truncate(bound)
    assert history.condensed == (Condensed() if bound < restored.condensed.tokens else restored.condensed)
    assert 0 <= history.cells <= len(history.tokens) == bound


@pytest.mark.parametrize("condensed", [Condensed(5, 0), Condensed(3, 4), Condensed(3, -1)])
def test_condensed_tokens_must_be_there(condensed: Condensed) -> None:
    with pytest.raises(ValueError, match="cannot be missing"):
        SequenceState(range(4), condensed=condensed)
