"""Richer forms of a matrix for training, folded exactly into one matrix for export.

All are parametrisations of ``Linear.weight`` (``torch.nn.utils.parametrize``): whoever reads ``.weight`` sees the sum, and export too. Each
starts as exactly the weight that it was attached to. While training, ``torch.nn.utils.parametrize.cached()`` around a step computes each
weight once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edge_rt.hooks import OptionError
from edge_rt_distill.model.decoder import LINEARS, Decoder

Kind = Literal["low_rank", "branches", "factors"]


@dataclass(frozen=True)
class Form:
    """A form of matrices. ``sites``: their names in a layer; ``layers``: which, None for all.

    ``low_rank``: a side path of ``rank`` beside the weight. ``branches``: ``number`` parallel matrices of full size, each row with a scale
    that is learnt. ``factors``: square matrices of the weight's sizes in front of and behind it. ``train_base``: the weight itself learns
    too (without it only the low-rank path does, as LoRA has it). ``seed``: of what starts at random.
    """

    kind: Kind = "low_rank"
    sites: tuple[str, ...] = LINEARS
    layers: tuple[int, ...] | None = None
    rank: int = 16
    number: int = 2
    train_base: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"{self.kind!r} is no form of a matrix; choose one of {', '.join(KINDS)}")
        unknown = sorted(set(self.sites) - set(LINEARS))
        if unknown:
            raise OptionError(f"a layer has no matrix {unknown[0]!r}; choose of {', '.join(LINEARS)}")
        if self.rank < 1 or self.number < 1:
            raise OptionError(f"rank is {self.rank} and number {self.number}; give whole numbers from 1")


class Extra(nn.Module):
    """Base of the forms here: it remembers whether the weight learnt before."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.learnt_before = weight.requires_grad

    def forward(self, weight: Tensor) -> Tensor:
        """The weight [out, in] that is computed with."""
        raise NotImplementedError


class LowRank(Extra):
    """W + B A (LoRA, Hu et al. 2021, arXiv:2106.09685): A [r, in] random, B [out, r] nothing at first."""

    def __init__(self, weight: Tensor, form: Form, generator: torch.Generator) -> None:
        super().__init__(weight)
        rows, columns = weight.shape
        rank = min(form.rank, rows, columns)
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its side path."""
        return weight + self.b @ self.a


class Branches(Extra):
    """W + sum of diag(g) U over parallel branches, as RepVGG's fold after training (Ding et al. 2021, arXiv:2101.03697).

    U [n, out, in] starts at random with the weight's size, its scales g [n, out] at nothing.
    """

    def __init__(self, weight: Tensor, form: Form, generator: torch.Generator) -> None:
        super().__init__(weight)
        size = float(weight.detach().pow(2).mean().sqrt())
        self.u = nn.Parameter(torch.randn(form.number, *weight.shape, generator=generator) * size)
        self.g = nn.Parameter(torch.zeros(form.number, weight.shape[0]))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its branches."""
        return weight + (self.g[:, :, None] * self.u).sum(0)


class Factors(Extra):
    """(I + L) W (I + R): a product in place of a matrix (ExpandNets, Guo et al. 2018, arXiv:1811.10495), L [out, out] and R [in, in] zero.

    It computes the same functions and is trained along other paths: steps are preconditioned by what was learnt before
    (Arora et al. 2018, arXiv:1802.06509).
    """

    def __init__(self, weight: Tensor, form: Form, generator: torch.Generator) -> None:
        super().__init__(weight)
        rows, columns = weight.shape
        self.left, self.right = nn.Parameter(torch.zeros(rows, rows)), nn.Parameter(torch.zeros(columns, columns))

    def forward(self, weight: Tensor) -> Tensor:
        """The product."""
        weight = weight + self.left @ weight
        return weight + weight @ self.right


KINDS: Mapping[str, type[LowRank] | type[Branches] | type[Factors]] = {"low_rank": LowRank, "branches": Branches, "factors": Factors}


def attach(model: Decoder, form: Form) -> list[str]:
    """Give matrices a form; the sites that have it now. Logits are the same bit by bit until something is trained.

    Raises OptionError for layers that do not exist, and for matrices that have a form already.
    """
    count = len(model.architecture.layers)
    wrong = [i for i in form.layers or () if not 0 <= i < count]
    if wrong:
        raise OptionError(f"the student has no layer {wrong[0]}; name layers from 0 to {count - 1}")
    layers = range(count) if form.layers is None else {model.architecture.owner(i) for i in form.layers}
    sites = [site for site in model.sites() if int(site.split(".")[1]) in layers and site.split(".")[2] in form.sites]
    taken = [site for site in sites if parametrize.is_parametrized(model.linear(site), "weight")]
    if taken:
        raise OptionError(f"{taken[0]} is parametrised already; fold it first")
    generator = torch.Generator().manual_seed(form.seed)
    for site in sites:
        linear = model.linear(site)
        extra = KINDS[form.kind](linear.weight, form, generator).to(linear.weight.device)
        linear.weight.requires_grad_(form.train_base)
        parametrize.register_parametrization(linear, "weight", extra)
    return sites


def fold(model: Decoder) -> list[str]:
    """Make every form one plain matrix again, with the weight that it computed with; the sites that were folded.

    Raises OptionError where something else (quantisation-aware training, say) was put on top.
    """
    folded = []
    for site in model.sites():
        linear = model.linear(site)
        if not parametrize.is_parametrized(linear, "weight"):
            continue
        forms = list(linear.parametrizations["weight"])  # type: ignore[index]
        extras = [one for one in forms if isinstance(one, Extra)]
        if not extras:
            continue
        if len(extras) < len(forms):
            raise OptionError(f"{site} has another parametrisation on top of its form; remove that first, or fold before it is attached")
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
        linear.weight.requires_grad_(extras[0].learnt_before)
        folded.append(site)
    return folded
