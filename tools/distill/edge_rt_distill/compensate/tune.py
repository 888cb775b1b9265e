"""All corrections trained together, by the KL from the float model, the network itself frozen.

Fits of single sites minimise squared errors there; what counts is the end of the network. The corrections are a few million numbers, and
their gradient costs two forward passes a step (weights need none), so a few hundred steps of Adam (Kingma and Ba, 2015) are cheap. Norm
weights may be trained with them: they cost neither bytes nor time, but belong into the model file. Held-out text decides what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edge_rt.hooks import TrainingError
from edge_rt_distill.compensate.apply import compensated
from edge_rt_distill.compensate.correction import Compensation
from edge_rt_distill.compensate.measure import everywhere
from edge_rt_distill.compensate.storage import Storage, all_as_stored
from edge_rt_distill.model.decoder import Decoder, RMSNorm
from edge_rt_distill.model.divergence import Final, Reference, divergence, final, reference
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.progress import Told, quiet

TRAINED = ("low_a", "low_b", "rows", "bias")
"""Parts that are trained. Centroids are not: a look-up has no gradient."""


@dataclass(frozen=True)
class Schedule:
    """``rate``: step of Adam as a share of each tensor's root mean square, falling as a cosine to a tenth, after ``warm_up`` steps.
    ``norm_rate``: the same of norm weights, 0: they stay. ``every``: steps between measurements on held-out text. ``clip``: the
    longest gradient."""

    steps: int = 200
    batch_tokens: int = 512
    rate: float = 0.02
    norm_rate: float = 0.0
    warm_up: int = 10
    every: int = 50
    clip: float = 1.0
    seed: int = 0


class Tuned(NamedTuple):
    """``norms``: norm weights by tensor name, those that training changed.

    ``history``: (step, KL on held-out text); the best is what is kept.
    """

    compensation: Compensation
    norms: dict[str, Tensor]
    history: list[tuple[int, float]]


def tune(
    teacher: Decoder, student: Decoder, compensation: Compensation, fitting: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]],
    storage: Storage, schedule: Schedule, told: Told = quiet,
) -> Tuned:  # fmt: skip
    """Train ``compensation`` from where it stands. ``told``: steps done, at each measurement on held-out text.

    The student is as before afterwards; its norms are returned. Raises TrainingError if the KL is no number any more.
    """
    run = _Run(student, compensation, storage, schedule)
    batches, held = everywhere(fitting, schedule.batch_tokens), reference(teacher, everywhere(held_out))
    said: dict[int, Final] = {}  # a step's batch may come again
    order = _order(len(batches), schedule.steps, schedule.seed)
    with run.trainable():
        run.judge(0, held, told)
        for step, number in enumerate(order, 1):
            if number not in said:
                with torch.no_grad():
                    said[number] = final(teacher, batches[number])
            run.step(step, batches[number], said[number])
            if step % schedule.every == 0 or step == schedule.steps:
                run.judge(step, held, told)
    return Tuned(run.best, run.best_norms, run.history)


class _Run:
    """What changes from step to step."""

    def __init__(self, student: Decoder, start: Compensation, storage: Storage, schedule: Schedule) -> None:
        self.student, self.start, self.storage, self.schedule = student, start, storage, schedule
        self.parts = {
            (site, name): nn.Parameter(part.clone()) for site, one in start.items() for name, part in one.parts() if name in TRAINED
        }
        self.norms = dict(_norms(student)) if schedule.norm_rate else {}
        self.before = {name: norm.detach().clone() for name, norm in self.norms.items()}
        groups = [(part, schedule.rate) for part in self.parts.values()] + [(norm, schedule.norm_rate) for norm in self.norms.values()]
        self.sizes = [rate * max(float(part.detach().square().mean().sqrt()), 1e-6) for part, rate in groups]
        self.adam = torch.optim.Adam([{"params": [part]} for part, _ in groups], lr=0.0, betas=(0.9, 0.99)) if groups else None
        self.history: list[tuple[int, float]] = []
        self.best: Compensation = start
        self.best_norms: dict[str, Tensor] = {}

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """While open, norms take gradients; afterwards they are as they were."""
        flags = {name: norm.requires_grad for name, norm in self.norms.items()}
        try:
            for norm in self.norms.values():
                norm.requires_grad_(True)
            yield
        finally:
            with torch.no_grad():
                for name, norm in self.norms.items():
                    norm.copy_(self.before[name])
                    norm.requires_grad_(flags[name]).grad = None

    def compensation(self) -> Compensation:
        """The corrections with the parts being trained in their places."""
        return {
            site: one._replace(**{name: self.parts[site, name] for name, _ in one.parts() if (site, name) in self.parts})
            for site, one in self.start.items()
        }

    def step(self, step: int, batch: Rows, said: Final) -> None:
        """One step of Adam. Raises TrainingError."""
        if self.adam is None:
            return
        with torch.enable_grad(), compensated(self.student, self.compensation()):
            loss = divergence(final(self.student, batch), said).mean()
            if not bool(torch.isfinite(loss)):
                raise TrainingError(f"the KL is no number any more at step {step} of tuning the compensation; lower its rate")
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([*self.parts.values(), *self.norms.values()], self.schedule.clip)
        factor = self._factor(step)
        for group, size in zip(self.adam.param_groups, self.sizes, strict=True):
            group["lr"] = size * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def _factor(self, step: int) -> float:
        schedule = self.schedule
        progress = min(1.0, step / max(schedule.steps, 1))
        return min(1.0, step / max(schedule.warm_up, 1)) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    def judge(self, step: int, held: Reference, told: Told) -> None:
        """Measure what would be stored now, and keep it if it is the best yet."""
        stored = all_as_stored(self.compensation(), self.storage)
        with compensated(self.student, stored):
            found = held.kl(self.student)
        if not self.history or found < min(kl for _, kl in self.history):
            self.best = stored
            changed = {name: norm for name, norm in self.norms.items() if not torch.equal(norm, self.before[name])}
            self.best_norms = {name: norm.detach().clone() for name, norm in changed.items()}
        self.history.append((step, found))
        told(step, self.schedule.steps)


def _norms(model: Decoder) -> Iterator[tuple[str, nn.Parameter]]:
    """Norm weights by tensor name; those of shared layers once."""
    seen: set[int] = set()
    for i, layer in enumerate(model.layers):
        for name, module in layer.named_children():
            if isinstance(module, RMSNorm) and id(module) not in seen:
                seen.add(id(module))
                yield f"blk.{i}.{name}.weight", module.weight
    yield "output_norm.weight", model.output_norm.weight


def _order(count: int, steps: int, seed: int) -> list[int]:
    """Batches by step: every one once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < steps:
        found += torch.randperm(count, generator=generator).tolist()
    return found[:steps]
