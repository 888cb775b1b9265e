"""Training on a grid: what is computed with is what the exported bytes decode to, and training lowers the loss that rounding costs."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from edge_rt_distill.model.architecture import Architecture, LayerShape
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.load import tensors
from edge_rt_distill.quantise.formats import FORMATS
from edge_rt_distill.quantise.matrices import QuantiseOptions, materialised, quantise_model
from edge_rt_distill.quantise.qat import OnGrid, Scales, attach, detach
from torch import Tensor
from torch.nn.utils import parametrize

from edge_rt.hooks import OptionError

SCALES: tuple[Scales, ...] = ("recomputed", "learnt", "fixed")
SHAPE = Architecture("llama", 48, 32, 8, (LayerShape(4, 2, 64),) * 2, True, 1e-5, 1e4, "interleaved", 64)
STEPS = 15
TOKENS = torch.randint(48, (6, 16), generator=torch.Generator().manual_seed(0))


def _model() -> Decoder:
    """Weights of a size that gives logits something to say."""
    model, draw = Decoder(SHAPE), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, one in tensors(model).items():
            if one.ndim == 2:
                size = 2.0 if name.startswith("blk.") else 1.0
                one.copy_(torch.randn(one.shape, generator=draw) * size / one.shape[1] ** 0.5)
    return model


def _divergence(model: Decoder, teacher: Decoder) -> Tensor:
    with torch.no_grad():
        p = teacher.logits(teacher(TOKENS).hidden).log_softmax(-1)
    q = model.logits(model(TOKENS).hidden).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize(("name", "scales"), [*(("Q4_0", one) for one in SCALES), ("Q4_1", "learnt"), ("IQ4_NL", "recomputed")])
def test_after_training_the_bytes_decode_to_exactly_what_it_computed_with(name: str, scales: Scales) -> None:
    model, teacher = _model(), _model().requires_grad_(False)
    learnt = attach(model, name, scales=scales)
    assert bool(learnt) == (scales == "learnt")
    optimiser = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.0}])
    before = float(_divergence(model, teacher).detach())
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
        optimiser.zero_grad()
        _divergence(model, teacher).backward()
        optimiser.step()
    after = float(_divergence(model, teacher).detach())
    assert after < 0.9 * before
    used = {site: model.linear(site).weight.detach().clone() for site in model.sites()}
    encoded = detach(model)
    assert sorted(encoded) == sorted(f"{site}.weight" for site in model.sites())
    for site, weight in used.items():
        raw = encoded[f"{site}.weight"]
        decoded = gguf.quants.dequantize(raw.data, gguf.GGMLQuantizationType[name]).astype(np.float32)
        assert np.array_equal(decoded.view(np.uint32), weight.numpy().view(np.uint32)), site
        assert torch.equal(model.linear(site).weight, weight)
        assert not parametrize.is_parametrized(model.linear(site))
    assert float(_divergence(model, teacher).detach()) == after


def test_a_start_from_gptq_computes_with_its_bytes_and_keeps_its_scales() -> None:
    model = _model()
    found = quantise_model(model, TOKENS.tolist(), QuantiseOptions(type="Q4_0"))
    attach(model, "Q4_0", scales="learnt", start=found.tensors)
    for site in model.sites():
        assert torch.equal(model.linear(site).weight, found.model.linear(site).weight), site
    again = detach(model)
    for name, one in found.tensors.items():
        assert np.array_equal(again[name].data, one.data), name


def test_the_gradients_of_learnt_scales_are_those_of_their_definition() -> None:
    """With codes held, the loss is smooth in scale and minimum: its slope is the levels' and one, made smaller by LSQ's factor."""
    format = FORMATS["Q4_1"]
    weight = torch.nn.Parameter(torch.randn(2, 64, generator=torch.Generator().manual_seed(1)))
    grid = OnGrid(format, weight.detach(), "learnt")
    assert grid.scale is not None
    assert grid.minimum is not None
    with torch.no_grad():
        weight[0, 5] = 40.0
    pull = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    (grid(weight) * pull).sum().backward()
    blocks, factor = grid.blocks(weight.detach()), (32 * 15) ** -0.5
    place = (weight.detach().view(-1, 32) - grid.minimum.detach()) / grid.scale.detach()
    inside = (place >= -0.5) & (place <= 15.5)
    assert int((~inside).sum()) >= 1
    codes = blocks.codes.float().view(-1, 32)
    expected = (pull.view(-1, 32) * torch.where(inside, codes - place, codes)).sum(1, keepdim=True) * factor
    torch.testing.assert_close(grid.scale.grad, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(grid.minimum.grad, (pull.view(-1, 32) * ~inside).sum(1, keepdim=True) * factor)
    torch.testing.assert_close(weight.grad, pull * inside.view(2, 64))


def test_a_grid_stands_on_other_parametrisations_and_is_folded_with_them() -> None:
    class Halved(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model = _model()
    linear = model.linear("blk.0.ffn_up")
    plain = linear.weight.detach().clone()
    parametrize.register_parametrization(linear, "weight", Halved())
    attach(model, {"blk.0.ffn_up": "Q8_0"})
    used = linear.weight.detach().clone()
    assert torch.equal(materialised(model).linear("blk.0.ffn_up").weight, used)
    encoded = detach(model)
    assert list(encoded) == ["blk.0.ffn_up.weight"]
    assert torch.equal(linear.weight, used)
    assert float((used - plain / 2).abs().max()) < 1e-2


def test_what_does_not_fit_is_said() -> None:
    model = _model()
    with pytest.raises(OptionError, match="choose one of Q4_0"):
        attach(model, "Q6_K")
    found = quantise_model(model, TOKENS.tolist(), QuantiseOptions(type="Q4_1"))
    with pytest.raises(OptionError, match="use one type"):
        attach(model, "Q4_0", start=found.tensors)
    attach(model, {"blk.1.attn_q": "Q4_0"})
    with pytest.raises(OptionError, match="detach it first"):
        attach(model, {"blk.1.attn_q": "Q4_0"})
