"""A plan meets its budget with the least predicted loss, and says so where it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_rt_distill.model.architecture import LayerShape
from edge_rt_distill.model.divergence import reference
from edge_rt_distill.surgery.apply import apply
from edge_rt_distill.surgery.cost import CostModel, cost_of
from edge_rt_distill.surgery.cut import Cut, student_architecture, whole
from edge_rt_distill.surgery.evidence import evidence, read_evidence
from edge_rt_distill.surgery.explain import explain, explain_measured
from edge_rt_distill.surgery.options import PARTS, Budget, PlanOptions
from edge_rt_distill.surgery.plan import candidates, plan
from edge_rt_distill.surgery.predict import best, lost, tables
from edge_rt_distill.surgery.probe import calibrated, of_each_layer, select
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_models import divergence, passages, random_architecture, random_decoder, random_evidence, random_tokens

from edge_rt.hooks import DataError, OptionError

TEACHER = random_architecture(layers=6)
EVIDENCE = random_evidence(TEACHER)
FINE = PlanOptions(multiple=8)
SMOLLM2 = replace(TEACHER, vocabulary=49152, width=576, head=64, layers=(LayerShape(9, 3, 1536),) * 30)


def sizes(cut: Cut) -> tuple[int, int, int, int, int]:
    """Layers, key-value heads, heads, channels, width."""
    one = cut.layers[0]
    return len(cut.layers), len(one.groups), len(one.heads), len(one.channels), len(cut.hidden)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.55, 1), st.floats(0.55, 1) | st.none(), st.integers(0, 5), st.sampled_from(["exact", "grouped"]), st.integers(0, 2))
def test_a_plan_keeps_to_its_budget_and_every_layer_has_one_size(
    share: float, speed: float | None, seed: int, how: Any, pairs: int
) -> None:
    found = random_evidence(TEACHER, seed)
    model = CostModel(layer_overhead=1000, context=8)  # so that narrow layers are faster ones at this size too
    options = replace(FINE, channels=how, dimensions=how, share=pairs, least=0.3, cost=model)
    cut = plan(found, TEACHER, Budget(parameters=share, speed=speed, bytes=share), options)
    student = student_architecture(TEACHER, cut)
    cost, teacher = cost_of(student, model), cost_of(TEACHER, model)
    assert cut.cost == cost
    assert cost.parameters <= share * teacher.parameters
    assert cost.bytes <= share * teacher.bytes
    assert speed is None or cost.time <= speed * teacher.time
    assert len({(one.heads, one.kv_heads, one.ffn) for one in student.layers}) == 1
    assert student.layers[0].ffn % 8 == 0
    assert student.width % 8 == 0
    assert sum(1 for one in cut.layers if one.like is not None) == pairs
    assert Cut.from_json(json.loads(json.dumps(cut.to_json()))) == cut
    assert set(cut.dropped or ()) == set(range(6)) - {i for one in cut.layers for i in one.sources}


def test_without_a_budget_nothing_is_cut() -> None:
    cut = plan(EVIDENCE, TEACHER, Budget())
    assert [replace(one, importance=1.0, reason="") for one in cut.layers] == list(whole(TEACHER).layers)
    assert cut.hidden == tuple(range(64))
    assert cut.chosen is not None
    assert cut.chosen.loss == 0


def test_no_other_sizes_within_the_budget_are_predicted_better() -> None:
    budget = Budget(parameters=0.7)
    options = replace(FINE, allow=("depth", "ffn", "groups", "heads"))
    chosen = plan(EVIDENCE, TEACHER, budget, options).chosen
    assert chosen is not None
    others = []
    for drop, groups, heads, ffn in product(range(4), (2, 3, 4), (1, 2), range(48, 97, 8)):
        fixed = replace(options, drop=drop, groups=groups, heads=heads, ffn=ffn)
        try:
            one = plan(EVIDENCE, TEACHER, budget, fixed).chosen
        except OptionError:
            continue
        assert one is not None
        others.append(one.loss)
    assert len(others) > 30
    assert chosen.loss == pytest.approx(min(others))


@settings(max_examples=15, deadline=None)
@given(st.floats(0.6, 0.98), st.integers(0, 5))
def test_channels_by_layer_keep_to_the_budget_and_lose_no_more_than_equal_ones(share: float, seed: int) -> None:
    found = random_evidence(TEACHER, seed)
    options = replace(FINE, allow=("ffn",), widths="free", least=0.25)
    both = {one.chosen.name: one for one in candidates(found, TEACHER, Budget(parameters=share), options) if one.chosen}
    assert set(both) == {"channels by layer", "channels"}
    spread, equal = both["channels by layer"], both["channels"]
    assert spread.cost is not None
    assert spread.cost.parameters <= share * TEACHER.parameters()
    assert spread.cost == cost_of(student_architecture(TEACHER, spread), options.cost)
    assert equal.chosen is not None
    assert spread.chosen is not None
    assert spread.chosen.loss <= equal.chosen.loss + 1e-12
    assert all(24 <= len(one.channels) <= 96 and len(one.channels) % 8 == 0 for one in spread.layers)
    assert Cut.from_json(json.loads(json.dumps(spread.to_json()))) == spread
    assert "channels by layer" in explain(spread, TEACHER)


def test_no_other_spread_of_channels_is_predicted_better() -> None:
    found = tables(random_evidence(TEACHER, 3))
    steps, layers = (48, 64, 80, 96), (0, 2, 5)
    chosen = found.spread(layers, 72, steps)
    assert sum(chosen) <= 3 * 72
    others = [found.ffn_loss(layers, one) for one in product(steps, repeat=3) if sum(one) <= 3 * 72]
    assert found.ffn_loss(layers, chosen) == pytest.approx(min(others))


def test_a_layer_that_is_worth_more_keeps_more_channels() -> None:
    precious = replace(EVIDENCE, ffn_kl=np.array([9.0, 1, 1, 1, 1, 1]), ffn_channels=np.tile(np.linspace(0.1, 2, 96), (6, 1)))
    cut = plan(precious, TEACHER, Budget(parameters=0.85), replace(FINE, allow=("ffn",), widths="free"))
    widths = [len(one.channels) for one in cut.layers]
    assert widths[0] == 96
    assert max(widths[1:]) < 96
    with pytest.raises(OptionError, match="leave widths equal"):
        plan(EVIDENCE, replace(TEACHER, qk_norm=True), Budget(parameters=0.85), replace(FINE, widths="free"))


def test_each_layer_is_tried_alone_and_the_teacher_is_left_as_it_was() -> None:
    teacher = random_decoder(layers=3)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    found, text = random_evidence(teacher.architecture), [passages(random_tokens(2, 12))]
    seen: list[tuple[int, int]] = []
    measured = of_each_layer(found, teacher, reference(teacher, text), told=lambda at, count: seen.append((at, count)))
    assert seen == [(0, 3), (1, 3), (2, 3)]
    assert all(tensor.equal(before[name]) for name, tensor in teacher.state_dict().items())
    uncut = whole(teacher.architecture)
    for layer in range(3):
        kept = replace(uncut.layers[layer], channels=best(found.ffn_channels[layer], 72))
        cut = replace(uncut, layers=tuple(kept if i == layer else one for i, one in enumerate(uncut.layers)))
        assert tables(measured).ffn_loss([layer], 72) == pytest.approx(divergence(apply(teacher, cut), teacher, text), rel=1e-4)


def test_the_diagnosis_decides_what_is_cut() -> None:
    idle_layer = random_evidence(TEACHER, layer_kl=np.array([1, 1, 1, 0, 1, 1.0]))
    cut = plan(idle_layer, TEACHER, Budget(parameters=0.88), FINE)
    assert list(cut.dropped or ()) == [3]
    assert sizes(cut) == (5, 4, 8, 96, 64)

    channels = np.where(np.arange(96) % 2, 1.0, 0.0) * np.ones((6, 1))
    cut = plan(random_evidence(TEACHER, ffn_channels=channels), TEACHER, Budget(parameters=0.8), FINE)
    assert sizes(cut)[0] == 6
    kept = cut.layers[0].channels
    assert set(range(1, 96, 2)) <= set(kept)
    assert len(kept) < 96

    heads = np.tile(np.array([1.0, 0, 1, 0, 0, 1, 0, 1]), (6, 1))
    cut = plan(random_evidence(TEACHER, heads=heads), TEACHER, Budget(parameters=0.9), FINE)
    assert cut.layers[2].heads == (0, 2, 5, 7)
    assert cut.layers[2].groups == (0, 1, 2, 3)

    groups = np.tile(np.array([1.0, 1, 0, 0, 1, 1, 1, 1]), (6, 1))
    cut = plan(random_evidence(TEACHER, heads=groups), TEACHER, Budget(parameters=0.9), FINE)
    assert cut.layers[2].groups == (0, 2, 3)
    assert cut.layers[2].heads == (0, 1, 4, 5, 6, 7)

    hidden = np.r_[np.ones(40), np.zeros(24)]
    cut = plan(random_evidence(TEACHER, hidden=hidden), TEACHER, Budget(parameters=0.7), FINE)
    assert set(range(40)) <= set(cut.hidden)
    assert len(cut.hidden) < 64


def test_evenly_important_layers_lose_channels_before_one_of_them_is_lost() -> None:
    even = random_evidence(TEACHER, layer_kl=np.full(6, 0.3), ffn_channels=np.tile(np.linspace(0.01, 2, 96) ** 2, (6, 1)))
    cut = plan(even, TEACHER, Budget(parameters=0.85), replace(FINE, allow=("depth", "ffn")))
    assert not cut.dropped
    assert sizes(cut)[3] < 96
    assert {one.name for one in cut.others} == {"layers"}


def test_measured_removal_stands_in_place_of_the_prediction() -> None:
    found = replace(EVIDENCE, drop_order=(2, 4), drop_kl=(0.01, 0.02))
    cut = plan(found, TEACHER, Budget(), replace(FINE, drop=2))
    assert list(cut.dropped or ()) == [2, 4]
    assert cut.chosen is not None
    assert cut.chosen.loss == 0.02
    assert "measured" in (cut.dropped or {})[4]
    more = plan(found, TEACHER, Budget(), replace(FINE, drop=3))  # the cheapest of those left, which is layer 3 here
    assert list(more.dropped or ()) == [2, 3, 4]
    assert more.chosen is not None
    kl = EVIDENCE.layer_kl
    assert more.chosen.loss == pytest.approx(0.02 + 1.5 * kl[3] + 0.25 * (kl[2] + kl[4]))
    assert "measured" not in (more.dropped or {})[3]


def test_parts_fixed_by_hand() -> None:
    options = replace(FINE, drop=(1,), merge=((2, 3),), ffn=48, groups=3, heads=1, width=56, share=((4, 5),), allow=())
    cut = plan(EVIDENCE, TEACHER, Budget(), options)
    assert sizes(cut) == (4, 3, 3, 48, 56)
    assert [one.sources for one in cut.layers] == [(0,), (2, 3), (4,), (5,)]
    assert cut.layers[3].like == 2
    assert cut.layers[3].channels == cut.layers[2].channels
    text = explain(cut, TEACHER)
    for said in ("made of layers 2-3", "dropped by hand", "48 of 96 channels", "parameters of the student's layer 2", "predicted"):
        assert said in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drop": (6,)}, "no layer 6"), ({"drop": (1, 1)}, "name it once"), ({"drop": (1,), "merge": ((1, 2),)}, "used elsewhere"),
        ({"drop": tuple(range(6))}, "keep at least one"), ({"drop": 5}, "at most 4 may go"), ({"merge": ((1, 3),)}, "neighbours"),
        ({"merge": ((1, 2), (2, 3))}, "merged twice"), ({"ffn": 104}, "at most that"), ({"ffn": 50}, "multiple of 8; give 48"),
        ({"groups": 5}, "at most that"), ({"width": 60}, "multiple of 8"), ({"share": 9}, "have room for"), ({"share": -1}, "from 0"),
        ({"share": ((1, 1),)}, "cannot share"), ({"share": ((1, 2), (2, 3))}, "several pairs"), ({"protect": (9,)}, "no layer 9"),
        ({"multiple": 32, "groups": 1, "heads": 1}, "make no multiple of 32"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        plan(EVIDENCE, TEACHER, Budget(), replace(FINE, **options))


@pytest.mark.parametrize(
    "options",
    [{"allow": ("tail",)}, {"multiple": 0}, {"least": 0}, {"channels": "some"}, {"merge_by": "glue"}, {"ffn": 0}, {"heads": True}],
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=";"):
        PlanOptions(**options)


@pytest.mark.parametrize(
    "budget",
    [{"parameters": 0}, {"parameters": -1}, {"speed": 1.5}, {"bytes": float("nan")}, {"bytes": float("inf")}, {"parameters": True}],
)
def test_budgets_out_of_range_are_refused(budget: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="budget"):
        Budget(**budget)


def test_a_budget_that_cannot_be_met_says_what_the_smallest_student_takes() -> None:
    with pytest.raises(
        OptionError, match=r"of parameters .*\(the smallest has .* in embedding and output.*; raise the budget, lower least"
    ):
        plan(EVIDENCE, TEACHER, Budget(parameters=0.05), FINE)
    with pytest.raises(OptionError, match="time"):
        plan(EVIDENCE, TEACHER, Budget(speed=0.01), FINE)
    with pytest.raises(OptionError, match="raise the budget"):
        plan(EVIDENCE, TEACHER, Budget(parameters=0.9), replace(FINE, allow=()))
    cut = plan(EVIDENCE, TEACHER, Budget(parameters=TEACHER.parameters() - 1000), FINE)  # a number, not a share
    assert cut.cost is not None
    assert cut.cost.parameters <= TEACHER.parameters() - 1000


def test_costs_are_counted_as_the_file_and_the_decoder_have_them() -> None:
    cost = cost_of(SMOLLM2)
    assert cost.parameters == 134_515_008
    linear, table, norms = 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536), 49152 * 576, 61 * 576
    assert cost.bytes == linear * 18 / 32 + table * 2 + norms * 4
    assert cost.time == cost.bytes + 576 * 2 + 30 * (150e3 + 2 * 192 * 256 * 2)  # a row of the embedding, overhead, cells
    untied = cost_of(replace(SMOLLM2, tied=False))
    assert untied.bytes == cost.bytes + table * 2
    assert untied.time == cost.time  # a token reads one row of the embedding
    shared = cost_of(replace(SMOLLM2, parameters_of=(*range(29), 28)))
    assert (shared.bytes, shared.time) == (cost.bytes, cost.time)
    assert shared.parameters == cost.parameters - SMOLLM2.layer_parameters(29)
    with pytest.raises(OptionError, match="linear_bits"):
        CostModel(linear_bits=0)
    with pytest.raises(OptionError, match="below 0"):
        CostModel(layer_overhead=-1)


def test_a_model_of_real_size_is_planned_for_k_quants() -> None:
    found = random_evidence(SMOLLM2)
    cut = plan(found, SMOLLM2, Budget(parameters=0.8, speed=0.8), PlanOptions(multiple=256, channels="grouped"))
    assert cut.cost is not None
    assert cut.cost.parameters <= 0.8 * 134_515_008
    assert len(cut.layers[0].channels) % 256 == 0
    assert len(cut.hidden) in (512, 576)  # 576 as it is, or a multiple
    assert all(len(cut.layers[0].channels[i : i + 256]) == 256 for i in range(0, len(cut.layers[0].channels), 256))
    assert all(cut.layers[0].channels[i] % 256 == 0 for i in range(0, len(cut.layers[0].channels), 256))


def test_the_most_important_are_kept_alone_or_in_groups() -> None:
    importance = np.array([5.0, 0, 0, 3, 4, 1, 1, 1, 9])
    assert best(importance, 3) == (0, 4, 8)
    assert best(importance, 4, 2) == (0, 1, 4, 5)
    assert best(np.ones(4), 2) == (0, 1)
    assert best(importance, 9, 2) == tuple(range(9))
    assert lost(importance) == pytest.approx(1 - np.r_[0, 9, 14, 18, 21, 22, 23, 24, 24, 24] / 24)
    assert lost(importance, 2)[[2, 4, 9]] == pytest.approx([1 - 5 / 24, 1 - 10 / 24, 0])
    assert lost(np.zeros(4)) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_evidence_is_checked(tmp_path: Path) -> None:
    good: dict[str, Any] = {"layer_kl": np.ones(6), "heads": np.ones((6, 8)), "ffn_channels": np.ones((6, 96)), "hidden": np.ones(64)}
    np.savez(tmp_path / "diagnosis.npz", **good)
    found = read_evidence(tmp_path, TEACHER)
    assert found.ffn_kl.tolist() == [0.5] * 6
    assert evidence({**good, "ffn_kl": np.full(6, 2.0)}, TEACHER).ffn_kl.tolist() == [2.0] * 6
    ordered = evidence({**good, "drop_order": np.array([3, 1]), "drop_kl": np.array([0.1, 0.3])}, TEACHER)
    assert (ordered.drop_order, ordered.drop_kl) == ((3, 1), (0.1, 0.3))
    with pytest.raises(DataError, match="do not belong together"):
        evidence({**good, "drop_order": np.array([3, 6]), "drop_kl": np.array([0.1, 0.3])}, TEACHER)
    for change, said in (({"heads": np.ones((6, 7))}, "of another model"), ({"hidden": np.full(64, np.nan)}, "not finite")):
        with pytest.raises(DataError, match=said):
            evidence({**good, **change}, TEACHER)
    with pytest.raises(DataError, match="no layer_kl"):
        evidence({}, TEACHER)
    with pytest.raises(DataError, match="different sizes"):
        evidence(good, replace(TEACHER, layers=(*TEACHER.layers[:5], LayerShape(8, 4, 64))))
    (tmp_path / "diagnosis.npz").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="diagnose the teacher again"):
        read_evidence(tmp_path / "diagnosis.npz", TEACHER)


def test_predictions_are_scaled_by_cuts_that_were_measured() -> None:
    teacher = random_decoder(layers=5)
    found, text = random_evidence(teacher.architecture), [passages(random_tokens(2, 12))]
    seen: list[tuple[int, int]] = []
    scaled = calibrated(found, teacher, reference(teacher, text), FINE, told=lambda at, count: seen.append((at, count)))
    assert set(scaled.scales or ()) == set(PARTS)
    assert seen == [(i, 5) for i in range(5)]
    for part, fixed in (("ffn", {"ffn": 80}), ("groups", {"groups": 3}), ("depth", {"drop": 2})):
        cut = plan(scaled, teacher.architecture, Budget(), replace(FINE, allow=(), **fixed))  # type: ignore[arg-type]
        assert cut.chosen is not None
        assert list(cut.chosen.losses) == [part]
        assert cut.chosen.loss == pytest.approx(divergence(apply(teacher, cut), teacher, text), rel=1e-4)
    assert any("measured" in reason for reason in cut.reasons)


def test_cuts_are_compared_by_making_them() -> None:
    teacher = random_decoder(layers=5)
    text = [passages(random_tokens(2, 12))]
    cuts = candidates(random_evidence(teacher.architecture), teacher.architecture, Budget(parameters=0.8), FINE, most=3)
    assert len({one.chosen.name for one in cuts if one.chosen is not None}) == 3
    predicted = [one.chosen.loss for one in cuts if one.chosen is not None]
    assert predicted == sorted(predicted)
    found = select(teacher, cuts, reference(teacher, text))
    assert [one.divergence for one in found] == sorted(one.divergence for one in found)
    assert found[0].divergence == pytest.approx(divergence(apply(teacher, found[0].cut), teacher, text))
    assert all(one.cut.chosen is not None and one.cut.chosen.name in explain_measured(found) for one in found)
