"""Least squares after a cut: it finds what there is to find, and leaves alone what it would not help."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from edge_rt_distill.model.decoder import LINEARS, Decoder
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.surgery import repair as repair_module
from edge_rt_distill.surgery.apply import apply
from edge_rt_distill.surgery.cut import Cut, whole
from edge_rt_distill.surgery.explain import explain_repair
from edge_rt_distill.surgery.least_squares import Equations, Fit, fit, fit_scale, solve
from edge_rt_distill.surgery.repair import RepairOptions, repair
from edge_rt_distill.surgery.reparam import Form, attach
from edge_rt_distill.surgery.streams import weights
from surgery_models import VOCABULARY, divergence, logits, passages, random_decoder, random_tokens

from edge_rt.hooks import Cancelled, DataError, OptionError

TEXT = [passages(random_tokens(6, 40, seed)) for seed in range(4)]
OTHER = [passages(random_tokens(4, 40, 99))]
FAMILIES = ("llama", "qwen2", "qwen3")


def redundant(family: str) -> tuple[Decoder, Cut]:
    """A teacher whose later channels repeat the first ones, and whose odd heads repeat the even ones; the cut that removes the copies."""
    teacher = random_decoder(family)
    for layer in teacher.layers:
        for name in ("ffn_gate", "ffn_up"):
            linear = getattr(layer, name)
            linear.weight[64:] = linear.weight[:32]
        for kind in ("weight", "bias"):
            tensor = getattr(layer.attn_q, kind)
            if tensor is not None:
                heads = tensor.unflatten(0, (8, 8))
                heads[1::2] = heads[0::2]
    cut = whole(teacher.architecture)
    layers = (replace(one, channels=tuple(range(64)), heads=(0, 2, 4, 6)) for one in cut.layers)
    return teacher, replace(cut, layers=tuple(layers))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_copies_carried_moves_to_the_originals(family: str) -> None:
    teacher, cut = redundant(family)
    student = apply(teacher, cut)
    before = divergence(student, teacher, OTHER)
    report = repair(student, teacher, cut, TEXT, RepairOptions(ridges=(1e-9, 1e-6)))
    assert not report.undone
    assert report.after < 1e-3 * report.before
    assert divergence(student, teacher, OTHER) < 1e-3 * before
    assert [one.site for one in report.sites] == [f"blk.{i}.{name}" for i in range(4) for name in ("attn_output", "ffn_down")]
    assert all(one.after < 1e-2 * one.before and one.note == "refitted" for one in report.sites)
    torch.testing.assert_close(logits(student, OTHER[0].tokens), logits(teacher, OTHER[0].tokens), rtol=0.02, atol=0.02)


def test_where_nothing_is_missing_nothing_changes() -> None:
    teacher = random_decoder()
    cut = whole(teacher.architecture)
    student = apply(teacher, cut)
    report = repair(student, teacher, cut, TEXT[:1])
    assert torch.equal(logits(student, OTHER[0].tokens), logits(teacher, OTHER[0].tokens))
    assert {one.note for one in report.sites} == {"kept its weights: no change helped"}
    assert all(one.after == one.before < 1e-9 for one in report.sites)  # round-off
    assert report.before == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_repair_helps_or_changes_nothing(family: str) -> None:
    teacher = random_decoder(family)
    cut = whole(teacher.architecture)
    layers = [replace(one, channels=tuple(range(0, 96, 2)), groups=(1, 3), heads=(2, 3, 6, 7)) for one in cut.layers]
    cut = replace(cut, layers=(layers[0], replace(layers[1], sources=(1, 2)), layers[3]), hidden=tuple(range(56)))
    student = apply(teacher, cut)
    report = repair(student, teacher, cut, TEXT, RepairOptions(sites=LINEARS))
    assert report.after < report.before
    assert not report.undone
    assert all(one.after <= one.before for one in report.sites)
    norms = {"blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"}
    assert {f"blk.2.{name}" for name in LINEARS} | norms <= {one.site for one in report.sites}
    assert divergence(student, teacher, OTHER) < divergence(apply(teacher, cut), teacher, OTHER)
    text = explain_repair(report)
    assert "blk.2.ffn_down" in text
    assert "refitted" in text


def test_a_repair_that_makes_it_worse_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, cut = redundant("llama")
    student = apply(teacher, cut)
    old = logits(student, OTHER[0].tokens)
    monkeypatch.setattr(repair_module, "fit", lambda train, *_: Fit(torch.full((len(train.energy), len(train.gram)), 9.0), 1, 0.5, 1.0))
    report = repair(student, teacher, cut, TEXT[:1])
    assert report.undone
    assert report.after > report.before
    assert torch.equal(logits(student, OTHER[0].tokens), old)
    assert "undone" in explain_repair(report)


def test_shared_layers_are_left_alone() -> None:
    teacher, cut = redundant("llama")
    cut = replace(cut, layers=(*cut.layers[:3], replace(cut.layers[3], like=2)))
    student = apply(teacher, cut)
    before = student.linear("blk.2.ffn_down").weight.clone()
    report = repair(student, teacher, cut, TEXT)
    assert torch.equal(student.linear("blk.2.ffn_down").weight, before)
    notes = {one.site: one.note for one in report.sites}
    assert notes["blk.3.attn_output"] == notes["blk.2.ffn_down"] == "shared between layers: not refitted"


def test_padding_counts_for_nothing() -> None:
    teacher, cut = redundant("llama")
    tokens, length = random_tokens(6, 40), torch.tensor([40, 30, 20, 40, 25, 40])
    real = torch.arange(40) < length[:, None]
    mask = (torch.arange(40) < length[:, None] - 1).float()
    students = []
    for filler in (0, VOCABULARY - 1):
        filled = torch.where(real, tokens, torch.tensor(filler))
        student = apply(teacher, cut)
        repair(student, teacher, cut, [Rows(filled, mask, length)])
        students.append(logits(student, OTHER[0].tokens))
    torch.testing.assert_close(*students, rtol=1e-4, atol=1e-4)


def test_the_first_position_and_outliers_do_not_decide() -> None:
    batch = Rows(random_tokens(1, 4), torch.tensor([[0.0, 0, 1, 0]]), torch.tensor([4]))
    assert weights(batch, 0.5, 0.0).tolist() == [[0.0, 0.5, 1.0, 0.5]]
    teacher, cut = redundant("llama")
    with torch.no_grad():
        teacher.token_embd.weight[7] *= 1e4  # a token whose stream drowns all others
    quiet = [passages(torch.where(one.tokens == 7, 8, one.tokens)) for one in TEXT]
    loud = [passages(one.tokens.clone()) for one in quiet]
    loud[0].tokens[0, 5] = 7
    errors = []
    for text in (quiet, loud):
        student = apply(teacher, cut)
        report = repair(student, teacher, cut, text, RepairOptions(ridges=(1e-3,)))
        assert not report.undone
        errors.append(divergence(student, teacher, [passages(torch.where(OTHER[0].tokens == 7, 8, OTHER[0].tokens))]))
    assert errors[1] < 3 * errors[0]


def test_progress_is_told_and_can_stop_a_repair() -> None:
    teacher, cut = redundant("llama")
    seen: list[tuple[int, int]] = []
    repair(apply(teacher, cut), teacher, cut, TEXT[:1], told=lambda at, count: seen.append((at, count)))
    assert seen == [(i, 4) for i in range(4)]

    def stop(at: int, count: int) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        repair(apply(teacher, cut), teacher, cut, TEXT[:1], told=stop)


def test_what_cannot_be_repaired_is_refused() -> None:
    teacher, cut = redundant("llama")
    with pytest.raises(DataError, match="at least two passages"):
        repair(apply(teacher, cut), teacher, cut, [passages(random_tokens(1, 9))])
    student = apply(teacher, cut)
    attach(student, Form())
    with pytest.raises(OptionError, match="parametrised"):
        repair(student, teacher, cut, TEXT)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sites": ("x",)}, "no matrix"),
        ({"ridges": ()}, "above 0"),
        ({"apart": 1.0}, "between 0 and 1"),
        ({"carry": 1.5}, "carry"),
        ({"outlier": 0}, "outlier"),
    ]
    for options, said in wrong:
        with pytest.raises(OptionError, match=said):
            RepairOptions(**options)
    with pytest.raises(DataError, match="no prediction counts"):
        divergence(teacher, teacher, [Rows(random_tokens(1, 4), torch.zeros(1, 4), torch.tensor([4]))])


def test_equations_give_what_numpy_gives() -> None:
    draw = np.random.default_rng(0)
    x, error, weights = draw.normal(size=(50, 7)), draw.normal(size=(50, 3)), draw.uniform(0, 1, 50)
    equations = Equations(7, 3)
    for part in (slice(0, 20), slice(20, 50)):
        equations.add(*(torch.from_numpy(a[part]) for a in (x, error, error)), torch.from_numpy(weights[part]))
    root = np.sqrt(weights)[:, None]
    expected = np.linalg.lstsq(root * x, root * error, rcond=None)[0]
    found = solve(equations, 1e-12)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)
    left = ((root * (error - x @ expected)) ** 2).sum(0)
    energy = ((root * error) ** 2).sum(0)
    assert equations.relative(found) == pytest.approx(float((left / energy).mean()), rel=1e-4)
    assert equations.relative() == pytest.approx(1, rel=1e-4)
    best = fit(equations, equations, (1e-12, 100.0))
    assert best.ridge == 1e-12
    assert best.change is not None
    mild = fit(equations, equations, (1e-12, 1e-3, 100.0))
    assert mild.ridge == 1e-3  # nearly as good, and it changes less
    damped = np.linalg.solve(
        x.T @ (x * weights[:, None]) + np.eye(7) * 10 * np.mean((weights[:, None] * x * x).sum(0)), x.T @ (weights[:, None] * error)
    )
    np.testing.assert_allclose(solve(equations, 10.0).numpy(), damped, rtol=1e-6)


def test_a_norms_weight_is_fitted_by_dimension() -> None:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    truth = torch.tensor([0.5, 1.0, 2.0, 3.0, -1.0])
    found = fit_scale(x, x * truth, torch.ones(200), torch.ones(5), 1e-9)
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(fit_scale(x, x * truth, torch.ones(200), torch.ones(5), 1e9), torch.ones(5))


def test_earlier_errors_are_made_good_as_far_as_they_are_carried() -> None:
    teacher = random_decoder()
    cut = whole(teacher.architecture)
    cut = replace(cut, layers=(replace(cut.layers[0], channels=tuple(range(48))), *cut.layers[1:]))
    own, full = (
        {one.site: one for one in repair(apply(teacher, cut), teacher, cut, TEXT, RepairOptions(carry=c)).sites} for c in (0.0, 1.0)
    )
    assert own["blk.0.ffn_down"] == full["blk.0.ffn_down"]  # nothing was wrong in front of it
    assert own["blk.0.ffn_down"].after < own["blk.0.ffn_down"].before
    # The attention of the next layer lacks nothing itself but what its inputs changed; what is missing in the stream is carried to it.
    assert own["blk.1.attn_output"].before < full["blk.1.attn_output"].before
    assert full["blk.1.attn_output"].before > 0.5 * own["blk.0.ffn_down"].after
