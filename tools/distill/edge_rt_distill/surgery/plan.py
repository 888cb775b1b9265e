"""From a diagnosis and a budget to a cut: the architecture with the least predicted loss that the budget allows.

The search is exhaustive over depth, heads and width; the feed-forward width then follows, as the largest that the budget leaves.
Sizes are the same in all layers, as GGUF's llama family wants them; which heads and channels stay differs from layer to layer. With
``widths`` free, channels are also spread over the layers by what they are worth there, which GGUF calls a deci.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from edge_rt.hooks import OptionError
from edge_rt_distill.model.architecture import Architecture, LayerShape
from edge_rt_distill.surgery.build import Sizes, build
from edge_rt_distill.surgery.cost import CostModel, cost_of, layer_cost, outer_cost
from edge_rt_distill.surgery.cut import Cost, Cut
from edge_rt_distill.surgery.evidence import Evidence
from edge_rt_distill.surgery.options import Budget, PlanOptions
from edge_rt_distill.surgery.outline import Outline, outlines
from edge_rt_distill.surgery.predict import Heads, Tables, choose_heads, tables

FINEST = 24
"""Sizes of one part that are compared: more would cost time and change little."""


class Found(NamedTuple):
    """A student that meets the budget."""

    sizes: Sizes
    losses: dict[str, float]

    @property
    def loss(self) -> float:
        """All of it."""
        return sum(self.losses.values())

    @property
    def parts(self) -> frozenset[str]:
        """What it cuts."""
        return frozenset(self.losses)


@dataclass(frozen=True)
class _Space:
    """The sizes that may be chosen, and what they cost."""

    architecture: Architecture
    shape: LayerShape
    limits: dict[str, float]
    model: CostModel
    tables: Tables
    depths: list[Outline]
    attention: list[tuple[int, int]]
    widths: list[int]
    ffns: list[int]
    free: bool

    def cost(self, outline: Outline, groups: int, heads: int, width: int, ffn: int) -> Cost:
        outer = outer_cost(self.architecture, self.model, width)
        layer = layer_cost(self.architecture, LayerShape(groups * heads, groups, ffn), self.model, width)
        count = len(outline.layers)
        return Cost(
            outer.parameters + (count - outline.shared) * layer.parameters,
            outer.bytes + count * layer.bytes,
            outer.time + count * layer.time,
        )

    def fits(self, cost: Cost) -> bool:
        return all(getattr(cost, name) <= limit for name, limit in self.limits.items())


def plan(diagnosis: Evidence, architecture: Architecture, budget: Budget, options: PlanOptions = PlanOptions()) -> Cut:  # noqa: B008 (frozen)
    """The cut with the least predicted loss. Raises OptionError for options that contradict, or a budget that cannot be met."""
    return candidates(diagnosis, architecture, budget, options, most=1)[0]


def candidates(diagnosis: Evidence, architecture: Architecture, budget: Budget, options: PlanOptions, *, most: int = 4) -> list[Cut]:
    """The best cut of each combination of parts (only channels, layers and channels, ...), least predicted loss first.

    ``probe.select`` measures them and takes the one that is best indeed. Raises as ``plan``.
    """
    space = _space(diagnosis, architecture, budget, options)
    combinations: dict[frozenset[str], Found] = {}
    for found in _search(space, diagnosis):
        before = combinations.get(found.parts)
        if before is None or (found.loss, -sum(found.sizes.ffn)) < (before.loss, -sum(before.sizes.ffn)):
            combinations[found.parts] = found
    if not combinations:
        raise OptionError(_impossible(space, budget))
    ranked = sorted(combinations.values(), key=lambda one: (one.loss, len(one.parts), sorted(one.parts)))
    compared = [(one.sizes, one.losses) for one in ranked[: max(most, 8)]]
    teacher = cost_of(architecture, options.cost)
    made = []
    for one in ranked[:most]:
        others = [other for other in compared if other[0] is not one.sizes]
        made.append(build(diagnosis, architecture, options, one.sizes, one.losses, others, teacher, space.limits))
    return made


def _space(diagnosis: Evidence, architecture: Architecture, budget: Budget, options: PlanOptions) -> _Space:
    if options.widths == "free" and architecture.qk_norm:
        raise OptionError("stock llama.cpp runs no qwen3 whose layers differ in channels; leave widths equal")
    shape = architecture.layers[architecture.owner(0)]
    multiple, each = options.multiple, shape.heads // shape.kv_heads
    groups = _sizes("groups", shape.kv_heads, 1, options.groups, options, "groups")
    heads = _sizes("heads", each, 1, options.heads, options, "heads")
    attention = [(g, h) for g in groups for h in heads if (g, h) == (shape.kv_heads, each) or g * h * architecture.head % multiple == 0]
    if not attention:
        raise OptionError(
            f"{options.groups or shape.kv_heads} groups of {options.heads or each} heads of {architecture.head} make no multiple of "
            f"{multiple}; keep other numbers of heads, or lower multiple"
        )  # fmt: skip
    blocks = [multiple if how == "grouped" else 1 for how in (options.channels, options.dimensions)]
    return _Space(
        architecture, shape, budget.limits(cost_of(architecture, options.cost)), options.cost,
        tables(diagnosis, channels=blocks[0], dimensions=blocks[1]), outlines(diagnosis, architecture, options), attention,
        _sizes("width", architecture.width, multiple, options.width, options, "hidden"),
        _sizes("ffn", shape.ffn, multiple, options.ffn, options, "ffn", finest=10**9), options.widths == "free",
    )  # fmt: skip


def _sizes(name: str, full: int, multiple: int, given: int | None, options: PlanOptions, part: str, finest: int = FINEST) -> list[int]:
    """Sizes of a part that may be chosen, ascending; the teacher's own is the last."""
    if given is not None:
        if given > full:
            raise OptionError(f"{name} is {given}, and the teacher has {full}; give at most that")
        if given != full and given % multiple:
            raise OptionError(
                f"{name} is {given}, which is no multiple of {multiple}; give {max(1, given // multiple) * multiple}, or lower multiple"
            )
        return [given]
    if part not in options.allow:
        return [full]
    least = max(1, -(-int(full * options.least) // multiple)) * multiple
    found = list(range(least, full, multiple))
    step = -(-len(found) // finest) or 1
    return [*found[::-1][::step][::-1], full]


def _search(space: _Space, diagnosis: Evidence) -> Iterator[Found]:
    chosen = {(g, h): choose_heads(diagnosis, space.architecture, g, h) for g, h in space.attention}
    full = (space.shape.kv_heads, space.shape.heads // space.shape.kv_heads)
    for outline in space.depths:
        for width in space.widths:
            for (groups, heads), kept in chosen.items():
                ffn = _largest(space, outline, groups, heads, width)
                if ffn is None:
                    continue
                cut = {
                    "depth": bool(outline.gone or outline.merged), "share": outline.shared > 0, "hidden": width < space.architecture.width,
                    "groups": groups < full[0], "heads": heads < full[1], "ffn": ffn < space.shape.ffn,
                }  # fmt: skip
                for channels, name in _channels(space, outline, ffn):
                    losses = _losses(space, outline, kept, width, channels)
                    parts = {name if part == "ffn" else part: losses[part] for part, is_cut in cut.items() if is_cut}
                    yield Found(Sizes(outline, groups, heads, width, channels, kept), parts)


def _channels(space: _Space, outline: Outline, ffn: int) -> Iterator[tuple[tuple[int, ...], str]]:
    """Channels of each layer of the student, as many in each, and by layer where each is one of the teacher's; and what that is called."""
    yield (ffn,) * len(outline.layers), "ffn"
    if space.free and ffn < space.shape.ffn and not outline.shared and not outline.merged:
        yield space.tables.spread([i for one in outline.layers for i in one], ffn, space.ffns), "spread"


def _largest(space: _Space, outline: Outline, groups: int, heads: int, width: int) -> int | None:
    """The largest feed-forward width that the budget leaves, None for none: every cost grows with it."""
    above: Callable[[int], bool] = lambda ffn: not space.fits(space.cost(outline, groups, heads, width, ffn))  # noqa: E731
    at = bisect_right(space.ffns, False, key=above)
    return space.ffns[at - 1] if at else None


def _losses(space: _Space, outline: Outline, kept: Heads, width: int, channels: Sequence[int]) -> dict[str, float]:
    layers = [i for one in outline.layers for i in one]
    ffn = [count for count, one in zip(channels, outline.layers, strict=True) for _ in one]
    heads, groups = space.tables.head_losses(layers, kept)
    return {
        "depth": outline.loss, "share": outline.share_loss, "hidden": space.tables.hidden_loss(layers, width),
        "groups": groups, "heads": heads, "ffn": space.tables.ffn_loss(layers, ffn),
    }  # fmt: skip


def _impossible(space: _Space, budget: Budget) -> str:
    """Why no student meets the budget: the smallest one that the options allow, and what of it cannot shrink."""
    (groups, heads), width, ffn = min(space.attention, key=lambda one: one[0] * one[1]), space.widths[0], space.ffns[0]
    outline = min(space.depths, key=lambda one: (len(one.layers) - one.shared, len(one.layers)))
    least = space.cost(outline, groups, heads, width, ffn)
    outer = outer_cost(space.architecture, space.model, width)
    said = [
        f"{name} {limit:,.0f} (the smallest has {getattr(least, name):,.0f}, {getattr(outer, name):,.0f} of them in embedding and output)"
        for name, limit in space.limits.items() if getattr(least, name) > limit
    ]  # fmt: skip
    if not said:  # each limit alone can be met
        said = [", ".join(f"{name} {limit:,.0f}" for name, limit in space.limits.items()) + " together"]
    return (
        f"no student that the options allow meets the budget of {' and '.join(said)}; "
        "raise the budget, lower least, or allow more parts to be cut"
    )
