"""Whole models in INT4: bytes are what the model computes with, GPTQ costs less than rounding, and more bits go where they count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edge_rt_distill.model.architecture import Architecture, LayerShape
from edge_rt_distill.model.decoder import LINEARS, Decoder
from edge_rt_distill.model.load import frozen, tensors
from edge_rt_distill.quantise.formats import FORMATS
from edge_rt_distill.quantise.gptq import GptqOptions, error, gptq
from edge_rt_distill.quantise.matrices import Aim, QuantiseOptions, decode, encode, quantise_model
from edge_rt_distill.quantise.statistics import First, Moments, counted
from torch import Tensor

from edge_rt.hooks import DataError, OptionError

SHAPE = Architecture("llama", 96, 64, 16, (LayerShape(4, 2, 96),) * 2, True, 1e-5, 1e4, "interleaved", 64)

QUICK = GptqOptions(tried=2, sweeps=1)


def _tokens(seed: int, count: int = 24) -> list[list[int]]:
    """Sequences in which some tokens are much more frequent than others."""
    draw = torch.Generator().manual_seed(seed)
    found: list[list[int]] = (96 * torch.rand(count, 32, generator=draw) ** 3).long().tolist()
    return found


@pytest.fixture(scope="module")
def model() -> Decoder:
    model, draw = Decoder(SHAPE), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, one in tensors(model).items():
            if one.ndim == 2:
                size = 2.0 if name.startswith("blk.") else 1.0
                one.copy_(torch.randn(one.shape, generator=draw) * size / one.shape[1] ** 0.5)
            else:
                one.mul_(torch.rand(one.shape, generator=draw).square() * 2)
    return frozen(model)


@torch.no_grad()
def _log_p(model: Decoder, sequences: list[list[int]]) -> Tensor:
    return model.logits(model(torch.tensor(sequences)).hidden).log_softmax(-1)


def _divergence(student: Decoder, model: Decoder, sequences: list[list[int]]) -> float:
    p, q = _log_p(model, sequences), _log_p(student, sequences)
    return float((p.exp() * (p - q)).sum(-1)[:, 1:].mean())


def test_the_head_is_rounded_for_what_goes_into_it_and_comes_first(model: Decoder) -> None:
    calibration = _tokens(0, 4)
    found = quantise_model(model, calibration, QuantiseOptions(head="Q4_0", gptq=QUICK))
    name = "token_embd.weight" if model.architecture.tied else "output.weight"
    assert set(found.tensors) == {name, *(f"{site}.weight" for site in model.sites())}
    assert torch.equal(decode(found.tensors[name]), found.model.head_weight)
    with torch.no_grad():
        x = model(torch.tensor(calibration)).hidden.flatten(0, 1)
    hessian = x.T @ x
    rounded = decode(encode(model.head_weight, "Q4_0"))
    assert error(model.head_weight, found.model.head_weight, hessian) < 0.8 * error(model.head_weight, rounded, hessian)
    for kept in ("Q8_0", "F16"):
        assert name not in quantise_model(model, calibration, QuantiseOptions(head=kept, gptq=QUICK)).tensors


@pytest.mark.parametrize("options", [
    QuantiseOptions(method="plain", type="Q8_0"), QuantiseOptions(method="importance", type="Q4_1"),
    QuantiseOptions(type="Q4_0", types={"ffn_down": "Q5_0", "blk.1.attn_v": "Q8_0", "blk.1.attn_k": "F16"}, gptq=QUICK),
])  # fmt: skip
def test_the_model_that_comes_back_computes_with_what_its_bytes_decode_to(model: Decoder, options: QuantiseOptions) -> None:
    told: list[tuple[int, int]] = []
    before = {name: one.clone() for name, one in tensors(model).items()}
    found = quantise_model(model, _tokens(0, 4), options, lambda *step: told.append(step))
    assert told == [(1, 2), (2, 2)]
    assert sorted(found.tensors) == sorted(f"{site}.weight" for site in model.sites())
    for site in model.sites():
        one = found.tensors[f"{site}.weight"]
        assert one.type == options.type_of(site)
        assert torch.equal(decode(one), found.model.linear(site).weight), site
    for name, one in tensors(model).items():
        assert torch.equal(one, before[name])
        if f"{name}" not in found.tensors:
            assert torch.equal(tensors(found.model)[name], one)
    again = quantise_model(model, _tokens(0, 4), options)
    assert all(np.array_equal(again.tensors[name].data, one.data) for name, one in found.tensors.items())


@pytest.mark.parametrize("aim", ["weights", "outputs", "residual"])
def test_gptq_costs_less_divergence_than_rounding_by_importance_on_other_text(model: Decoder, aim: Aim) -> None:
    calibration, other = _tokens(0), _tokens(1)
    weighted = _divergence(quantise_model(model, calibration, QuantiseOptions(method="importance")).model, model, other)
    found = _divergence(quantise_model(model, calibration, QuantiseOptions(aim=aim, gptq=QUICK)).model, model, other)
    assert found < 0.85 * weighted


def test_what_a_disturbed_input_lacks_is_made_good(model: Decoder) -> None:
    """With a first layer that is spoilt, later layers bring the stream back towards the float model's if they are told to."""
    calibration = _tokens(0, 64)
    types = dict.fromkeys(LINEARS, "Q8_0") | {f"blk.0.{name}": "Q4_0" for name in LINEARS}
    found = {
        aim: _divergence(quantise_model(model, calibration, QuantiseOptions(types=types, aim=aim, gptq=QUICK)).model, model, _tokens(2))
        for aim in ("weights", "residual")
    }
    assert found["residual"] < 0.9 * found["weights"]


def test_errors_are_not_moved_to_where_only_a_massive_first_position_sees_them() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, 16, generator=draw) @ torch.randn(16, 64, generator=draw)
    x[..., :8] *= 0.05
    x[:, 0, :8] = 1000 * (1 + torch.rand(8, generator=draw))
    w = torch.randn(32, 64, generator=draw)
    lost: dict[First, float] = {}
    firsts: tuple[First, ...] = ("leave", "cap", "keep")
    for first in firsts:
        moments = Moments(hessian=True)
        moments.add(counted(x, torch.ones(8, 64, dtype=torch.bool), first)[0])
        e = gptq(w, moments.hessian(), FORMATS["Q4_0"]).values() - w
        lost[first] = float((x[0, 0] @ e.T).norm() / (x[0, 0] @ w.T).norm())
    assert lost["cap"] < 0.5 * lost["leave"]
    assert lost["keep"] < 0.5 * lost["leave"]


def test_bad_input_is_said(model: Decoder) -> None:
    with pytest.raises(DataError, match="no tokens"):
        quantise_model(model, [], QuantiseOptions())
    with pytest.raises(OptionError, match="there is no type Q9"):
        quantise_model(model, _tokens(0, 1), QuantiseOptions(type="Q9"))
    with pytest.raises(OptionError, match="choose another type"):
        quantise_model(model, _tokens(0, 1), QuantiseOptions(type="Q4_K"))
