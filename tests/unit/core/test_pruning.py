"""Which cells pruning keeps, on layers made up for the purpose."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.core.context.recall import same_tokens
from edge_rt.core.kv.pruning import (
    ASKED,
    LEAST,
    METHODS,
    NEIGHBOURS,
    SINKS,
    UNASKED,
    PruningMethod,
    PruningPlan,
    budget_cells,
    check_pruning,
    choose_cells,
    choose_tokens,
    plan,
)
from edge_rt.errors import OptionError
from edge_rt.types import Pruning


class FakeLayer(NamedTuple):
    """A layer that answers from arrays."""

    weights: Any  # [G, queries, N]
    norms: Any  # [G, N]
    directions: Any = None  # [G, N, D]
    number: int = 0

    @property
    def n_heads(self) -> int:
        return int(self.norms.shape[0])

    @property
    def n_cells(self) -> int:
        return int(self.norms.shape[1])

    def attention(self) -> Any:
        return self.weights

    def value_norms(self) -> Any:
        return self.norms

    def keys(self) -> Any:
        return self.directions


def layer(heads: int, queries: int, cells: int, seed: int = 0) -> FakeLayer:
    """A layer with random attention, values and keys."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(cells, 0.1), (heads, queries)).astype(np.float32)
    shapes = ((heads, cells), (heads, cells, 8))
    return FakeLayer(weights, *(np.abs(rng.standard_normal(shape)).astype(np.float32) + 0.1 for shape in shapes), number=seed)


@given(st.data(), st.sampled_from(sorted(METHODS)))
def test_every_head_keeps_as_many_and_its_ends(data: st.DataObject, method: str) -> None:
    cells = data.draw(st.integers(2, 60))
    keep = data.draw(st.integers(1, cells - 1))
    first = data.draw(st.integers(0, keep))
    last = data.draw(st.integers(0, keep - first))
    check_pruning(keep, first, last, method)
    kept = choose_cells([layer(3, 4, cells, seed) for seed in range(2)], keep, first, last, method)
    assert kept.shape == (2, 3, keep)
    assert (np.diff(kept) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < cells
    assert (kept[:, :, :first] == np.arange(first)).all()
    assert (kept[:, :, keep - last :] == np.arange(cells - last, cells)).all()


def looked_at(cells: int, *spans: tuple[int, int, int, float]) -> FakeLayer:
    """One head: each query spreads its attention evenly but for ``weight`` on (query, start, end)."""
    weights = np.full((1, 8, cells), 1 / cells, np.float32)
    for query, start, end, weight in spans:
        weights[0, query, start:end] = weight
    return FakeLayer(weights, np.ones((1, cells), np.float32))


def test_defensive_keeps_what_a_single_query_needs_and_snapkv_averages_it_away() -> None:
    """Cells 20 to 22 matter to one query in eight, cells 40 to 59 a little to all."""
    one = looked_at(100, (3, 20, 23, 0.3), *((query, 40, 60, 0.05) for query in range(8)))
    assert set(range(20, 23)) <= set(choose_cells([one], 13, 1, 1, "defensive")[0, 0].tolist())
    assert not set(range(20, 23)) & set(choose_cells([one], 13, 1, 1, "snapkv")[0, 0].tolist())


def test_obcache_lies_between_the_mean_and_the_highest() -> None:
    """Seven cells matter: much to one query in eight, or half as much to all; the mean and the highest agree, the squares tell."""
    few, all_ = (0, 20, 27, 0.09), [(query, 60, 67, 0.045) for query in range(8)]
    one = looked_at(100, few, *all_)
    assert set(range(22, 25)) <= set(choose_cells([one], 9, 1, 1, "defensive")[0, 0].tolist())
    assert set(range(62, 65)) <= set(choose_cells([one], 9, 1, 1, "obcache")[0, 0].tolist())
    much = looked_at(100, (0, 20, 27, 0.14), *((query, 60, 67, 0.03) for query in range(8)))
    assert set(range(22, 25)) <= set(choose_cells([much], 9, 1, 1, "obcache")[0, 0].tolist())
    assert set(range(62, 65)) <= set(choose_cells([much], 9, 1, 1, "snapkv")[0, 0].tolist())


@pytest.mark.parametrize("method", ["defensive", "obcache"])
def test_what_is_worthless_to_read_is_not_kept(method: str) -> None:
    one = looked_at(100, (0, 20, 30, 0.1), (1, 60, 70, 0.1))
    one.norms[0, 20:30] = 1e-3
    assert set(range(62, 68)) <= set(choose_cells([one], 10, 1, 1, method)[0, 0].tolist())


def test_neighbours_come_along_except_for_h2o() -> None:
    one = looked_at(100, *((query, 50, 51, 0.5) for query in range(8)))
    side = NEIGHBOURS // 2
    for method in ("defensive", "obcache", "snapkv"):
        assert choose_cells([one], NEIGHBOURS + 2, 1, 1, method)[0, 0].tolist() == [0, *range(50 - side, 51 + side), 99]
    two = looked_at(100, *((query, cell, cell + 1, 0.3) for query in range(8) for cell in (30, 50)))
    assert choose_cells([two], 4, 1, 1, "h2o")[0, 0].tolist() == [0, 30, 50, 99]


def test_keydiff_keeps_keys_unlike_the_others() -> None:
    directions = np.zeros((1, 40, 4), np.float32)
    directions[0, :, 0] = 1 + np.arange(40)  # length does not matter
    directions[0, [11, 23], 0], directions[0, [11, 23], 1] = 0, 5
    one = FakeLayer(None, np.ones((1, 40), np.float32), directions)
    assert choose_cells([one], 4, 1, 1, "keydiff")[0, 0].tolist() == [0, 11, 23, 39]


def test_window_keeps_the_newest_and_random_the_same_each_time() -> None:
    one = [layer(2, 1, 30, seed) for seed in range(2)]
    assert choose_cells(one, 5, 2, 0, "window").tolist() == [[[0, 1, 27, 28, 29]] * 2] * 2
    chosen = choose_cells(one, 5, 1, 1, "random")
    assert np.array_equal(chosen, choose_cells(one, 5, 1, 1, "random"))
    assert not np.array_equal(chosen[0], chosen[1])
    assert not np.array_equal(chosen[0, 0], chosen[0, 1])


def test_scores_that_are_no_numbers_do_not_win() -> None:
    one = looked_at(40, (0, 10, 20, 0.1))
    one.norms[0, 25:30] = np.nan
    assert not set(range(25, 30)) & set(choose_cells([one], 10, 1, 1, "defensive")[0, 0].tolist())


@pytest.mark.parametrize(("keep", "first", "last"), [(0, 0, 0), (4, 3, 2), (4, -1, 2), (4, 1, -2)])
def test_ends_must_fit(keep: int, first: int, last: int) -> None:
    with pytest.raises(OptionError, match="keep more"):
        check_pruning(keep, first, last, "defensive")
    with pytest.raises(OptionError, match="defensive, obcache"):
        check_pruning(4, 1, 1, "best")
    with pytest.raises(OptionError, match="one or more"):
        check_pruning(4, 1, 1, "defensive", 0)


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pruning", "expected"),
    [
        (Pruning(100), 100),
        (Pruning(0.1, "share"), 100),
        (Pruning(25_999, "bytes"), 25),
        (Pruning(0.0001, "share"), LEAST),
        (Pruning(5, "bytes"), 1),
    ],
)
def test_budgets(pruning: Pruning, expected: int) -> None:
    assert budget_cells(pruning, 1000, 1000) == expected


def test_a_budget_in_bytes_needs_to_know_how_large_a_cell_is() -> None:
    with pytest.raises(OptionError, match="in cells or as a share"):
        budget_cells(Pruning(1 << 20, "bytes"), 1000, None)


@pytest.mark.parametrize(("asked", "since", "way"), [(False, 0, UNASKED), (True, 0, ASKED), (True, 30, ASKED)])
def test_each_kind_of_pass_is_made_in_its_way(asked: bool, since: int, way: PruningMethod) -> None:
    found = plan(100, asked=asked, since=since)
    assert found == PruningPlan(100, SINKS, since + int(100 * way.newest), way.method, way.queries)


@given(st.integers(1, 3000), st.integers(0, 2000), st.integers(0, 2000))
def test_a_plan_can_be_carried_out_and_protects_both_ends(keep: int, head: int, since: int) -> None:
    found = plan(keep, head=head, since=since)
    check_pruning(*found)
    assert found.keep == keep
    assert found.first >= min(keep, SINKS)
    if head <= keep // 4:
        assert found.first >= head
    if keep // 2 > SINKS:
        assert found.last >= min(keep // 2, max(since, keep // 10))


# ---- tokens as wholes ------------------------------------------------------------------------------------------------


def test_tokens_near_those_of_the_question_stay_and_both_ends() -> None:
    tokens = [*range(100, 400), 7, 8, 9, *range(400, 700)]
    kept = choose_tokens(tokens, [8, 150], PruningPlan(100, 4, 10, *ASKED[:2]), same_tokens)
    assert len(kept) == 100
    assert kept == sorted(set(kept))
    assert set(range(4)) | set(range(593, 603)) <= set(kept)
    assert set(range(301 - NEIGHBOURS, 301 + NEIGHBOURS + 1)) <= set(kept), "the neighbourhood of the 8"
    assert set(range(50 - NEIGHBOURS, 50 + NEIGHBOURS + 1)) <= set(kept), "the neighbourhood of the 150"
