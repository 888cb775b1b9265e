"""From a float model and its quantised form to the corrections that are worth their bytes and microseconds.

1. `sensitivity`: what an error at each site costs at the end of the network.
2. `survey`: what each form would gain at each site, on held-out text.
3. `cost.select`: one form a site, within the budget.
4. `sequential`: fitted with all before at work, with the strength that held-out text asks for, and dropped where it asks for none.
5. `tune`: all together by the KL at the end, kept as far as held-out text is served.
6. Where asked for, sites without which the end is no worse are dropped.

Everything is measured with the values that the file will hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt.hooks import DataError, OptionError
from edge_rt_distill.compensate import sequential
from edge_rt_distill.compensate.apply import compensated
from edge_rt_distill.compensate.correction import Compensation
from edge_rt_distill.compensate.cost import Budget, Candidate, Costs, select
from edge_rt_distill.compensate.measure import everywhere
from edge_rt_distill.compensate.sensitivity import sensitivities
from edge_rt_distill.compensate.storage import stored_bytes
from edge_rt_distill.compensate.survey import Forms, survey
from edge_rt_distill.compensate.tune import Schedule, tune
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.divergence import Reference, reference
from edge_rt_distill.model.load import tensors
from edge_rt_distill.model.rows import beginning
from edge_rt_distill.progress import PartTold, quiet


@dataclass(frozen=True)
class Options:
    """``sensitivity_tokens``: of the text, for gradients. ``tuning``: None leaves the fits as they are.

    ``left_out_tokens``: of held-out text, on which each site is left out once at the end, which takes a forward pass a site; 0: not done.
    """

    forms: Forms = field(default_factory=Forms)
    costs: Costs = field(default_factory=Costs)
    sensitivity_tokens: int = 4096
    tuning: Schedule | None = field(default_factory=Schedule)
    left_out_tokens: int = 0


class Chosen(NamedTuple):
    """A site's decision. ``kinds`` and ``tensors`` are empty where it has no correction. ``microseconds``: were it alone at its input.

    ``gain``: nats a token, by leaving it out where that was done, else as estimated for the site alone. ``reason``: for people.
    """

    site: str
    kinds: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    bytes: int
    microseconds: float
    gain: float
    reason: str


class Result(NamedTuple):
    """``kl_none``, ``kl_fitted``, ``kl``: on held-out text without corrections, with those fitted one by one, with those here.
    ``norms``: norm weights that the model file is to have, where tuning changed them. ``history``: of tuning, (step, KL)."""

    compensation: Compensation
    norms: dict[str, Tensor]
    sites: list[Chosen]
    kl_none: float
    kl_fitted: float
    kl: float
    bytes: int
    microseconds: float
    budget: Budget
    history: list[tuple[int, float]]


class _Found(NamedTuple):
    """What is known of the sites when it comes to reasons."""

    best: Mapping[str, Candidate]
    taken: Mapping[str, Candidate]
    fitted: Mapping[str, sequential.Fitted]
    gains: Mapping[str, float]


def choose(
    teacher: Decoder, student: Decoder, fitting: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], budget: Budget,
    options: Options | None = None, told: PartTold = quiet,
) -> Result:  # fmt: skip
    """Corrections for ``student``, which has the teacher's architecture and quantised weights. The models are as before afterwards.

    Raises OptionError if the models differ in shape, DataError for texts without tokens, TrainingError if tuning diverges.
    """
    options = options or Options()
    _check(teacher, student, fitting, held_out)
    forms = options.forms
    minds = sensitivities(teacher, beginning(fitting, options.sensitivity_tokens, len))
    candidates = survey(teacher, student, fitting, held_out, minds, forms, partial(told, "survey"))
    taken = select(candidates, budget, options.costs)
    kinds = {site: one.kinds for site, one in taken.items()}
    fitted = sequential.fit(teacher, student, fitting, held_out, kinds, minds, forms, partial(told, "fit"))
    kept: Compensation = {site: one.correction for site, one in fitted.items() if one.correction is not None}
    held = reference(teacher, everywhere(held_out))
    none, after = held.kl(student), kl_with(student, kept, held)
    if after >= none:
        kept = {}
    norms, history = dict[str, Tensor](), list[tuple[int, float]]()
    if options.tuning and kept:
        tuned = tune(teacher, student, kept, fitting, held_out, forms.storage, options.tuning, partial(told, "tune"))
        kept, norms, history = tuned
    gains = _left_out(teacher, student, kept, norms, held_out, options.left_out_tokens, told)
    kept = {site: one for site, one in kept.items() if gains.get(site, 1.0) > 0}
    best = {one.site: one for one in sorted(candidates, key=lambda one: one.gain)}
    sites = _sites(student.sites(), kept, _Found(best, taken, fitted, gains), options)
    kl = kl_with(student, kept, held, norms)
    size, time = sum(one.bytes for one in sites), options.costs.of_all({one.site: (one.kinds, one.bytes) for one in sites if one.kinds})
    return Result(kept, norms, sites, none, after, kl, size, time, budget, history)


def _check(teacher: Decoder, student: Decoder, fitting: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]]) -> None:
    shapes = [{name: tensor.shape for name, tensor in tensors(model).items()} for model in (teacher, student)]
    if shapes[0] != shapes[1]:  # a model that was read from a file knows no more which layers of its teacher it came from
        raise OptionError("compensation needs both models in the same architecture; give the float model that was quantised")
    for text, what in ((fitting, "text to fit to"), (held_out, "held-out text to judge by")):
        if not any(len(one) > 1 for one in text):
            raise DataError(f"compensation has no {what}; give more samples, or another share of held-out ones")


@contextmanager
def with_norms(model: Decoder, norms: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, the model has these norm weights."""
    places = tensors(model)
    before = {name: places[name].detach().clone() for name in norms}
    with torch.no_grad():
        for name, values in norms.items():
            places[name].copy_(values)
        try:
            yield
        finally:
            for name, values in before.items():
                places[name].copy_(values)


def kl_with(student: Decoder, compensation: Compensation, held: Reference, norms: Mapping[str, Tensor] | None = None) -> float:
    """The KL of the corrected student, nats a token."""
    with ExitStack() as stack:
        stack.enter_context(with_norms(student, norms or {}))
        stack.enter_context(compensated(student, compensation))
        return held.kl(student)


def _left_out(
    teacher: Decoder, student: Decoder, kept: Compensation, norms: Mapping[str, Tensor], held_out: Sequence[Sequence[int]], most: int,
    told: PartTold,
) -> dict[str, float]:  # fmt: skip
    """By how much the KL rises without each site's correction."""
    if not most:
        return {}
    held = reference(teacher, everywhere(beginning(held_out, most, len)))
    whole = kl_with(student, kept, held, norms)
    found: dict[str, float] = {}
    for number, site in enumerate(kept, 1):
        found[site] = kl_with(student, {other: one for other, one in kept.items() if other != site}, held, norms) - whole
        told("leave out", number, len(kept))
    return found


def _sites(sites: Sequence[str], kept: Compensation, found: _Found, options: Options) -> list[Chosen]:
    decided = []
    for site in sites:
        one = kept.get(site)
        reason = _reason(site, found, one is not None)
        if one is None:
            decided.append(Chosen(site, (), {}, 0, 0.0, 0.0, reason))
            continue
        size, kinds = stored_bytes(one, options.forms.storage), one.kinds()
        gain = found.gains.get(site, found.taken[site].gain)
        decided.append(Chosen(site, kinds, dict(one.parts()), size, options.costs.microseconds([kinds], size), gain, reason))
    return decided


def _reason(site: str, found: _Found, kept: bool) -> str:
    best, taken, fitted, gain = found.best.get(site), found.taken.get(site), found.fitted.get(site), found.gains.get(site)
    if best is None:
        return "no form helped on held-out text"
    if taken is None:
        return f"{' + '.join(best.kinds)} would gain {best.gain:.5f}; other sites gain more for their bytes and microseconds"
    if fitted is None or fitted.correction is None:
        return f"{' + '.join(taken.kinds)} was fitted and did not help on held-out text"
    if not kept:
        return "left out: " + (f"without it the KL is lower by {-gain:.5f}" if gain is not None else "all together did not help")
    strength = f", at {fitted.strength:.2f} of its strength" if fitted.strength < 0.995 else ""
    return f"error {fitted.before:.4f} -> {fitted.after:.4f} nats a token on held-out text{strength}"
