"""Training that knows of its quantisation: what is computed with is what the exported bytes decode to, gradients pass to the weights below.

A parametrisation of a matrix' weight. Codes are rounded to the nearest level with a straight-through estimator (Bengio et al. 2013,
arXiv:1308.3432); scales are recomputed from the weights at every step, or learnt as LSQ does (Esser et al. 2019, arXiv:1902.08153), and
are float16's values in either case, as the file has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edge_rt.hooks import OptionError
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.quantise.formats import BLOCK, Blocks, Format, check, format_named, half, level, nearest, search, unpack
from edge_rt_distill.quantise.matrices import Encoded

Scales = Literal["recomputed", "learnt", "fixed"]
"""Found again from the weights at each step; trained along with them; as they were at the start (what GPTQ chose)."""


class _Through(torch.autograd.Function):
    """Values of a grid in place of weights; the gradient goes to weights within the grid's range, and to what the grid is made of."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, scale: Tensor, minimum: Tensor, format: Format) -> Tensor:
        """Blocks [n, 32], scale and minimum [n, 1] (float16's values)."""
        index = nearest(format, blocks, scale, minimum)
        lvl = level(format, index)
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        place = (blocks - minimum) / safe
        inside = (place >= format.levels[0] - 0.5) & (place <= format.levels[-1] + 0.5) & (scale != 0)
        ctx.save_for_backward(inside, torch.where(inside, lvl - place, lvl))
        ctx.steps = (BLOCK * max(abs(format.levels[0]), abs(format.levels[-1]))) ** -0.5
        values: Tensor = lvl * scale
        return values + minimum if format.shifted else values  # 0.0 added to -0.0 would be other bits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """LSQ's gradients: of the scale code - place inside the range and the level beyond, made smaller by 1 / sqrt(n levels)."""
        (gradient,) = gradients
        inside, by_scale = ctx.saved_tensors
        to_scale = (gradient * by_scale).sum(-1, keepdim=True) * ctx.steps
        to_minimum = (gradient * ~inside).sum(-1, keepdim=True) * ctx.steps
        return gradient * inside, to_scale, to_minimum, None


class _Half(torch.autograd.Function):
    """Rounded to float16's values, the gradient as if it were not."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return half(values)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class OnGrid(nn.Module):
    """A weight [out, in] as a block format holds it."""

    scale: Tensor | None
    minimum: Tensor | None

    def __init__(
        self, format: Format, weight: Tensor, scales: Scales = "recomputed", importance: Tensor | None = None, start: Blocks | None = None
    ) -> None:
        """``importance`` [in] weighs the error scales are found by. ``start``: blocks with scales to begin with, else they are searched."""
        super().__init__()
        check(format, weight)
        self.format, self.kind = format, scales
        self.register_buffer("importance", torch.ones(weight.shape[1]) if importance is None else importance.float())
        self.scale = self.minimum = None
        if scales != "recomputed":
            start = start or search(format, weight.detach(), self._importance())
            learns = scales == "learnt"
            self.scale = nn.Parameter(start.scales.reshape(-1, 1).clone(), requires_grad=learns)
            self.minimum = nn.Parameter(start.minima.reshape(-1, 1).clone(), requires_grad=learns and format.shifted)

    def _importance(self) -> Tensor:
        return cast("Tensor", self.importance)

    def forward(self, weight: Tensor) -> Tensor:
        """What the exported bytes will decode to."""
        scale, minimum = self._grid(weight)
        found: Tensor = _Through.apply(weight.reshape(-1, BLOCK), scale, minimum, self.format)  # type: ignore[no-untyped-call,unused-ignore]
        return found.view(weight.shape)

    def _grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and minima [blocks, 1]."""
        if self.scale is None or self.minimum is None:
            with torch.no_grad():
                found = search(self.format, weight, self._importance(), _FEW)
            return found.scales.view(-1, 1), found.minima.view(-1, 1)
        scale: Tensor = _Half.apply(self.scale)  # type: ignore[no-untyped-call,unused-ignore]
        minimum: Tensor = _Half.apply(self.minimum)  # type: ignore[no-untyped-call,unused-ignore]
        return scale, minimum

    @torch.no_grad()
    def blocks(self, weight: Tensor) -> Blocks:
        """The blocks of which ``forward`` gives the values, for the weight below the parametrisation."""
        scale, minimum = self._grid(weight)
        codes = nearest(self.format, weight.reshape(-1, BLOCK), scale, minimum).to(torch.uint8)
        return Blocks(self.format, codes.view(weight.shape), scale.view(len(weight), -1), minimum.view(len(weight), -1))


_FEW = (0.88, 0.94, 1.0)
"""Ranges that are tried where scales are found at every step."""


def attach(
    model: Decoder, types: dict[str, str] | str, *, scales: Scales = "recomputed", importance: dict[str, Tensor] | None = None,
    start: dict[str, Encoded] | None = None,
) -> list[nn.Parameter]:  # fmt: skip
    """Put every matrix of ``types`` (sites -> formats, or one format for all) on its grid; returns the scales that learn.

    ``importance``: by site [in]. ``start``: bytes by GGUF name, as GPTQ gives them: their values become the weights to start from, their
    scales the first ones. Raises OptionError for types that are no block formats, or a matrix that is on a grid already.
    """
    wanted = dict.fromkeys(model.sites(), types) if isinstance(types, str) else types
    learnt: list[nn.Parameter] = []
    for site, name in wanted.items():
        linear, given = model.linear(site), (start or {}).get(f"{site}.weight")
        if parametrize.is_parametrized(linear, "weight") and any(isinstance(one, OnGrid) for one in _parametrisations(linear)):
            raise OptionError(f"{site} is on a grid already; detach it first")
        blocks = unpack(format_named(given.type), given.data) if given is not None else None
        if blocks is not None and given is not None and given.type != name:
            raise OptionError(f"{site} is to be {name} and the bytes to start from are {given.type}; use one type")
        grid = OnGrid(format_named(name), linear.weight.detach(), scales, (importance or {}).get(site), blocks)
        if blocks is not None:
            with torch.no_grad():
                linear.weight.copy_(blocks.values())
        parametrize.register_parametrization(linear, "weight", grid, unsafe=True)
        learnt += [one for one in grid.parameters() if one.requires_grad]
    return learnt


def _parametrisations(linear: nn.Linear) -> Iterable[nn.Module]:
    return cast("Iterable[nn.Module]", cast("nn.ModuleDict", linear.parametrizations)["weight"])


def detach(model: Decoder) -> dict[str, Encoded]:
    """Take all matrices off their grids: weights become what training computed with, and their bytes are returned by GGUF name.

    The bytes decode to exactly these weights. A grid must be the last parametrisation of its weight. Raises OptionError.
    """
    found: dict[str, Encoded] = {}
    for site in model.sites():
        linear = model.linear(site)
        if not parametrize.is_parametrized(linear, "weight"):
            continue
        *others, last = _parametrisations(linear)
        if not isinstance(last, OnGrid):
            continue
        with torch.no_grad():
            below = cast("Tensor", cast("Any", linear.parametrizations)["weight"].original)
            for one in others:
                below = one(below)
        blocks = last.blocks(below)
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
        if not torch.equal(linear.weight, blocks.values()):
            raise OptionError(
                f"what {site} was trained with is not what its bytes decode to; another parametrisation stands behind the grid"
            )
        found[f"{site}.weight"] = Encoded(blocks.format.name, blocks.pack())
    return found
