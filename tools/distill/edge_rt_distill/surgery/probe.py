"""Predictions checked on the teacher itself: small cuts of each part, made and measured, scale what the plan predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from edge_rt.hooks import OptionError
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.divergence import Reference
from edge_rt_distill.progress import Told, quiet
from edge_rt_distill.surgery.apply import apply
from edge_rt_distill.surgery.cut import Cut
from edge_rt_distill.surgery.evidence import Evidence
from edge_rt_distill.surgery.options import Budget, PlanOptions
from edge_rt_distill.surgery.plan import plan
from edge_rt_distill.surgery.predict import best, lost

SHARE = 7 / 8
"""What a probe leaves of a width."""
ALONE = 3 / 4
"""What a probe leaves of the channels of a single layer."""


def calibrated(
    found: Evidence, teacher: Decoder, known: Reference, options: PlanOptions = PlanOptions(), *,  # noqa: B008 (frozen)
    told: Told = quiet,
) -> Evidence:  # fmt: skip
    """The evidence with a scale for each part that may be cut: measured divergence of a small cut of it over the predicted.

    ``told(done, all)`` is called before each probe. Parts of which no small cut can be made keep the prior.
    """
    probes = _probes(found, teacher, options)
    scales: dict[str, float] = {}
    for at, (part, changes) in enumerate(probes.items()):
        told(at, len(probes))
        try:
            cut = plan(replace(found, scales=None), teacher.architecture, Budget(), changes)
        except OptionError:  # too few layers may go, say: nothing of this part will be cut in the plan either
            continue
        predicted = cut.chosen.loss if cut.chosen is not None else 0.0
        measured = known.kl(apply(teacher, cut))
        if predicted > 0 and 0 < measured < float("inf"):
            scales[part] = measured / predicted
    return replace(found, scales=scales)


@torch.no_grad()
def of_each_layer(found: Evidence, teacher: Decoder, known: Reference, *, told: Told = quiet) -> Evidence:
    """The evidence with ``ffn_kl`` as measured where a plan cuts: by taking a quarter of its channels, the least important, from each layer
    alone. (SmolLM2-135M's first costs 9.1 nats when all of it is left out; by its last quarter it would be 1.4, and that plans better:
    channels by layer cost 0.35 nats then instead of 0.40.) ``told`` as in ``calibrated``.
    """
    measured = found.ffn_kl.copy()
    for layer, importance in enumerate(found.ffn_channels):
        told(layer, len(measured))
        down = teacher.linear(f"blk.{teacher.architecture.owner(layer)}.ffn_down").weight
        kept = round(len(importance) * ALONE)
        before, gone = down.clone(), sorted(set(range(len(importance))) - set(best(importance, kept)))
        share = lost(importance)[kept]
        try:
            down[:, gone] = 0
            divergence = known.kl(teacher)
        finally:
            down.copy_(before)
        if share > 0 and divergence < float("inf"):
            measured[layer] = divergence / share
    return replace(found, ffn_kl=measured)


def _probes(found: Evidence, teacher: Decoder, options: PlanOptions) -> dict[str, PlanOptions]:
    """For each part the options that cut just it."""
    a = teacher.architecture
    shape = a.layers[a.owner(0)]
    each = shape.heads // shape.kv_heads
    plain = replace(
        options, allow=(), widths="equal", drop=(), merge=(), share=0, ffn=shape.ffn, groups=shape.kv_heads, heads=each, width=a.width
    )
    narrower = {name: int(size * SHARE) // options.multiple * options.multiple for name, size in (("ffn", shape.ffn), ("width", a.width))}
    changes: dict[str, tuple[str, int]] = {
        "ffn": ("ffn", narrower["ffn"]), "hidden": ("width", narrower["width"]), "heads": ("heads", each - 1),
        "groups": ("groups", shape.kv_heads - 1), "depth": ("drop", 2),
    }  # fmt: skip
    return {
        part: replace(plain, protect=options.protect, **{name: value})  # type: ignore[arg-type]
        for part, (name, value) in changes.items()
        if part in options.allow and value > 0 and not (part == "depth" and found.drop_order)
    }


class Measured(NamedTuple):
    """A cut, what was predicted of it and what it costs in divergence, in nats before repair."""

    cut: Cut
    predicted: float
    divergence: float


def select(teacher: Decoder, cuts: Sequence[Cut], known: Reference, *, told: Told = quiet) -> list[Measured]:
    """The cuts (``plan.candidates``), least measured divergence first. ``told(done, all)`` is called before each."""
    made = []
    for at, cut in enumerate(cuts):
        told(at, len(cuts))
        predicted = cut.chosen.loss if cut.chosen is not None else float("nan")
        made.append(Measured(cut, predicted, known.kl(apply(teacher, cut))))
    return sorted(made, key=lambda one: (one.divergence != one.divergence, one.divergence))  # what is not a number is last
