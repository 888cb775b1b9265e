"""What changes with the step: functions of it, so that a resumed run needs to remember none of it."""

from __future__ import annotations

import math

from edge_rt_distill.stages.levels import Level


def learning_rate(level: Level, step: int) -> float:
    """Of step 0, 1, ...: a straight line up, then half a cosine down to ``floor`` x the highest at the limit (Loshchilov and Hutter 2016,
    arXiv:1608.03983)."""
    warm = max(1, round(level.warmup * level.steps)) if level.warmup else 0
    if step < warm:
        return level.learning_rate * (step + 1) / warm
    done = min(1.0, (step - warm) / max(1, level.steps - warm))
    return level.learning_rate * (level.floor + (1 - level.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def taid_mix(level: Level, step: int) -> float:
    """TAID's t: a straight line from the level's ``mix`` to 1 at its limit. (The paper also has an adaptive rise,
    which would need a state of its own.)"""
    return level.token.mix + (1 - level.token.mix) * min(1.0, step / level.steps)
