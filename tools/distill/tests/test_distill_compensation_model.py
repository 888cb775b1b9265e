"""Corrections in a whole model: chosen, fitted, tuned, applied as they say, and written to files that give the same model back."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from edge_rt_distill.compensate import files, report, sequential
from edge_rt_distill.compensate.apply import compensated
from edge_rt_distill.compensate.choose import Options, choose, kl_with
from edge_rt_distill.compensate.correction import Correction
from edge_rt_distill.compensate.cost import Budget
from edge_rt_distill.compensate.measure import everywhere
from edge_rt_distill.compensate.sensitivity import sensitivities
from edge_rt_distill.compensate.storage import all_as_stored, as_stored
from edge_rt_distill.compensate.survey import Forms, survey
from edge_rt_distill.compensate.tune import Schedule, tune
from edge_rt_distill.model.architecture import Architecture, LayerShape
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.divergence import divergence, final, reference
from edge_rt_distill.model.load import load, tensors
from edge_rt_distill.model.rows import beginning

import edge_rt
from edge_rt.errors import DataError, OptionError, TrainingError
from edge_rt.hooks import ModelFile, SequenceBatch, compensation_fingerprint

ARCHITECTURE = Architecture(
    family="llama", vocabulary=160, width=64, head=16, layers=(LayerShape(4, 2, 96),) * 2, tied=True, norm_epsilon=1e-5, rope_base=1e4,
    rope="interleaved", context=128,
)  # fmt: skip
PLENTY = Budget(10**9, 1e9)
FORMS = Forms(ranks=(2, 4, 8), tables=(8,), vectors=1000)
FITS_ALONE = Options(forms=FORMS, tuning=None)


def text(sequences: int, seed: int, size: int = 48) -> list[list[int]]:
    return torch.randint(ARCHITECTURE.vocabulary, (sequences, size), generator=torch.Generator().manual_seed(seed)).tolist()


FITTING, HELD_OUT, OTHER = text(12, 1), text(6, 2), text(6, 3)


@pytest.fixture(scope="module")
def teacher() -> Decoder:
    """A random model of two layers, whose outputs are far from uniform."""
    torch.manual_seed(0)
    model = Decoder(ARCHITECTURE).eval().requires_grad_(False)
    for name, tensor in tensors(model).items():
        if "norm" not in name:
            tensor.normal_(0, 0.35 if name == "token_embd.weight" else 0.12)
    return model


def rounded_weights(teacher: Decoder) -> Decoder:
    """The teacher in Q4_0."""
    student = copy.deepcopy(teacher)
    kind = gguf.GGMLQuantizationType.Q4_0
    for site in student.sites():
        weight = student.linear(site).weight
        weight.copy_(torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)))
    return student


@pytest.fixture
def quantised(teacher) -> Decoder:
    return rounded_weights(teacher)


def random_compensation(model: Decoder, seed: int = 0, rank: int = 4) -> dict[str, Correction]:
    """Every kind somewhere, ranks of two sizes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    found = {}
    for number, site in enumerate(("blk.0.attn_q", "blk.0.ffn_down", "blk.1.attn_output", "blk.1.ffn_up")):
        linear = model.linear(site)
        inner, outer, r = linear.in_features, linear.out_features, rank * (1 + number % 2)
        low = {"low_a": normal(r, inner), "low_b": normal(outer, r)} if number != 2 else {}
        table = {"centroids": normal(8, inner), "rows": normal(8, outer), "offsets": normal(8) if number == 1 else None}
        found[site] = Correction(**low, **(table if number in (1, 2) else {}), bias=normal(outer) if number else None)
    return found


# ---- applying --------------------------------------------------------------------------------------------------------


def test_what_is_applied_is_the_formula_and_ends_with_the_context(teacher):
    made = random_compensation(teacher)
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1))
    linear, one = teacher.linear("blk.0.ffn_down"), made["blk.0.ffn_down"]
    plain = linear(x)
    with compensated(teacher, made):
        found = linear(x)
    for i in range(3):
        for j in range(5):
            v = x[i, j]
            row = one.rows[torch.argmax(one.centroids @ v + one.offsets)]
            expected = linear.weight @ v + one.low_b @ (one.low_a @ v) + row + one.bias
            assert torch.allclose(found[i, j], expected, atol=1e-4)
    assert torch.equal(linear(x), plain)


def test_sites_that_are_not_there_are_named(teacher):
    with pytest.raises(ValueError, match=r"blk\.7\.attn_q"), compensated(teacher, {"blk.7.attn_q": Correction(bias=torch.zeros(64))}):
        pass


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_a_low_rank_error_in_one_weight_is_removed_and_nothing_else_is_kept(teacher):
    student = copy.deepcopy(teacher)
    weight = student.linear("blk.1.attn_v").weight
    generator = torch.Generator().manual_seed(5)
    weight.add_(0.3 * torch.randn(weight.shape[0], 2, generator=generator) @ torch.randn(2, 64, generator=generator))
    found = choose(teacher, student, FITTING, HELD_OUT, PLENTY, FITS_ALONE)
    assert list(found.compensation) == ["blk.1.attn_v"]
    unrelated = reference(teacher, everywhere(OTHER))
    assert kl_with(student, found.compensation, unrelated) < 0.01 * unrelated.kl(student)
    assert found.kl < 0.01 * found.kl_none
    reasons = {one.site: one.reason for one in found.sites}
    assert reasons["blk.0.attn_q"] == "no form helped on held-out text"
    assert len(reasons) == 14


def test_a_model_that_lost_nothing_gets_nothing(teacher):
    found = choose(teacher, copy.deepcopy(teacher), FITTING, HELD_OUT, PLENTY, FITS_ALONE)
    assert found.compensation == {}
    assert (found.bytes, found.microseconds) == (0, 0.0)
    assert found.kl == pytest.approx(0.0, abs=1e-6)


def test_int4_is_mended_on_other_text_within_the_budget_and_the_models_stay_as_they_were(teacher, quantised):
    before = {name: tensor.clone() for name, tensor in tensors(quantised).items()}
    free = choose(teacher, quantised, FITTING, HELD_OUT, PLENTY, FITS_ALONE)
    budget = Budget(free.bytes // 3, free.microseconds / 2)
    found = choose(teacher, quantised, FITTING, HELD_OUT, budget, FITS_ALONE)
    assert 0 < found.bytes <= budget.bytes
    assert 0 < found.microseconds <= budget.microseconds
    unrelated = reference(teacher, everywhere(OTHER))
    none = unrelated.kl(quantised)
    some, all_ = (kl_with(quantised, one.compensation, unrelated) for one in (found, free))
    assert all_ < 0.7 * none
    assert all_ < some < none
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(quantised).items())
    assert not any(module._forward_hooks for module in quantised.modules())


def test_sites_are_left_out_one_by_one_where_that_is_asked_for(teacher, quantised):
    budget = Budget(4000, 200.0)
    found = choose(teacher, quantised, FITTING, HELD_OUT, budget, replace(FITS_ALONE, left_out_tokens=400))
    assert found.compensation
    assert all(one.gain > 0 for one in found.sites if one.kinds)


def test_later_fits_mend_what_earlier_layers_left(teacher):
    """Only layer 0 is damaged, only layer 1 may be corrected: the stream's error is seen there, the weight's would be none."""
    student = copy.deepcopy(teacher)
    student.linear("blk.0.ffn_down").weight.add_(0.05 * torch.randn(64, 96, generator=torch.Generator().manual_seed(3)))
    minds = sensitivities(teacher, FITTING)
    found = sequential.fit(teacher, student, text(40, 1), HELD_OUT, {"blk.1.ffn_down": ("rank 8",)}, minds, FORMS)
    one = found["blk.1.ffn_down"]
    assert one.correction is not None
    assert one.after < 0.95 * one.before


def test_all_forms_can_be_fitted_together(teacher, quantised):
    """What a survey may choose, the fit can make, and all of it ends in the kinds asked for."""
    minds = sensitivities(teacher, FITTING)
    kinds = {one.site: one.kinds for one in survey(teacher, quantised, FITTING, HELD_OUT, minds, FORMS) if "table 8" in one.kinds}
    assert ("rank 8", "table 8") in kinds.values()
    kinds["blk.0.attn_v"] = ("rank 4", "bias")
    found = sequential.fit(teacher, quantised, FITTING, HELD_OUT, kinds, minds, FORMS)
    for site, wanted in kinds.items():
        assert found[site].after < found[site].before, site
        assert set(found[site].correction.kinds()) <= set(wanted)
    assert ("rank 8", "table 8") in {one.correction.kinds() for one in found.values()}


def test_gains_estimated_from_gradients_are_of_the_size_of_the_real_ones(teacher, quantised):
    minds = sensitivities(teacher, FITTING, seed=1)
    found = survey(teacher, quantised, FITTING, HELD_OUT, minds, replace(FORMS, tables=(), bias=False, ranks=(32,), storage="F32"))
    kl = reference(teacher, everywhere(OTHER)).kl(quantised)
    assert 0.2 * kl < sum(one.gain for one in found) < 5 * kl


# ---- tuning ----------------------------------------------------------------------------------------------------------


def test_tuning_lowers_the_divergence_of_other_text(teacher, quantised):
    start = choose(teacher, quantised, FITTING, HELD_OUT, Budget(6000, 400.0), FITS_ALONE).compensation
    schedule = Schedule(steps=30, batch_tokens=200, rate=0.05, norm_rate=0.01, every=10)
    before = {name: tensor.clone() for name, tensor in tensors(quantised).items()}
    found = tune(teacher, quantised, start, text(40, 1), HELD_OUT, "F16", schedule)
    assert [step for step, _ in found.history] == [0, 10, 20, 30]
    assert min(kl for _, kl in found.history) < found.history[0][1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(quantised).items())
    unrelated = reference(teacher, everywhere(OTHER))
    old = kl_with(quantised, start, unrelated)
    assert kl_with(quantised, found.compensation, unrelated, found.norms) < 0.95 * old
    assert set(found.norms) == {name for name in before if "norm" in name}


def test_tuning_never_ends_worse_than_it_began(teacher, quantised):
    start = choose(teacher, quantised, FITTING, HELD_OUT, Budget(6000, 400.0), FITS_ALONE).compensation
    found = tune(teacher, quantised, start, FITTING, HELD_OUT, "Q8_0", Schedule(steps=6, rate=3.0, warm_up=1, every=3))
    assert found.history[-1][1] > found.history[0][1]
    held = reference(teacher, everywhere(HELD_OUT))
    assert kl_with(quantised, found.compensation, held) == pytest.approx(found.history[0][1], rel=1e-4)


def test_a_divergence_that_is_no_number_ends_tuning(teacher, quantised):
    broken = {"blk.0.attn_q": Correction(bias=torch.full((64,), 1e38))}
    broken["blk.0.attn_k"] = Correction(bias=torch.full((32,), 1e38))
    with pytest.raises(TrainingError, match="no number"):
        tune(teacher, quantised, broken, FITTING, HELD_OUT, "F32", Schedule(steps=2, batch_tokens=96))


def test_every_position_is_compared(teacher, quantised):
    batches = everywhere([OTHER[0], OTHER[1][:20]])
    found = divergence(final(quantised, batches[0]), final(teacher, batches[0]))
    assert len(found) == 68
    p, q = (model.logits(model(torch.tensor(OTHER[:1])).hidden)[0].log_softmax(-1) for model in (teacher, quantised))
    assert torch.allclose(found[:48], (p.exp() * (p - q)).sum(-1), atol=1e-5)
    assert reference(teacher, everywhere([OTHER[0], OTHER[1][:20]])).kl(quantised) == pytest.approx(float(found.mean()), rel=1e-5)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_said_in_a_sentence(teacher, quantised):
    other = Decoder(replace(ARCHITECTURE, layers=ARCHITECTURE.layers[:1]))
    with pytest.raises(OptionError, match="same architecture"):
        choose(teacher, other, FITTING, HELD_OUT, PLENTY)
    for wrong in ([], [[]], [[5]]):
        with pytest.raises(DataError, match="held-out"):
            choose(teacher, quantised, FITTING, wrong, PLENTY)
        with pytest.raises(DataError, match="to fit to"):
            choose(teacher, quantised, wrong, HELD_OUT, PLENTY)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("storage", "rank"), [("F32", 4), ("F16", 4), ("Q8_0", 16)])
def test_a_side_file_holds_what_was_written(teacher, tmp_path, storage, rank):
    made = random_compensation(teacher, rank=rank)
    path = files.side_path(tmp_path / "student.Q4_0.gguf")
    assert path.name == "student.Q4_0.compensation.gguf"
    files.write_side_file(path, made, architecture="llama", model="abc", storage=storage)
    reader = gguf.GGUFReader(path)
    facts = ("general.architecture", "general.type", "edge_rt.compensation.model")
    assert [reader.get_field(key).contents() for key in facts] == ["llama", "compensation", "abc"]
    stored = {f"{site}.{name}": part for site, one in made.items() for name, part in as_stored(one, storage).parts()}
    found = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert found.keys() == stored.keys()
    assert all(np.array_equal(found[name].astype(np.float32).reshape(part.shape), part.numpy()) for name, part in stored.items())
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(("storage", "tables"), [("F32", False), ("F32", True), ("F16", True), ("Q8_0", False), ("Q8_0", True)])
def test_the_runtime_applies_a_side_file_as_torch_does(tiny, tmp_path, storage, tables):
    """At all sites, in all mixtures of forms; ranks that Q8_0 holds and ranks that fall back."""
    path = tmp_path / "model.gguf"
    shutil.copy(tiny, path)
    model = load(path).model
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return 0.15 * torch.randn(*shape, generator=generator)

    made: dict[str, Correction] = {}
    for number, site in enumerate(model.sites()):
        inner, outer, rank = model.linear(site).in_features, model.linear(site).out_features, (4, 32, 8)[number % 3]
        low = {"low_a": normal(rank, inner), "low_b": normal(outer, rank)} if number % 2 else {}
        table = {"centroids": normal(16, inner), "rows": normal(16, outer)} if tables and number % 3 == 0 else {}
        offsets = {"offsets": normal(16)} if table and number % 2 else {}
        made[site] = Correction(**low, **table, **offsets, bias=normal(outer) if number % 4 < 2 else None)
    made = all_as_stored({site: one for site, one in made.items() if one.kinds()}, storage)
    with ModelFile.open(path) as file:
        fingerprint = compensation_fingerprint(file)
    files.write_side_file(files.side_path(path), made, architecture="llama", model=fingerprint, storage=storage)
    tokens = [5, 17, 99, 3, 42, 8, 120, 77]
    with torch.no_grad(), compensated(model, made):
        expected = model.logits(model(torch.tensor([tokens])).hidden)[0].numpy()
    with edge_rt.open(path, pack=False) as running:
        found = running.logits(tokens)
    with edge_rt.open(path, pack=False, compensation="off") as running:
        plain = running.logits(tokens)
    # Inputs that meet Q8_0 are rounded to 8 bits by the runtime.
    # With tables, where two centroids are as near as rounding, another row is looked up: not so at most of the positions.
    error = np.abs(found - expected).max(1)
    assert (np.median(error) if tables else error.max()) < (3e-2 if storage == "Q8_0" else 5e-3) * np.abs(expected).max()
    assert np.abs(plain - expected).max() > 0.2 * np.abs(expected).max()


@pytest.mark.parametrize("engine", [None, "llama_cpp"])
def test_the_low_rank_part_runs_as_an_adapter(tiny, tmp_path, engine):
    """Of two ranks, though an adapter has one alpha; in edge-rt and in llama.cpp."""
    if engine:
        pytest.importorskip("llama_cpp")
    model = load(tiny).model
    inner = {"blk.0.attn_q": (64, 64), "blk.1.ffn_down": (128, 64), "blk.1.attn_k": (64, 32)}
    generator = torch.Generator().manual_seed(0)
    made = {}
    for number, (site, (width, out)) in enumerate(inner.items()):
        rank = 4 * (1 + number % 2)
        a, b = torch.randn(rank, width, generator=generator) / 8, torch.randn(out, rank, generator=generator) / 3
        made[site] = Correction(low_a=a, low_b=b, bias=torch.ones(out) if number == 0 else None)
    path = tmp_path / "adapter.gguf"
    assert files.write_lora(path, made, architecture="llama", storage="F16")
    tokens = [5, 17, 99, 3, 42, 8, 120, 77]
    low = {site: one._replace(bias=None) for site, one in made.items()}
    with torch.no_grad():
        plain = model.logits(model(torch.tensor([tokens])).hidden)[0].numpy()
        with compensated(model, low):
            expected = model.logits(model(torch.tensor([tokens])).hidden)[0].numpy()
    with edge_rt.open(tiny, engine=engine, adapters={"made": path}, pack=False) as running:
        sequence = running.engine.new_sequence()
        running.engine.adapt(sequence, running.adapters.chosen("made", 1.0).number, 1.0)
        found = np.concatenate([np.asarray(rows) for rows in running.engine.step([SequenceBatch(sequence, tokens, "all")])]).reshape(
            len(tokens), -1
        )
    scale = np.abs(expected).max()
    assert np.abs(expected - plain).max() > 0.1 * scale
    assert np.abs(found - expected).max() < 5e-3 * scale
    assert not files.write_lora(path, {"blk.0.attn_q": Correction(bias=torch.ones(64))}, architecture="llama", storage="F16")


def test_biases_may_move_into_the_model(teacher):
    made = random_compensation(teacher)
    found = files.bias_tensors(made)
    assert set(found) == {"blk.0.ffn_down.bias", "blk.1.attn_output.bias", "blk.1.ffn_up.bias"}
    rest = files.without_biases({**made, "blk.0.attn_k": Correction(bias=torch.ones(32))})
    assert rest.keys() == made.keys()
    assert all(one.bias is None for one in rest.values())


# ---- telling ---------------------------------------------------------------------------------------------------------


def test_a_choice_is_told_site_by_site(teacher, quantised):
    found = choose(teacher, quantised, FITTING, HELD_OUT, Budget(4000, 200.0), FITS_ALONE)
    data = json.loads(json.dumps(report.as_json(found)))
    assert len(data["sites"]) == 14
    kept = [one for one in data["sites"] if one["kinds"]]
    assert sum(one["bytes"] for one in kept) == data["bytes"] == found.bytes
    assert all(one["reason"] for one in data["sites"])
    lines = report.table(found).splitlines()
    assert len(lines) == 4 + len(kept)
    assert len(report.table(found, all_sites=True).splitlines()) == 4 + 14


def test_more_text_to_fit_to_leaves_less(teacher, quantised):
    low_rank_alone = replace(FITS_ALONE, forms=replace(FORMS, tables=(), bias=False))
    little, much = (choose(teacher, quantised, beginning(text(16, 1), count, len), HELD_OUT, PLENTY, low_rank_alone) for count in (48, 768))
    assert much.kl < little.kl < little.kl_none
