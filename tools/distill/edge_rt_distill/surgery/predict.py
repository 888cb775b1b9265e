"""What a cut is predicted to cost in divergence, from the diagnosis alone: the search compares students by it.

The prior: near the teacher, divergence is of second order in what is missing. Where the importance of a part is its share of the energy
that a layer adds, leaving out a share m of that energy costs m of what leaving out all of it costs. So many channels of little
importance, taken from all layers, cost less than a whole layer of the same parameters, unless the diagnosis says that a layer does
nothing. Layers' losses add up; those of neighbours more than that, as what one would have made good is gone (``COUPLING``).
``probe.calibrated`` replaces the prior's scale for each part by one that was measured on this teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edge_rt_distill.model.architecture import Architecture
from edge_rt_distill.surgery.evidence import Array, Evidence

COUPLING = 0.25
"""How much more a layer's removal costs for each neighbour that is gone too (SLEB, Song et al. 2024, arXiv:2402.09025)."""
BOTH = 2.0
"""A dimension of the residual stream is missing in what each layer reads and in what it writes."""


class Depth(NamedTuple):
    """A choice of layers: those that go, in the order in which they were chosen, and the predicted loss of all."""

    gone: tuple[int, ...]
    loss: float


class Heads(NamedTuple):
    """What is kept of every layer's attention, and the share of importance [L] that groups and single heads take with them."""

    groups: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    group_share: Array
    head_share: Array


@dataclass(frozen=True)
class Tables:
    """Predicted losses of each part at every size. ``ffn`` [L, F + 1], ``hidden`` [D + 1]: share of importance lost with so many kept."""

    evidence: Evidence
    ffn: Array
    hidden: Array

    def ffn_loss(self, layers: Sequence[int], kept: int | Sequence[int]) -> float:
        """Of keeping so many channels in each of these layers, or in one after the other."""
        own = np.asarray(layers)
        return self.evidence.scale("ffn") * float(self.evidence.ffn_kl[own] @ self.ffn[own, np.asarray(kept)])

    def spread(self, layers: Sequence[int], kept: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """Channels of each of these layers, of ``sizes`` (ascending) and at most ``kept`` on average, with the least predicted loss.

        Step by step the layer gives channels that misses the next ones least: what each step costs a layer grows, so that is the best.
        """
        own = np.asarray(layers)
        costs = self.evidence.ffn_kl[own, None] * self.ffn[own][:, np.asarray(sizes)]
        at, surplus = np.full(len(own), len(sizes) - 1), len(own) * (sizes[-1] - kept)
        each = np.arange(len(own))
        while surplus > 0:
            steps = np.where(at > 0, costs[each, np.maximum(at - 1, 0)] - costs[each, at], np.inf)
            giving = int(np.argmin(steps))
            surplus -= sizes[at[giving]] - sizes[at[giving] - 1]
            at[giving] -= 1
        return tuple(sizes[one] for one in at)

    def head_losses(self, layers: Sequence[int], heads: Heads) -> tuple[float, float]:
        """Of the heads and of the key-value groups that go, in these layers."""
        own = np.asarray(layers)
        kl = self.evidence.attention_kl[own]
        found = (("heads", heads.head_share), ("groups", heads.group_share))
        single, group = (self.evidence.scale(name) * float(kl @ share[own]) for name, share in found)
        return single, group

    def hidden_loss(self, layers: Sequence[int], kept: int) -> float:
        """Of keeping so many dimensions, for what these layers do."""
        return self.evidence.scale("hidden") * BOTH * float(self.evidence.layer_kl[np.asarray(layers)].sum() * self.hidden[kept])


def tables(found: Evidence, *, channels: int = 1, dimensions: int = 1) -> Tables:
    """Tables of a diagnosis. ``channels``, ``dimensions``: sizes of the groups that are kept together."""
    ffn = np.stack([lost(one, channels) for one in found.ffn_channels])
    return Tables(found, ffn, lost(found.hidden, dimensions))


def lost(importance: Array, group: int = 1) -> Array:
    """Share of importance [n + 1] that is lost when k of n are kept, the best whole groups; a last, partial group goes first."""
    n = len(importance)
    total = float(importance.sum())
    result = np.ones(n + 1)
    result[n] = 0.0
    if total <= 0.0:  # nothing is known to matter: a part is worth its size
        importance, total = np.ones(n), float(n)
    sums = np.sort(importance[: n - n % group].reshape(-1, group).sum(1))[::-1].cumsum()
    for i, kept in enumerate(sums):
        result[(i + 1) * group : min((i + 2) * group, n)] = 1.0 - kept / total
    return result


def best(importance: Array, count: int, group: int = 1) -> tuple[int, ...]:
    """The ``count`` most important places, ascending, as whole groups (``count`` is a multiple, or all). Of equals the first are kept."""
    n = len(importance)
    if count == n:
        return tuple(range(n))
    sums = importance[: n - n % group].reshape(-1, group).sum(1)
    chosen = np.sort(np.argsort(-sums, kind="stable")[: count // group])
    return tuple(int(i) for one in chosen for i in range(one * group, (one + 1) * group))


def choose_heads(found: Evidence, architecture: Architecture, groups: int, heads: int) -> Heads:
    """Keep ``groups`` key-value heads of each layer with all that use them, and of each ``heads`` query heads."""
    shape = architecture.layers[architecture.owner(0)]
    layers, each = len(architecture.layers), shape.heads // shape.kv_heads
    importance = found.heads.reshape(layers, shape.kv_heads, each)
    totals = importance.sum((1, 2))
    importance = np.where(totals[:, None, None] > 0, importance, 1.0)
    totals = importance.sum((1, 2))
    kept_groups, kept_heads, group_share, head_share = [], [], np.zeros(layers), np.zeros(layers)
    for i, one in enumerate(importance):
        chosen = best(one.sum(1), groups)
        inside = {g: best(one[g], heads) for g in chosen}
        kept_groups.append(chosen)
        kept_heads.append(tuple(g * each + h for g in chosen for h in inside[g]))
        left = sum(float(one[g].sum()) for g in chosen)
        group_share[i] = 1 - left / totals[i] if groups < shape.kv_heads else 0.0
        head_share[i] = (left - sum(float(one[g][list(inside[g])].sum()) for g in chosen)) / totals[i] if heads < each else 0.0
    return Heads(tuple(kept_groups), tuple(kept_heads), group_share, head_share)


def removal(found: Evidence, most: int, stay: frozenset[int]) -> list[Depth]:
    """For 0 .. ``most`` layers, which go and what that is predicted to cost; fewer entries where no more may go.

    Greedy: the cheapest first, those beside a gap dearer. Where removal was measured together, that order and those figures stand, and
    what goes beyond them is added as predicted.
    """
    scale = found.scale("depth")
    steps = [Depth((), 0.0)]
    for layer, loss in zip(found.drop_order, found.drop_kl, strict=True):
        if layer in stay or len(steps) > most:
            break
        steps.append(Depth((*steps[-1].gone, layer), loss))
    free = [i for i in range(len(found.layer_kl)) if i not in stay and i not in steps[-1].gone]
    while free and len(steps) <= most:
        last = steps[-1]
        before = removal_loss(found, last.gone)
        added = [scale * (removal_loss(found, (*last.gone, i)) - before) for i in free]
        at = int(np.argmin(added))
        steps.append(Depth((*last.gone, free.pop(at)), last.loss + added[at]))
    return steps


def removal_loss(found: Evidence, gone: Sequence[int]) -> float:
    """The predicted loss of leaving out several layers, before scaling."""
    out = set(gone)
    return sum(float(found.layer_kl[i]) * (1 + COUPLING * len(out & {i - 1, i + 1})) for i in out)
