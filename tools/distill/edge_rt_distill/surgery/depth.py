"""Layers that go: several made one, and the order in which they can be left out, measured on the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edge_rt.hooks import OptionError
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.divergence import finals, mean_divergence
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.progress import Told, quiet
from edge_rt_distill.surgery.cut import Merge
from edge_rt_distill.surgery.evidence import Evidence


def merge(layers: Sequence[Mapping[str, Tensor]], how: Merge) -> dict[str, Tensor]:
    """Tensors of neighbouring layers as those of one.

    ``laco``: the first's plus the sum of what each later one differs from it (Yang et al. 2024, arXiv:2402.11187, equation 1); of two
    layers that is the second. ``average``: the mean.
    """
    first = layers[0]
    if len(layers) == 1:
        return dict(first)
    if how == "average":
        return {name: torch.stack([layer[name] for layer in layers]).mean(0) for name in first}
    made = {}
    for name, tensor in first.items():
        made[name] = torch.stack([layer[name] for layer in layers[1:]]).sum(0) - (len(layers) - 2) * tensor
    return made


def removal_order(
    teacher: Decoder, batches: Sequence[Rows], found: Evidence, count: int, *, protect: Sequence[int] | None = None, width: int = 8,
    told: Told = quiet,
) -> Evidence:  # fmt: skip
    """Which layers can go, each chosen with those before it gone, and the divergence measured (SLEB, Song et al. 2024, arXiv:2402.09025).

    Each step tries the ``width`` layers that the diagnosis calls cheapest. ``protect``: layers that stay, None for the first and the last.
    ``told(done, all)`` is called before each step. Returns the evidence with the order in it.
    """
    layers = len(teacher.layers)
    stay = set((0, layers - 1) if protect is None else protect)
    free = sorted((i for i in range(layers) if i not in stay), key=lambda i: float(found.layer_kl[i]))
    if not 0 < count <= len(free):
        raise OptionError(f"the order of {count} layers cannot be measured, {len(free)} may go; ask for 1 to {len(free)}")
    order: list[int] = []
    losses: list[float] = []
    known = finals(teacher, batches)
    for step in range(count):
        told(step, count)
        tried = [(mean_divergence(teacher, known, batches, skip=(*order, i)), i) for i in free[:width]]
        loss, chosen = min(tried)
        order.append(chosen)
        losses.append(loss)
        free.remove(chosen)
    return found.with_drops(tuple(order), tuple(losses))
