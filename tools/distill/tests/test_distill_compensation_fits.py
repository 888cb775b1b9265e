"""Corrections find what was planted, keep nothing where nothing helps, and stay within what they may cost."""

from __future__ import annotations

import pytest
import torch
from edge_rt_distill.compensate import bias, low_rank, tables
from edge_rt_distill.compensate.correction import Correction, check, nearest
from edge_rt_distill.compensate.cost import Budget, Candidate, Costs, select
from edge_rt_distill.compensate.storage import as_stored, encoded, part_type, rounded, stored_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.errors import OptionError
from edge_rt.hooks import quantise_rows


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


ONES = torch.ones(40)

# ---- low rank --------------------------------------------------------------------------------------------------------


def test_a_planted_low_rank_error_is_found_whole():
    x = normal(500, 64, seed=1) * torch.linspace(0.1, 3, 64)
    planted = normal(40, 3, seed=2) @ normal(3, 64, seed=3)
    found = low_rank.moments(x, x @ planted.T, torch.ones(500))
    a, b = low_rank.factors(found, ONES, prior=planted, ridge=1e-6).of_rank(3)
    assert (b @ a - planted).abs().max() < 1e-4 * planted.abs().max()


def test_it_is_the_best_of_its_rank_on_the_inputs_and_weights_given():
    """No other rank 4 of plain or input-weighted singular vectors leaves less; nor does a step away from it."""
    x, error, g = normal(400, 48, seed=1) @ normal(48, 48, seed=2), normal(40, 48, seed=3), torch.rand(40, generator=seeded(4)) + 0.01
    found = low_rank.of_difference((x.T @ x / 400).double(), error)
    a, b = low_rank.factors(found, g, prior=error, ridge=1e-9).of_rank(4)

    def left(change: torch.Tensor) -> float:
        return float(((x @ (error - change).T).square() @ g).mean())

    before, after = low_rank.left_over(found, a, b, g)
    assert before == pytest.approx(left(torch.zeros_like(error)), rel=1e-4)
    assert after == pytest.approx(left(b @ a), rel=1e-4)
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    assert after < 0.8 * left(u[:, :4] * s[:4] @ v[:4])
    scale = x.square().mean(0).sqrt()
    u, s, v = torch.linalg.svd(error * scale, full_matrices=False)
    assert after < left(u[:, :4] * s[:4] @ (v[:4] / scale))
    for seed in range(5):
        assert after < left((b + 1e-2 * normal(*b.shape, seed=seed) * b.std()) @ a)


def test_with_few_tokens_it_is_drawn_to_what_the_weight_lost():
    error = normal(40, 4, seed=1) @ normal(4, 64, seed=2)
    few = normal(20, 64, seed=3)
    noisy = low_rank.moments(few, few @ error.T + normal(20, 40, seed=4), torch.ones(20))
    many = normal(2000, 64, seed=5)
    there = low_rank.moments(many, many @ error.T, torch.ones(2000))
    loose, drawn = (low_rank.factors(noisy, ONES, prior=error, ridge=ridge).of_rank(4) for ridge in (1e-6, 1.0))
    assert low_rank.left_over(there, *drawn, ONES)[1] < 0.5 * low_rank.left_over(there, *loose, ONES)[1]


def test_factors_are_of_like_size():
    x = normal(200, 64, seed=1) * 1000
    found = low_rank.moments(x, x @ normal(40, 64, seed=2).T * 1e-3, torch.ones(200))
    a, b = low_rank.factors(found, ONES).of_rank(8)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-4)


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spherical", [False, True])
def test_a_shift_that_depends_on_the_cluster_is_looked_up(spherical):
    centres, shifts = normal(6, 64, seed=1) * 4, normal(6, 40, seed=2)
    which = torch.randint(6, (600,), generator=seeded(3))
    x = centres[which] + 0.3 * normal(600, 64, seed=4)
    t = shifts[which] + 0.05 * normal(600, 40, seed=5)
    weight = torch.ones(300)
    clusters = tables.cluster(x[:300], weight, 6, seed=0, spherical=spherical)
    assert (clusters.offsets is None) == spherical
    table = tables.fit(clusters, (x[:300], t[:300], weight), (x[300:], t[300:], weight), ONES)
    left = t[300:] - table.change(x[300:])
    assert left.square().mean() < 0.01 * t[300:].square().mean()


def test_clusters_are_repeatable_and_no_more_than_there_are_inputs():
    x, weight = normal(5, 8, seed=1).repeat(20, 1), torch.ones(100)
    one, other = (tables.cluster(x, weight, 16, seed=7) for _ in range(2))
    assert torch.equal(one.centroids, other.centroids)
    assert len(one.centroids) == 5


def test_rows_without_meaning_shrink_to_the_mean():
    """Targets that have nothing to do with the inputs: what is left on held-out text is no more than without the table."""
    x, t, weight = normal(400, 16, seed=1), normal(400, 40, seed=2), torch.ones(200)
    clusters = tables.cluster(x[:200], weight, 32, seed=0)
    table = tables.fit(clusters, (x[:200], t[:200], weight), (x[200:], t[200:], weight), ONES)
    raw = tables.rows(nearest(x[:200], *clusters), t[:200], weight, 32, 0.0)
    assert table.rows is not None
    assert table.rows.square().mean() < 0.1 * raw.square().mean()


# ---- bias ------------------------------------------------------------------------------------------------------------


def test_a_bias_is_kept_as_far_as_held_out_text_confirms_it():
    one = torch.ones(200)
    shift = normal(40, seed=1)
    t = shift + 0.1 * normal(400, 40, seed=2)
    found = bias.fit(t[:200], one, t[200:], one, ONES)
    assert found is not None
    assert torch.allclose(found.bias, shift, atol=0.05)
    assert bias.fit(t[:200], one, -t[200:], one, ONES) is None
    half = bias.fit(t[:200], one, t[200:] / 2, one, ONES)
    assert half is not None
    assert torch.allclose(half.bias, shift / 2, atol=0.05)


# ---- storage ---------------------------------------------------------------------------------------------------------


def test_q8_0_is_ggmls():
    values = normal(6, 64, seed=1)
    assert encoded(values, "Q8_0").tobytes() == quantise_rows(values.numpy(), 8)
    assert (rounded(values, "Q8_0") - values).abs().max() < 0.01 * values.abs().max()
    assert torch.equal(rounded(values, "F16"), values.half().float())


def test_factors_of_small_rank_fall_back_to_half_floats():
    assert [part_type("low_b", rank, "Q8_0") for rank in (8, 16, 32, 64)] == ["F16", "F16", "Q8_0", "Q8_0"]
    assert part_type("bias", 64, "Q8_0") == "F32"
    one = Correction(low_a=normal(8, 64, seed=1), low_b=normal(40, 8, seed=2), bias=normal(40, seed=3))
    assert stored_bytes(one, "Q8_0") == 8 * 64 * 34 // 32 + 8 * 40 * 2 + 160
    again = as_stored(as_stored(one, "Q8_0"), "Q8_0")
    for (name, part), (_, same) in zip(as_stored(one, "Q8_0").parts(), again.parts(), strict=True):
        assert torch.allclose(part, same, rtol=1e-3), name


def test_parts_that_do_not_fit_are_refused():
    a, b = normal(4, 64, seed=1), normal(40, 4, seed=2)
    check("s", Correction(low_a=a, low_b=b), 64, 40)
    nan = torch.full((40,), float("nan"))
    for wrong in (Correction(low_a=a), Correction(low_a=a, low_b=b.T), Correction(bias=nan), Correction(offsets=torch.zeros(3))):
        with pytest.raises(ValueError, match=r"^s"):
            check("s", wrong, 64, 40)


# ---- cost ------------------------------------------------------------------------------------------------------------

candidates = st.lists(
    st.builds(
        Candidate,
        st.sampled_from([f"blk.{i}.{name}" for i in range(2) for name in ("attn_k", "attn_v", "ffn_down")]),
        st.sampled_from([("bias",), ("rank 8",), ("rank 8", "bias")]),
        st.integers(0, 1000),
        st.floats(-0.1, 1),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(candidates, st.integers(0, 2000), st.floats(0, 100))
def test_a_choice_never_costs_more_than_the_budget(found, most_bytes, most_time):
    costs = Costs()
    chosen = select(found, Budget(most_bytes, most_time), costs)
    assert sum(one.bytes for one in chosen.values()) <= most_bytes
    assert costs.of_all({site: (one.kinds, one.bytes) for site, one in chosen.items()}) <= most_time + 1e-6
    assert all(one.site == site and one.gain > 0 and one in found for site, one in chosen.items())


def test_the_scarcer_limit_decides():
    costs = Costs(node=3.0)
    few_nodes = [Candidate(f"blk.{i}.ffn_down", ("rank 32",), 900, 1.0) for i in range(4)]
    few_bytes = [Candidate(f"blk.{i}.attn_output", ("bias",), 90, 0.3) for i in range(40)]
    assert {one.kinds for one in select(few_nodes + few_bytes, Budget(10**6, 36.5), costs).values()} == {("rank 32",)}
    assert {one.kinds for one in select(few_nodes + few_bytes, Budget(890, 1e6), costs).values()} == {("bias",)}


def test_what_sites_of_one_input_share_costs_once():
    costs = Costs(node=1.0, gigabytes_per_second=1e9)
    alone = costs.microseconds([("rank 8",)], 0)
    kinds = {"blk.0.attn_k": (("rank 8",), 0), "blk.0.attn_v": (("rank 8", "bias"), 0), "blk.1.attn_v": (("rank 8",), 0)}
    assert (alone, costs.of_all(kinds)) == (pytest.approx(3.0), pytest.approx(6 + 3))
    pair = [Candidate(f"blk.0.{name}", ("rank 8",), 0, 1.0) for name in ("ffn_gate", "ffn_up")]
    apart = [Candidate(f"blk.{i}.ffn_down", ("rank 8",), 0, 0.9) for i in range(2)]
    assert len(select(pair, Budget(10, 5.1), costs)) == 2
    assert len(select(apart, Budget(10, 5.1), costs)) == 1


def test_costs_are_data():
    costs = Costs.from_json({"node": 2.0, "nodes": {"rank": 4}})
    assert costs.microseconds([("rank 8", "bias")], 12_000) == pytest.approx(2.0 * 6 + 1.0)
    for wrong in ({"speed": 1}, {"nodes": {"view": 1}}, {"node": -1.0}, {"gigabytes_per_second": 0}):
        with pytest.raises(OptionError):
            Costs.from_json(wrong)
    assert Budget.share(1_000_000, 9000.0) == (30_000, 360.0)
