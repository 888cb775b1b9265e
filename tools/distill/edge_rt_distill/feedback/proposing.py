"""The next run: what hard cases, traffic and comparisons change in the file of the one before, and why.

*How much hard cases count.* A corrected case counts as ``BOOST`` samples of the base, all of them together as ``MOST`` of the tokens at
most. Fewer than ``FEW`` get no share of their own, as all of them may fall on the side that is only measured on. Cases without a correction
are questions: they are no text to learn from, but the teacher answers questions for the level ``behaviour`` and the library, of which
there are to be more then.

*Whether corrections of quantisation are to be calibrated anew* is told by the words of what users write (Chinese: characters; unigrams, as
calibration needs those activations that occur). The Jensen-Shannon divergence (Lin 1991, in bits: 0 to 1) between samples and traffic is
compared with that between two random halves of the samples, all of them cut to the same number of words, as a divergence of few words is
large whatever they are. If it is more than ``FARTHER`` times the largest of ``HALVES`` such halvings, traffic is other text than what was
calibrated with, and it goes into the next run's samples, from which statistics and corrections are fitted, as ``CALIBRATED`` of the tokens.
Fewer than ``ENOUGH`` words of traffic tell nothing. Of the demo's samples, random thirds were .8 to .96 times as far from the rest as its
halves from each other, Chinese from English 3 times. A domain that is new, in a language that is not, was .83 times: that is not seen.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_rt.hooks import DataError, OptionError
from edge_rt_distill.data.samples import Sample, read_samples
from edge_rt_distill.data.text import units
from edge_rt_distill.run.config import Config, DataConfig, read, to_toml
from edge_rt_distill.run.prepare import BUILT_IN

BOOST, MOST, FEW = 8, 0.25, 8
CALIBRATED = 0.1
FARTHER, HALVES, ENOUGH = 1.25, 20, 500
"""Of the rules above."""
MORE = 4
"""Times as many questions as before may be put to the teacher."""
LONGER = 1.5
"""Times as many tokens, for a student that kept too little."""
WORSE = ("checks", "robustness", "long_context_quality")
"""Metrics of a replay that are lost by what a student does not know."""
SLOWER, SMALLER = ("first_token_p50", "between_tokens_p50", "memory_peak"), 0.9
"""Those that a student with fewer parameters gains, and how much smaller it becomes at most."""


class Drifted(NamedTuple):
    """``distance``: from samples to traffic, in bits. ``halves``: the largest between two halves of the samples. ``words``: compared."""

    distance: float
    halves: float
    words: int

    @property
    def anew(self) -> bool:
        """Whether corrections are to be calibrated anew."""
        return self.words >= ENOUGH and self.distance > FARTHER * self.halves

    def __str__(self) -> str:
        measured = f"{self.distance:.3f} bits from the samples to the traffic, {self.halves:.3f} between halves of the samples"
        if self.words < ENOUGH:
            return f"not known: {self.words} words can be compared, and {ENOUGH} are needed"
        return f"{'yes' if self.anew else 'no'}: {measured}, by {self.words} words"


class Proposal(NamedTuple):
    """``why``: for each setting that changes, by its place in the file, such as ``data.samples``. ``left``: what fell short and no setting
    of a run is known to change.
    """

    config: Config
    why: Mapping[str, str]
    left: tuple[str, ...] = ()


def read_base(file: Path) -> tuple[Config, dict[str, list[Sample]]]:
    """A run's file, and the samples of each entry of ``data.samples``. Raises OptionError, RuleError, DataError."""
    config = read(file)
    sets = {}
    for name in config.data.samples:
        path = file.parent / Path(name).expanduser()
        sets[name] = list(BUILT_IN[name]()) if name in BUILT_IN else read_samples([path], minimum=1).samples
    return config, sets


def propose(
    base: Config, sets: Mapping[str, Sequence[Sample]], hard: tuple[str, Sequence[Sample]], traffic: str = "",
    comparisons: Sequence[Any] = (),
) -> Proposal:  # fmt: skip
    """The next run. ``hard``: the name in the file and the samples; ``traffic``: the name of the traffic's samples, "" if they are not to
    be learnt from; ``comparisons``: as ``edge-rt eval compare --json`` prints them or ``edge-rt replay compare --json`` writes them.

    Raises DataError for a comparison that is neither, OptionError for names that are there already.
    """
    name, cases = hard
    data, why = base.data, {}
    taken = [one for one in (name, traffic) if one in data.samples]
    if taken:
        raise OptionError(f"the run learns from {taken[0]} already; write what is new to another file")
    corrected = sum(bool(one.text or one.answer) for one in cases)
    questions, before = len(cases) - corrected, sum(map(len, sets.values()))
    why["data.samples"] = f"{len(cases)} hard cases, {corrected} of them corrected"
    share = min(MOST, BOOST * corrected / (BOOST * corrected + before)) if corrected >= FEW else 0.0
    shares = {name: share, **({traffic: CALIBRATED} if traffic else {})}
    data = replace(data, samples=(*data.samples, *shares))
    if any(shares.values()) or data.weights:
        data = replace(data, weights=_weights(base.data, sets, list(shares.values())))
        why["data.weights"] = "; ".join(f"{share:.1%} of the tokens from {one}" for one, share in shares.items())
    if traffic:
        why["data.samples"] += f"; {traffic}, as statistics and corrections are fitted to samples, and traffic is other text"
    config = replace(base, data=data, run=replace(base.run, folder=""))
    if base.run.folder:
        why["run.folder"] = "of its own: what the run before made stays"
    if questions:
        asking = questions + sum(bool(one.prompt) for some in sets.values() for one in some)
        prompts = max(base.behaviour.prompts, min(asking, MORE * base.behaviour.prompts))
        config = replace(config, behaviour=replace(base.behaviour, prompts=prompts))
        why["behaviour.prompts"] = f"the teacher answers {prompts} of {asking} questions; {questions} hard cases have no other answer"
    return _answered(Proposal(config, why), _shortfalls(comparisons))


class Shortfalls(NamedTuple):
    """What a student lost too much of: ``quality``, as it is said, and metrics of service with the least retention of each."""

    quality: Sequence[str]
    service: Mapping[str, float]


def _shortfalls(comparisons: Sequence[Any]) -> Shortfalls:
    quality: list[str] = []
    service: dict[str, float] = {}
    try:
        for one in comparisons:
            if isinstance(one, list):  # of a replay: an entry for each load
                for load in one:
                    kept = {name: float(load["metrics"][name]["retention"]["value"]) for name in load["short"]}
                    quality += [f"kept {kept[name]:.0%} of {name} ({load['load']})" for name in kept if name in WORSE]
                    service |= {name: min(kept[name], service.get(name, 1.0)) for name in kept if name not in WORSE}
            else:
                quality += [str(reason) for reason in one["fails"]]
    except (KeyError, TypeError, ValueError) as error:
        way = "`edge-rt eval compare ... --min-retention 0.95 --json` or `edge-rt replay compare ... --json FILE`"
        raise DataError(f"the comparison does not say what fails; write it with {way}") from error
    return Shortfalls(quality, service)


def _answered(found: Proposal, short: Shortfalls) -> Proposal:
    """More tokens for a student that knows too little, fewer parameters for one that is too slow or too large."""
    config, why = found.config, dict(found.why)
    if short.quality:
        token = config.distil.token
        config = replace(config, distil=replace(config.distil, token=replace(token, tokens=round(LONGER * token.tokens))))
        why["distil.token.tokens"] = f"{token.tokens} were too few: the student {'; '.join(short.quality)}"
    if slow := {name: kept for name, kept in short.service.items() if name in SLOWER}:
        parameters = config.student.parameters
        smaller = max(0.05, round(parameters * max(SMALLER, min(slow.values())), 3))
        config = replace(config, student=replace(config.student, parameters=smaller))
        said = ", ".join(f"{kept:.0%} of {name}" for name, kept in slow.items())
        why["student.parameters"] = f"{parameters} were too many: the student kept {said}"
    return Proposal(config, why, tuple(name for name in short.service if name not in SLOWER))


def _weights(data: DataConfig, sets: Mapping[str, Sequence[Sample]], shares: Sequence[float]) -> tuple[int, ...]:
    """Weights in which what is new has its ``shares``, and all else the rest, in the proportions that it had."""
    written = (data.rollouts + data.chats) * data.rollout_tokens
    sizes = [sum(len(units(one.content)) for one in some) for some in sets.values()] + ([written] if written else [])
    old = list(data.weights) or sizes
    rest = (1 - sum(shares)) / sum(old)
    ordered = [rest * one for one in old[: len(sets)]] + list(shares) + [rest * one for one in old[len(sets) :]]
    scale = 1000 / max(ordered)
    return tuple(max(1, round(scale * one)) if one else 0 for one in ordered)


def written(found: Proposal) -> str:
    """The file, with why before each setting that changed."""
    lines, table = [], ""
    for line in to_toml(found.config, explained=False).splitlines():
        if line.startswith("["):
            table = f"{line.strip('[]')}."
        name = f"{table}{line.split(' = ')[0]}"
        if name in found.why:
            lines.append(f"# {' '.join(found.why[name].split())}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def drifted(samples: Sequence[Sample], texts: Sequence[str], seed: int = 0) -> Drifted:
    """How far the words of ``texts`` are from those of samples. Raises DataError for fewer than four samples, which have no halves."""
    if len(samples) < 4:
        raise DataError(f"{len(samples)} samples have no halves to compare traffic with; name a run with more")
    dice = random.Random(f"halves {seed}")
    own = [units(one.content) for one in samples]
    traffic = [units(text) for text in texts]
    dice.shuffle(traffic)
    halves, distances, fewest = [], [], sum(map(len, traffic))
    for _ in range(HALVES):
        order = dice.sample(range(len(own)), len(own))
        first, second = ([own[at] for at in some] for some in (order[::2], order[1::2]))
        size = min(fewest, sum(map(len, first)), sum(map(len, second)))
        left, right, other = (_counted(some, size) for some in (first, second, traffic))
        halves.append(divergence(left, right))
        distances.append(divergence(left, other))
    return Drifted(float(np.mean(distances)), max(halves), size)


def _counted(texts: Sequence[Sequence[str]], size: int) -> Counter[str]:
    """The first ``size`` words of some texts, counted."""
    return Counter([word for text in texts for word in text][:size])


def divergence(first: Mapping[str, int], second: Mapping[str, int]) -> float:
    """The Jensen-Shannon divergence of two distributions given by counts, in bits: 0 for the same, 1 for such that share nothing."""
    words = sorted(first.keys() | second.keys())
    shares = np.array([[one.get(word, 0) for word in words] for one in (first, second)], dtype=np.float64)
    shares /= np.maximum(shares.sum(1, keepdims=True), 1)
    mean = shares.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, shares * np.log2(shares / mean), 0.0)
    return float(terms.sum(1).mean())


def relative(path: Path, file: Path) -> str:
    """A path as the run's file has it. Raises OptionError for a name that means something else there."""
    found = os.path.relpath(path.resolve(), file.resolve().parent)
    if found in BUILT_IN:
        raise OptionError(f"{found} is the name of samples that are built in; name the file otherwise")
    return found


def read_comparison(path: Path) -> Any:
    """What ``edge-rt eval compare --json`` printed or ``edge-rt replay compare --json`` wrote. Raises DataError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} has no comparison ({error}); write one with `edge-rt eval compare TEACHER STUDENT --json`") from error
