"""After the cut: the student's matrices refitted by least squares, so that its residual stream is the teacher's again.

Layer by layer, teacher and student run side by side on calibration text. Where a sub-block writes to the stream, ridge regression changes
its last matrix so that the student's stream plus what it writes matches the teacher's at the aligned point: behind the teacher's attention
for ``attn_output``; for ``ffn_down`` where the next layer begins that the student has too, so that it also makes up for dropped layers.
Errors made before are thus made good later, as far as a linear map can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edge_rt.hooks import OptionError
from edge_rt_distill.model.decoder import LINEARS, Decoder, Layer, RMSNorm
from edge_rt_distill.model.divergence import reference
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.progress import Told, quiet
from edge_rt_distill.surgery.cut import Cut
from edge_rt_distill.surgery.least_squares import Equations, fit, fit_scale
from edge_rt_distill.surgery.streams import attend, gated, soft, some, split, weights
from edge_rt_distill.surgery.width import AXES, indices

SUMS = ("attn_output", "ffn_down")
"""Matrices that write to the residual stream."""


@dataclass(frozen=True)
class RepairOptions:
    """``sites``: matrices to refit; others than those that write to the stream are fitted to the outputs that the teacher's have.

    ``ridges``: tried, relative to the mean of the diagonal. ``apart``: share of passages that judge and are not fitted. ``background``:
    weight of tokens whose prediction does not count (of a prompt). ``outlier``: tokens whose stream is so many times the median's norm
    count less, by the square of the excess. ``first``: weight of the first position, where a massive activation sits (Sun et al. 2024,
    arXiv:2402.17762) to which heads attend that have nothing to say; with none, a refit may lose it and such passages with it (a passage
    of SmolLM2-135M with 1,280 of 1,536 channels: a tenth of the norm, 1.14 nats instead of 0.42). ``carry``: share of the errors made in
    front of a matrix that it is to make good, beside what it lacks itself. ``norms``: refit norms too where dimensions were removed.
    """

    sites: tuple[str, ...] = SUMS
    ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    apart: float = 0.25
    background: float = 0.25
    outlier: float = 10.0
    first: float = 1.0
    carry: float = 1.0
    norms: bool = True

    def __post_init__(self) -> None:
        unknown = sorted(set(self.sites) - set(LINEARS))
        if unknown:
            raise OptionError(f"a layer has no matrix {unknown[0]!r}; choose of {', '.join(LINEARS)}")
        if not self.ridges or min(self.ridges) <= 0 or not 0 < self.apart < 1:
            raise OptionError("ridges must be above 0, and apart a share between 0 and 1; leave them out for the usual ones")
        if not 0 <= self.carry <= 1 or min(self.background, self.first) < 0 or self.outlier <= 0:
            raise OptionError("carry is a share from 0 to 1, weights are from 0, outlier is above 0; leave them out for the usual ones")


class Refit(NamedTuple):
    """A matrix or norm: squared error relative to the teacher's, before and after, on passages kept apart; what became of it."""

    site: str
    before: float
    after: float
    ridge: float | None
    note: str


@dataclass
class Repair:
    """What a repair did. ``before``, ``after``: divergence in nats on the passages kept apart; ``undone``: it did not help there."""

    before: float
    after: float = 0.0
    undone: bool = False
    sites: list[Refit] = field(default_factory=list)


@dataclass
class _Walk:
    """Both streams at one point, a tensor [B, T, D] a batch. ``weights`` [B, T] of tokens; ``apart`` [B]: passages that judge."""

    teacher: Decoder
    student: Decoder
    cut: Cut
    options: RepairOptions
    theirs: list[Tensor]
    ours: list[Tensor]
    weights: list[Tensor]
    apart: list[Tensor]
    report: Repair
    hidden: Tensor


@torch.no_grad()
def repair(
    student: Decoder, teacher: Decoder, cut: Cut, batches: Sequence[Rows], options: RepairOptions = RepairOptions(), *,
    told: Told = quiet,
) -> Repair:  # fmt: skip
    """Refit the student's matrices in place. ``told(layers done, all)`` is called before each layer, and may raise to stop.

    A matrix keeps its weights where the new ones do not help on the passages kept apart, and so does the whole student. These passages
    chose among ridges: judge the student itself by other text. Raises DataError for fewer than two passages, OptionError for a student
    whose matrices are parametrised.
    """
    if any(parametrize.is_parametrized(student.linear(site)) for site in student.sites()):
        raise OptionError("the student's matrices are parametrised; repair it before a form is attached, or fold it first")
    apart = split([len(batch.tokens) for batch in batches], options.apart)
    judged = [some(batch, which) for batch, which in zip(batches, apart, strict=True) if which.any()]
    known = reference(teacher, judged)
    report = Repair(known.kl(student))
    old = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    walk = _Walk(
        teacher, student, cut, options, [teacher.token_embd(b.tokens) for b in batches], [student.token_embd(b.tokens) for b in batches],
        [weights(b, options.background, options.first) for b in batches], apart, report, torch.tensor(cut.hidden, dtype=torch.int64),
    )  # fmt: skip
    _advance(walk, 0, cut.layers[0].sources[0])
    for place in range(len(cut.layers)):
        told(place, len(cut.layers))
        _layer(walk, place)
    _norm(walk, "output_norm", student.output_norm, [teacher.output_norm(x) for x in walk.theirs])
    report.after = known.kl(student)
    if not report.after < report.before:
        student.load_state_dict(old)
        report.undone = bool(report.sites)
    return report


def _layer(walk: _Walk, place: int) -> None:
    """Fit one layer of the student and move both streams behind it."""
    layer, sources = walk.student.layers[place], walk.cut.layers[place].sources
    source = sources[0]
    model = walk.teacher.layers[source]
    end = walk.cut.layers[place + 1].sources[0] if place + 1 < len(walk.cut.layers) else len(walk.teacher.layers)
    assert isinstance(layer, Layer)
    assert isinstance(model, Layer)
    own = walk.cut.layers[place].like is None and not any(one.like == place for one in walk.cut.layers)
    normed = [model.attn_norm(x) for x in walk.theirs]
    if own:
        _norm(walk, f"blk.{place}.attn_norm", layer.attn_norm, normed)
        for name in LINEARS[:3]:
            _copy(walk, place, name, [layer.attn_norm(x) for x in walk.ours], [getattr(model, name)(h) for h in normed])
    before = walk.theirs
    walk.theirs = [x + model.attn_output(a) for x, a in zip(before, attend(walk.teacher, model, normed), strict=True)]
    attended = attend(walk.student, layer, [layer.attn_norm(x) for x in walk.ours])
    _sum(walk, place, "attn_output", attended, before, own)
    normed = [model.ffn_norm(x) for x in walk.theirs]
    if own:
        _norm(walk, f"blk.{place}.ffn_norm", layer.ffn_norm, normed)
        for name in LINEARS[4:6]:
            _copy(walk, place, name, [layer.ffn_norm(x) for x in walk.ours], [getattr(model, name)(h) for h in normed])
    before = walk.theirs
    walk.theirs = [x + model.ffn_down(gated(model, h)) for x, h in zip(before, normed, strict=True)]
    _advance(walk, source + 1, end)
    _sum(walk, place, "ffn_down", [gated(layer, layer.ffn_norm(x)) for x in walk.ours], before, own)


def _advance(walk: _Walk, first: int, last: int) -> None:
    """Run the teacher's layers ``first`` .. ``last - 1``, which the student lacks."""
    for i in range(first, last):
        walk.theirs = [walk.teacher.layers[i](x, walk.teacher.turn(torch.arange(x.shape[1])))[0] for x in walk.theirs]


def _sum(walk: _Walk, place: int, name: str, inputs: list[Tensor], before: list[Tensor], own: bool) -> None:
    """Fit a matrix that writes to the stream, and move the student's stream behind it. ``before``: the teacher's in front of it."""
    linear = getattr(walk.student.layers[place], name)
    if name in walk.options.sites:
        targets = [x[..., walk.hidden] for x in walk.theirs]
        if own:
            base = [old[..., walk.hidden].lerp(x, walk.options.carry) for old, x in zip(before, walk.ours, strict=True)]
            _fit(walk, f"blk.{place}.{name}", linear, inputs, targets, base)
        else:
            walk.report.sites.append(Refit(f"blk.{place}.{name}", 0.0, 0.0, None, "shared between layers: not refitted"))
    walk.ours = [x + linear(h) for x, h in zip(walk.ours, inputs, strict=True)]


def _copy(walk: _Walk, place: int, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Fit a matrix to the outputs that the teacher's has from the teacher's stream."""
    if name not in walk.options.sites:
        return
    rows = indices(walk.cut.layers[place], walk.cut.hidden, walk.teacher.architecture.head)[AXES[name][0]]
    _fit(walk, f"blk.{place}.{name}", getattr(walk.student.layers[place], name), inputs, [y[..., rows] for y in outputs], None)


def _fit(walk: _Walk, site: str, linear: nn.Linear, inputs: list[Tensor], targets: list[Tensor], base: list[Tensor] | None) -> None:
    """Ridge regression of a change to ``linear``, so that ``base`` plus its output is the target."""
    train, apart = (Equations(linear.in_features, linear.out_features) for _ in range(2))
    for i, (x, target) in enumerate(zip(inputs, targets, strict=True)):
        error = target - linear(x) - (0 if base is None else base[i])
        weights = soft(walk.weights[i], walk.theirs[i], walk.options.outlier)
        for equations, rows in ((train, ~walk.apart[i]), (apart, walk.apart[i])):
            equations.add(x[rows].flatten(0, 1), error[rows].flatten(0, 1), target[rows].flatten(0, 1), weights[rows].flatten())
    if not torch.isfinite(train.gram).all() or not torch.isfinite(train.cross).all():
        walk.report.sites.append(Refit(site, float("nan"), float("nan"), None, "not finite: kept its weights"))
        return
    found = fit(train, apart, walk.options.ridges)
    if found.change is not None:
        linear.weight += found.change.to(linear.weight.dtype)
    note = "refitted" if found.change is not None else "kept its weights: no change helped"
    walk.report.sites.append(Refit(site, found.before, found.after, found.ridge, note))


def _norm(walk: _Walk, site: str, norm: RMSNorm, normed: list[Tensor]) -> None:
    """Refit a norm's weight to what the teacher's gives, where dimensions were removed from the mean that it divides by."""
    if not walk.options.norms or len(walk.cut.hidden) == walk.teacher.architecture.width:
        return
    plain = [F.rms_norm(x, (x.shape[-1],), None, norm.epsilon) for x in walk.ours]
    targets = [h[..., walk.hidden] for h in normed]

    def gather(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        parts = [
            (
                plain[i][r].flatten(0, 1),
                targets[i][r].flatten(0, 1),
                soft(walk.weights[i], walk.theirs[i], walk.options.outlier)[r].flatten(),
            )
            for i, r in enumerate(rows)
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])

    x, target, weights = gather([~rows for rows in walk.apart])
    new = fit_scale(x, target, weights, norm.weight, walk.options.ridges[0])
    x, target, weights = gather(walk.apart)
    energy = (weights[:, None] * target.pow(2)).sum(0).clamp_min(1e-30)
    before, after = (float(((weights[:, None] * (x * w - target).pow(2)).sum(0) / energy).mean()) for w in (norm.weight, new))
    helped = after < before
    if helped:
        norm.weight.copy_(new)
    note = "refitted" if helped else "kept its weight: no change helped"
    walk.report.sites.append(Refit(site, before, min(before, after) if before == before else before, walk.options.ridges[0], note))
