"""A cut applied to a teacher: exact where nothing is lost, and always a decoder that runs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from edge_rt_distill.model.architecture import Architecture
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.load import tensors
from edge_rt_distill.surgery.apply import apply, layer_tensors
from edge_rt_distill.surgery.cut import Cut, LayerCut, numbers, runs, student_architecture, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_models import logits, random_architecture, random_decoder, random_tokens

from edge_rt.hooks import OptionError

FAMILIES = ("llama", "qwen2", "qwen3")
TEACHERS = {family: random_decoder(family) for family in FAMILIES}
TOKENS = random_tokens(2, 9)


def changed(cut: Cut, **fields: Any) -> Cut:
    """The cut with these fields in every layer."""
    return replace(cut, layers=tuple(replace(one, **fields) for one in cut.layers))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_removed_is_the_same_to_the_bit(family: str) -> None:
    teacher = TEACHERS[family]
    student = apply(teacher, whole(teacher.architecture))
    assert torch.equal(logits(student, TOKENS), logits(teacher, TOKENS))
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_layers_are_those_that_a_forward_pass_skips(family: str) -> None:
    teacher = TEACHERS[family]
    cut = whole(teacher.architecture)
    student = apply(teacher, replace(cut, layers=(cut.layers[0], cut.layers[3])))
    assert torch.equal(logits(student, TOKENS), logits(teacher, TOKENS, skip=(1, 2)))
    assert [one.sources for one in student.architecture.layers] == [(0,), (3,)]


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_and_heads_that_give_nothing_can_go(family: str) -> None:
    teacher = random_decoder(family)
    cut = whole(teacher.architecture)
    channels = tuple(range(0, 96, 3))
    layers = []
    for i, one in enumerate(cut.layers):
        groups = (0, 2, 3) if i % 2 else (0, 1, 3)
        heads = tuple(2 * g + (g + i) % 2 for g in groups)
        layers.append(replace(one, groups=groups, heads=heads, channels=channels))
        with torch.no_grad():
            teacher.layers[i].attn_output.weight[:, [c for c in range(64) if c // 8 not in heads]] = 0
            teacher.layers[i].ffn_down.weight[:, [c for c in range(96) if c not in channels]] = 0
    student = apply(teacher, replace(cut, layers=tuple(layers)))
    shape = student.architecture.layers[0]
    assert (shape.heads, shape.kv_heads, shape.ffn) == (3, 3, 32)
    torch.testing.assert_close(logits(student, TOKENS), logits(teacher, TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_dimensions_that_carry_nothing_can_go(family: str) -> None:
    teacher = random_decoder(family)
    hidden = tuple(i for i in range(64) if i % 4)
    gone = [i for i in range(64) if i % 4 == 0]
    with torch.no_grad():
        teacher.token_embd.weight[:, gone] = 0
        for layer in teacher.layers:
            layer.attn_output.weight[gone] = 0
            layer.ffn_down.weight[gone] = 0
    student = apply(teacher, replace(whole(teacher.architecture), hidden=hidden))
    assert student.architecture.width == 48
    torch.testing.assert_close(logits(student, TOKENS), logits(teacher, TOKENS), rtol=1e-4, atol=1e-4)


def test_laco_adds_what_later_layers_differ_and_average_is_the_mean() -> None:
    teacher = TEACHERS["qwen3"]
    cut = whole(teacher.architecture)
    merged = replace(cut.layers[1], sources=(1, 2, 3))
    own = [layer_tensors(teacher, i) for i in (1, 2, 3)]
    for how, weights in (("laco", (-1.0, 1.0, 1.0)), ("average", (1 / 3,) * 3)):
        student = apply(teacher, replace(cut, layers=(cut.layers[0], merged), merge=how))  # type: ignore[arg-type]
        assert student.architecture.layers[1].sources == (1, 2, 3)
        for name, tensor in layer_tensors(student, 1).items():
            expected = sum(w * one[name] for w, one in zip(weights, own, strict=True))
            torch.testing.assert_close(tensor.detach(), expected)


@pytest.mark.parametrize(("how", "expected"), [("important", 2), ("average", None)])
def test_layers_that_share_compute_with_one_set_of_parameters(how: Any, expected: int | None) -> None:
    teacher = TEACHERS["llama"]
    cut = whole(teacher.architecture)
    layers = (cut.layers[0], replace(cut.layers[1], importance=0.1), replace(cut.layers[2], like=1, importance=0.2), cut.layers[3])
    student = apply(teacher, replace(cut, layers=layers, share=how))
    assert student.architecture.parameters_of == (0, 1, 1, 3)
    assert student.layers[1] is student.layers[2]
    a, b = layer_tensors(teacher, 1), layer_tensors(teacher, 2)
    for name, tensor in layer_tensors(student, 1).items():
        torch.testing.assert_close(tensor.detach(), b[name] if expected else (a[name] + b[name]) / 2)
    assert student.architecture.parameters() == teacher.architecture.parameters() - teacher.architecture.layer_parameters(2)
    assert torch.isfinite(logits(student, TOKENS)).all()


def test_a_teacher_that_shares_gives_each_layer_its_own() -> None:
    shared = random_decoder("llama", parameters_of=(0, 1, 1, 3))
    student = apply(shared, whole(shared.architecture))
    assert student.architecture.parameters_of == ()
    assert torch.equal(logits(student, TOKENS), logits(shared, TOKENS))


@st.composite
def cuts(draw: st.DrawFn, architecture: Architecture) -> Cut:
    """Any cut of a teacher of four layers: dropped, merged, shared, narrower in every way."""
    shape, each = architecture.layers[0], 2
    groups, heads, ffn = draw(st.integers(1, shape.kv_heads)), draw(st.integers(1, each)), draw(st.integers(1, shape.ffn))
    bounds = sorted(draw(st.sets(st.integers(0, 4), min_size=2, max_size=5)))
    layers: list[LayerCut] = []
    for first, last in pairwise(bounds):
        sources = tuple(range(first, last)) if draw(st.booleans()) else (first,)
        kept = tuple(sorted(draw(st.permutations(range(shape.kv_heads)))[:groups]))
        inside = tuple(g * each + h for g in kept for h in sorted(draw(st.permutations(range(each)))[:heads]))
        start = draw(st.integers(0, shape.ffn - ffn))
        layers.append(LayerCut(sources, kept, inside, tuple(range(start, start + ffn)), importance=draw(st.floats(0, 1))))
    if len(layers) > 1 and draw(st.booleans()):
        layers[-1] = replace(layers[0], sources=layers[-1].sources, like=0)
    hidden = tuple(sorted(draw(st.sets(st.integers(0, architecture.width - 1), min_size=1))))
    return Cut(
        tuple(layers), hidden, merge=draw(st.sampled_from(["laco", "average"])), share=draw(st.sampled_from(["important", "average"]))
    )


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(FAMILIES))
def test_every_cut_makes_a_decoder_that_runs(data: st.DataObject, family: str) -> None:
    teacher = TEACHERS[family]
    cut = data.draw(cuts(teacher.architecture))
    assert Cut.from_json(json.loads(json.dumps(cut.to_json()))) == cut
    student = apply(teacher, cut)
    assert student.architecture == student_architecture(teacher.architecture, cut)
    assert student.architecture.parameters() == sum(p.numel() for p in student.parameters())
    assert torch.isfinite(logits(student, TOKENS)).all()
    fresh = Decoder(student.architecture)
    assert {k: v.shape for k, v in tensors(student).items()} == {k: v.shape for k, v in tensors(fresh).items()}


def test_runs_are_read_as_they_are_written() -> None:
    assert runs((0, 1, 2, 5, 7, 8)) == "0-2 5 7-8"
    assert numbers("0-2 5 7-8") == (0, 1, 2, 5, 7, 8)
    assert numbers(runs(())) == ()


WHOLE = whole(random_architecture())


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (replace(WHOLE, layers=()), "at least one layer"),
        (replace(WHOLE, hidden=()), "none of the dimensions"),
        (replace(WHOLE, hidden=(1, 0)), "ascending"),
        (replace(WHOLE, hidden=(64,)), "below 64"),
        (replace(WHOLE, layers=WHOLE.layers[::-1]), "order the layers"),
        (replace(WHOLE, layers=(replace(WHOLE.layers[0], sources=(4,)),)), "below 4"),
        (changed(WHOLE, channels=(96,)), "below 96"),
        (changed(WHOLE, channels=()), "none of the feed-forward channels"),
        (changed(WHOLE, heads=(0, 1, 2)), "same number of query heads"),
        (changed(WHOLE, groups=(0, 1), heads=(0, 4)), "same number of query heads"),
        (replace(WHOLE, layers=(replace(WHOLE.layers[0], like=0),)), "name an earlier layer"),
        (replace(WHOLE, layers=(WHOLE.layers[0], replace(WHOLE.layers[1], like=0, channels=(0,)))), "keep different parts"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(cut: Cut, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        apply(TEACHERS["llama"], cut)


@pytest.mark.parametrize("change", [{"layers": 3}, {"merge": "glue"}, {"hidden": "a-b"}, {"chosen": {"name": "x"}}])
def test_json_of_something_else_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="plan it again"):
        Cut.from_json({**WHOLE.to_json(), **change})
    with pytest.raises(OptionError, match="plan it again"):
        Cut.from_json({})
