"""What each level of distillation adds: the same cut taught by more and more of them, with the same tokens in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from edge_rt_distill.evaluate.measures import divergence, measured
from edge_rt_distill.run.config import LEVELS, DistilConfig
from edge_rt_distill.run.mixture import held_out
from edge_rt_distill.run.steps import Place, Step
from edge_rt_distill.run.teach import TEACHING, levels, score_of, teach
from edge_rt_distill.run.workshop import Workshop

VARIANTS: Mapping[str, int] = {"ablation-0": 0, "ablation-1": 1, "ablation-2": 2, "ablation-3": 3, "ablation-4": 4}
"""Step -> how many of the levels are in it."""


def variant(config: DistilConfig, count: int) -> DistilConfig:
    """The first ``count`` levels; the tokens of those left out go to the first, so that the sum stays. 0: no training."""
    left_out = {name: replace(getattr(config, name), tokens=0) for name in LEVELS[count:]}
    changed = replace(config, **left_out)
    if not count:
        return changed
    spare = sum(getattr(config, name).tokens for name in LEVELS[count:])
    return replace(changed, token=replace(config.token, tokens=config.token.tokens + spare))


def ablation_steps(shop: Workshop) -> list[Step]:
    """A step for each variant. Gates are looked at and do not end a level: all variants learn from as many tokens."""
    return [_step(shop, name, count) for name, count in VARIANTS.items()]


def _step(shop: Workshop, name: str, count: int) -> Step:
    config = shop.config
    said = variant(config.distil, count)
    settings = {**asdict(said), "side": config.student.side_rank, "seed": config.run.seed, "length": config.data.length}

    def run(place: Place) -> Mapping[str, Any]:
        student, results = teach(shop, place, levels(said), to_limit=True)
        found = divergence(student, shop.seen, held_out(shop, place.need("data")))
        score = score_of(shop, place)(student)
        ended = {f"gate of {one.name}": "open" if one.opened else "shut" for one in results}
        errors = {f"{one.name} error": one.errors.get(one.name) for one in results}
        tokens = sum(one.tokens for one in results)
        return {"levels": count, "tokens": tokens, **measured(found), "kl error": found.kl_error, "score": score.value, **ended, **errors}

    return Step(name, run, settings, TEACHING)
