"""The four levels as data: what each trains on, how long at most, and what it must reach.

A level keeps the terms of those before it, with less weight, so that what was learnt stays. The first term of a level leads: the others
are scaled to its size (losses/balance.py) and then weighted.

Thresholds are for SmolLM2-135M cut by about a fifth, in the unit of each level's error (stages/errors.py); a run's file may set others
before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from edge_rt.hooks import OptionError
from edge_rt_distill.losses.token import TokenOptions, check_options
from edge_rt_distill.stages.gate import Gate

Term = Literal["token", "hidden", "attention", "imitation", "preference", "on_policy"]
TERMS: tuple[Term, ...] = ("token", "hidden", "attention", "imitation", "preference", "on_policy")
LevelName = Literal["token", "hidden", "attention", "behaviour"]
OPTIMISERS = ("adamw", "sgd")


class Level(NamedTuple):
    """One level.

    ``terms``: weights of loss terms, the leading one first. ``steps``: the limit. ``learning_rate``: the highest, after ``warmup`` (a
    share of the steps); it falls along a cosine to ``floor`` times that. ``every``: steps between evaluations. ``accumulate``: batches in
    a step. ``frozen``: patterns (as of file names) of parameters that are not trained, e.g. ``token_embd.*``. ``score_patience``:
    evaluations without a better composite score until the level stops, 0: never for that reason. ``token``: of the token term; TAID's
    ``mix`` rises from its value there to 1. ``on_policy_every``: batches between those that use the student's own answers.
    """

    name: LevelName
    terms: Mapping[Term, float]
    gate: Gate
    steps: int = 100
    learning_rate: float = 3e-4
    warmup: float = 0.05
    floor: float = 0.1
    every: int = 20
    accumulate: int = 1
    clip: float = 1.0
    optimiser: str = "adamw"
    weight_decay: float = 0.0
    frozen: tuple[str, ...] = ()
    score_patience: int = 0
    token: TokenOptions = TokenOptions(head=32)
    on_policy_every: int = 4


LEVELS: tuple[Level, ...] = (
    Level("token", {"token": 1.0}, Gate(0.30), steps=240),
    Level("hidden", {"token": 1.0, "hidden": 0.5}, Gate(0.06), steps=120, learning_rate=2e-4),
    Level("attention", {"token": 1.0, "hidden": 0.25, "attention": 0.25}, Gate(0.10), steps=80, learning_rate=1.5e-4),
    Level(
        "behaviour", {"token": 1.0, "imitation": 0.5, "preference": 0.1, "on_policy": 0.5}, Gate(0.15), steps=80, learning_rate=1e-4
    ),
)  # fmt: skip
"""In the order in which they are run."""


def check_level(level: Level) -> None:
    """Raises OptionError for a level that cannot be run as it is described."""
    unknown = [term for term in level.terms if term not in TERMS]
    if unknown or not level.terms:
        said = f"has the unknown term {unknown[0]}" if unknown else "has no loss term"
        raise OptionError(f"level {level.name} {said}; choose of {', '.join(TERMS)}")
    for name in ("steps", "every", "accumulate", "on_policy_every"):
        if getattr(level, name) < 1:
            raise OptionError(f"level {level.name}: {name} = {getattr(level, name)}; give 1 or more")
    for name in ("learning_rate", "clip"):
        if not 0 < getattr(level, name) < float("inf"):
            raise OptionError(f"level {level.name}: {name} = {getattr(level, name)}; give a number above 0")
    if not 0 <= level.warmup <= 1 or not 0 <= level.floor <= 1:
        raise OptionError(f"level {level.name}: warmup = {level.warmup} and floor = {level.floor} are shares; give 0 to 1")
    negative = [term for term, weight in level.terms.items() if not weight >= 0]
    if negative or next(iter(level.terms.values())) <= 0:
        raise OptionError(f"level {level.name}: weights of terms are not negative, and the leading one is above 0; change them")
    if level.optimiser not in OPTIMISERS:
        raise OptionError(f"level {level.name}: no optimiser is named {level.optimiser}; choose one of {', '.join(OPTIMISERS)}")
    if level.gate.patience < 1:
        raise OptionError(f"level {level.name}: a gate needs at least one evaluation; set its patience to 1 or more")
    check_options(level.token)
