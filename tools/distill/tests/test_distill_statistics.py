"""Statistics of a layer's inputs: what a whole forward pass shows, in bounded memory, the first position left out or capped."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from edge_rt_distill.model.decoder import LINEARS
from edge_rt_distill.quantise.statistics import CAP, SiteStatistics, counted, layers
from edge_rt_distill.quantise.walk import Stream, walk
from torch import Tensor, nn

from edge_rt.hooks import DataError, OptionError

WIDTH, FFN = 8, 12


class Block(nn.Module):
    """A layer with the names of a decoder's matrices, and a mix over earlier positions that stands for attention."""

    def __init__(self) -> None:
        super().__init__()
        for name in LINEARS:
            shape = {"ffn_gate": (WIDTH, FFN), "ffn_up": (WIDTH, FFN), "ffn_down": (FFN, WIDTH)}.get(name, (WIDTH, WIDTH))
            setattr(self, name, nn.Linear(*shape, bias=False))

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        q, k, v = self.attn_q(x), self.attn_k(x), self.attn_v(x)
        mean = (torch.sigmoid(q) * k + v).cumsum(1) / steps
        x = x + self.attn_output(mean)
        return x + self.ffn_down(torch.relu(self.ffn_gate(x)) * self.ffn_up(x))


class Net(nn.Module):
    def __init__(self, depth: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.token_embd = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embd(tokens)
        steps = torch.arange(1, tokens.shape[1] + 1).view(1, -1, 1).float()
        for layer in self.layers:
            x = layer(x, steps)
        return x


SEQUENCES = [[int(t) for t in torch.randint(20, (n,), generator=torch.Generator().manual_seed(n))] for n in (9, 4, 7, 8, 3)]


def _inputs(net: Net, layer: int, name: str) -> Tensor:
    """Every vector but the first of each sequence that goes into a matrix, from whole passes over single sequences."""
    rows: list[Tensor] = []
    module = net.layers[layer].get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0][0, 1:]))
    with torch.no_grad():
        for sequence in SEQUENCES:
            net(torch.tensor([sequence]))
    handle.remove()
    return torch.cat(rows)


def collect(net: Net, sequences: list[list[int]], sites: list[str] | None = None, **how: Any) -> dict[str, SiteStatistics]:
    """By site, of all layers."""
    return {f"blk.{layer}.{name}": one for layer, found in layers(net, sequences, sites, **how) for name, one in found.items()}


@pytest.mark.parametrize("batch_tokens", [1, 14, 4096])
def test_they_are_those_of_whole_passes_however_sequences_are_batched(batch_tokens: int) -> None:
    net = Net()
    found = collect(net, SEQUENCES, hessian=True, batch_tokens=batch_tokens)
    assert list(found) == [f"blk.{i}.{name}" for i in range(3) for name in LINEARS]
    for layer in range(3):
        for name in LINEARS:
            x, one = _inputs(net, layer, name), found[f"blk.{layer}.{name}"]
            assert one.count == len(x) == 26
            assert one.hessian is not None
            for got, want in ((one.mean, x.mean(0)), (one.square, x.square().mean(0)), (one.hessian, x.T @ x / len(x))):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_matrices_that_share_an_input_share_what_is_known_of_it() -> None:
    found = collect(Net(), SEQUENCES, hessian=True)
    assert found["blk.1.attn_q"] is found["blk.1.attn_v"]
    assert found["blk.1.ffn_gate"] is found["blk.1.ffn_up"]
    assert found["blk.1.ffn_gate"] is not found["blk.1.ffn_down"]


def test_a_sample_is_of_the_same_positions_at_every_site_and_seeded() -> None:
    net = Net()
    found = collect(net, SEQUENCES, hessian=False, sample=10, seed=3, batch_tokens=14)
    whole = {name: _inputs(net, 0, name) for name in ("attn_output", "ffn_down")}
    places: list[list[int]] = []
    for name, rows in whole.items():
        sample = found[f"blk.0.{name}"].sample
        nearest = (sample.unsqueeze(1) - rows).norm(dim=-1).min(1)
        assert len(sample) == 10
        assert float(nearest.values.max()) < 1e-5
        places.append(nearest.indices.tolist())
    assert places[0] == places[1] == sorted(set(places[0]))
    again = collect(net, SEQUENCES, hessian=False, sample=10, seed=3, batch_tokens=14)
    other = collect(net, SEQUENCES, hessian=False, sample=10, seed=4, batch_tokens=14)
    assert torch.equal(found["blk.2.ffn_up"].sample, again["blk.2.ffn_up"].sample)
    assert not torch.equal(found["blk.2.ffn_up"].sample, other["blk.2.ffn_up"].sample)


def test_only_what_is_wanted_is_looked_at() -> None:
    wanted = ["blk.0.attn_k", "blk.0.attn_v", "blk.2.ffn_down"]
    whole, some = collect(Net(), SEQUENCES, hessian=True, sample=5), collect(Net(), SEQUENCES, wanted, hessian=False, sample=5)
    assert list(some) == wanted
    for site in wanted:
        assert some[site].hessian is None
        for part in ("count", "mean", "square", "sample"):
            assert torch.equal(torch.as_tensor(getattr(whole[site], part)), torch.as_tensor(getattr(some[site], part))), (site, part)


def test_what_is_not_finite_is_said() -> None:
    broken = Net()
    with torch.no_grad():
        broken.layers[1].get_submodule("attn_q").get_parameter("weight").fill_(float("inf"))
    with pytest.raises(DataError, match="not finite"):
        collect(broken, SEQUENCES, hessian=False)


@pytest.mark.parametrize("sequences", [[], [[]], [[3], [5]]])
def test_too_little_text_is_said(sequences: list[list[int]]) -> None:
    with pytest.raises(DataError, match="give"):
        collect(Net(), sequences, hessian=True)


def test_a_massive_vector_is_left_out_shortened_or_kept() -> None:
    x = torch.ones(2, 6, 4)
    x[0, 0] = 500.0
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    assert counted(x, real, "leave")[0].shape == (8, 4)
    assert float(counted(x, real, "leave")[0].max()) == 1.0
    assert float(counted(x, real, "keep")[0].max()) == 500.0
    capped, same = counted(x, real, "cap", 2 * x)
    assert torch.equal(same, 2 * capped)
    assert capped.shape == (10, 4)
    assert float(capped.max()) == pytest.approx(CAP)
    assert torch.equal(capped[1:], torch.ones(9, 4))


def _keep(seen: dict[str, Tensor], name: str, _: int, value: Tensor) -> None:
    seen[name] = value


def test_a_walk_shows_what_was_changed_to_the_layers_behind_it() -> None:
    teacher, student = Net(), Net()
    for step in walk(teacher, student, SEQUENCES[:1]):
        seen: dict[str, Tensor] = {}
        step.student.look({"attn_output": partial(_keep, seen, "in")}, {"attn_output": partial(_keep, seen, "out")})
        weight = student.layers[step.layer].get_submodule("attn_output").get_parameter("weight")
        torch.testing.assert_close(seen["out"], seen["in"] @ weight.T)
        with torch.no_grad():
            weight.mul_(0.5)
    whole = teacher(torch.tensor(SEQUENCES[:1])), student(torch.tensor(SEQUENCES[:1]))
    assert step.layer == 2
    torch.testing.assert_close(step.teacher.batches[0].hidden, whole[0])
    torch.testing.assert_close(step.student.batches[0].hidden, whole[1])
    assert not torch.allclose(*whole)


def test_a_look_runs_no_further_than_it_must_and_leaves_no_hook() -> None:
    net = Net()
    later: list[str] = []
    net.layers[0].get_submodule("ffn_down").register_forward_pre_hook(lambda *_: later.append("ffn_down"))
    stream = Stream(net, SEQUENCES)
    stream.look({"attn_output": lambda *_: None})
    assert later == []
    stream.look({"ffn_down": lambda *_: None})
    assert len(later) == len(stream.batches)
    assert not net.layers[0].get_submodule("attn_output")._forward_pre_hooks
    assert not net.layers[0]._forward_pre_hooks


def test_models_of_different_depth_do_not_walk_together() -> None:
    with pytest.raises(OptionError, match="equal depths can"):
        next(walk(Net(), Net(2), SEQUENCES))
