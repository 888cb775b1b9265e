"""Forms of matrices: nothing changes when they are attached, and nothing when they are folded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edge_rt_distill.model.decoder import LINEARS
from edge_rt_distill.model.load import tensors
from edge_rt_distill.surgery.reparam import Form, attach, fold
from surgery_models import logits, random_decoder, random_tokens
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edge_rt.hooks import OptionError

KINDS = ("low_rank", "branches", "factors")
TOKENS = random_tokens(2, 9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_attaching_and_folding_change_no_logit(family: str, kind: Any) -> None:
    model = random_decoder(family).requires_grad_(True)
    before = logits(model, TOKENS)
    names = list(tensors(model))
    sites = attach(model, Form(kind, rank=4))
    assert sites == model.sites()
    assert torch.equal(logits(model, TOKENS), before)

    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model.logits(model(TOKENS).hidden).flatten(0, 1), TOKENS.flatten()).backward()
        optimiser.step()
    extras = [p for name, p in model.named_parameters() if "parametrizations" in name and not name.endswith("original")]
    assert extras
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in extras)
    trained = logits(model, TOKENS)
    assert not torch.allclose(trained, before, atol=1e-3)

    assert fold(model) == sites
    assert torch.equal(logits(model, TOKENS), trained)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert list(tensors(model)) == names  # what export reads
    assert {name.rsplit(".", 1)[1] for name, _ in model.named_parameters()} <= {"weight", "bias"}
    assert all(p.requires_grad for p in model.parameters())
    assert fold(model) == []


def test_a_form_is_for_some_matrices_of_some_layers() -> None:
    model = random_decoder()
    assert attach(model, Form(sites=("attn_q", "ffn_down"), layers=(1, 3))) == [
        "blk.1.attn_q",
        "blk.1.ffn_down",
        "blk.3.attn_q",
        "blk.3.ffn_down",
    ]
    assert not parametrize.is_parametrized(model.linear("blk.1.attn_k"))
    fold(model)
    assert not model.linear("blk.1.attn_q").weight.requires_grad  # as it was before


def test_shared_layers_get_one_form() -> None:
    model = random_decoder(parameters_of=(0, 1, 1, 3)).requires_grad_(True)
    sites = attach(model, Form("branches", layers=(1, 2)))
    assert sites == [f"blk.1.{name}" for name in LINEARS]
    with torch.no_grad():
        model.linear("blk.2.attn_q").parametrizations.weight[0].g.fill_(0.5)  # type: ignore[union-attr]
    before = logits(model, TOKENS)
    fold(model)
    assert torch.equal(logits(model, TOKENS), before)


def test_the_weight_itself_can_stay_as_it_is() -> None:
    model = random_decoder().requires_grad_(True)
    attach(model, Form(train_base=False))
    learns = [name for name, p in model.named_parameters() if p.requires_grad and "layers" in name and "norm" not in name]
    assert learns
    assert all(name.endswith((".a", ".b")) for name in learns)
    fold(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_seed_gives_the_same_form_again() -> None:
    first, second = random_decoder(), random_decoder()
    for model in (first, second):
        attach(model, Form("branches", seed=3))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


class Doubled(nn.Module):
    """A parametrisation of somebody else."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_what_cannot_be_is_refused() -> None:
    for wrong, said in (
        ({"kind": "tower"}, "no form"),
        ({"sites": ("attn",)}, "no matrix"),
        ({"rank": 0}, "from 1"),
        ({"number": 0}, "from 1"),
    ):
        with pytest.raises(OptionError, match=said):
            Form(**wrong)  # type: ignore[arg-type]
    model = random_decoder()
    with pytest.raises(OptionError, match="no layer 4"):
        attach(model, Form(layers=(4,)))
    attach(model, Form(layers=(0,), sites=("attn_q",)))
    with pytest.raises(OptionError, match="fold it first"):
        attach(model, Form())
    parametrize.register_parametrization(model.linear("blk.0.attn_q"), "weight", Doubled())
    with pytest.raises(OptionError, match="on top"):
        fold(model)
    other = random_decoder()
    parametrize.register_parametrization(other.linear("blk.0.attn_q"), "weight", Doubled())
    assert fold(other) == []  # not ours to fold
    assert parametrize.is_parametrized(other.linear("blk.0.attn_q"))
