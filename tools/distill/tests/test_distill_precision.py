"""Products in bfloat16: near those in float32 in losses and gradients, and only where they are asked for."""

from __future__ import annotations

import pytest
import torch
from edge_rt_distill.losses.token import TokenOptions, token_logprobs, token_loss
from edge_rt_distill.model import precision
from edge_rt_distill.model.divergence import Final
from edge_rt_distill.model.load import load
from edge_rt_distill.model.precision import Head, best, computing_in
from edge_rt_distill.model.rows import TokenSequence, rows_of
from edge_rt_distill.stages.teachers import CachingTeacher

from edge_rt.hooks import cpu_processors


def loss_and_gradients(kind: precision.Precision, options: TokenOptions):
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64, requires_grad=True), (torch.randn(500, 64) / 4).requires_grad_(True)
    teacher = Final(hidden.detach() + 0.3 * torch.randn(40, 64), weight.detach().clone())
    with computing_in(kind):
        found = token_loss(hidden, weight, teacher, labels=torch.arange(40), prior=torch.full((500,), -6.2), options=options).loss
        chosen = token_logprobs(hidden, weight, torch.arange(40))
        (found + chosen.mean()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return found.detach(), chosen.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("options", [TokenOptions(), TokenOptions(head=8, cross_entropy=0.1), TokenOptions("reverse")])
def test_losses_in_bfloat16_are_near_those_in_float32(options):
    exact, rough = loss_and_gradients("float32", options), loss_and_gradients("bfloat16", options)
    assert torch.allclose(rough[0], exact[0], rtol=0.02)
    assert torch.allclose(rough[1], exact[1], atol=0.05)
    for one, other in zip(rough[2:], exact[2:], strict=True):
        assert one.dtype == torch.float32
        assert torch.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.999
        assert not torch.equal(one, other), "bfloat16 was not used at all"


def test_a_model_in_bfloat16_is_near_the_one_in_float32(tiny):
    model, tokens = load(tiny).model, torch.arange(24)[None]
    with torch.no_grad():
        exact = model(tokens, attention=(0, 1), states=(1,))
        with computing_in("bfloat16"):
            rough = model(tokens, attention=(0, 1), states=(1,))
        with computing_in("float32"):
            again = model(tokens, attention=(0, 1), states=(1,))
    assert torch.equal(again.hidden, exact.hidden)
    assert rough.hidden.dtype == rough.states[1].dtype == rough.attention[1].dtype == torch.float32
    assert 0 < float((rough.hidden - exact.hidden).abs().max()) < 0.05 * float(exact.hidden.abs().max())
    assert torch.allclose(rough.attention[1].sum(-1), torch.ones(1, 4, 24), atol=1e-5)


def test_a_head_is_converted_where_it_is_asked_for():
    weight = torch.randn(8, 4)
    assert Head.of(weight).weight is weight
    with computing_in("bfloat16"):
        assert Head.of(weight).weight.dtype == torch.bfloat16
        assert Head.of(weight).logits(torch.randn(2, 4)).dtype == torch.float32


CPUS = [(("avx512f", "avx512_bf16"), "bfloat16"), (("avx2",), "float32"), (("neon", "bf16"), "bfloat16")]


@pytest.mark.parametrize(("features", "expected"), CPUS)
def test_the_faster_one_is_found_by_the_cpu(monkeypatch, features, expected):
    processor = next(cpu_processors())._replace(features=features)
    monkeypatch.setattr(precision, "cpu_processors", lambda: iter([processor]))
    assert best() == expected
    monkeypatch.setattr(precision, "cpu_processors", lambda: iter([]))
    assert best() == "float32"


def test_a_teacher_whose_matrices_are_rounded_once_gives_the_same_bits(tiny):
    model, rows = load(tiny).model, rows_of([TokenSequence([3, 1, 4, 1, 5, 9], [True] * 6)])
    with torch.no_grad(), computing_in("bfloat16"):
        expected = model(rows.tokens).hidden
        found = CachingTeacher(model, kept_as=torch.float32).hidden(rows)
    assert torch.equal(found, expected)
    with torch.no_grad():
        exact = CachingTeacher(model, kept_as=torch.float32).hidden(rows)
        assert torch.equal(exact, model(rows.tokens).hidden)
    assert not torch.equal(found, exact)
