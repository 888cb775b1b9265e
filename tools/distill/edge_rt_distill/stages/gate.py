"""When a level is done: a rule without memory of its own and without side effects.

A level's gate opens when its held-out reconstruction error stayed below the threshold for ``patience`` evaluations running, in each of
which no earlier level's error was more than ``tolerance`` above what that level ended with. A level whose gate did not open goes on to
its limit and is said to have failed; the threshold is never loosened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

PATIENCE = 3
"""Evaluations running that must count before a gate opens."""


class Gate(NamedTuple):
    """``threshold``: of the level's own error, in its unit; at the threshold is not below it. ``tolerance``: a share of earlier errors."""

    threshold: float
    patience: int = PATIENCE
    tolerance: float = 0.10


class GateState(NamedTuple):
    """``passed``: evaluations running that counted. ``evaluations``: all of the level. ``reason``: why the last did not count, or ""."""

    passed: int = 0
    evaluations: int = 0
    reason: str = ""


def judge(gate: Gate, state: GateState, error: float, earlier: Mapping[str, float], ended: Mapping[str, float]) -> GateState:
    """The state after one more evaluation.

    ``error``: of the level. ``earlier``: errors now of the levels before it; ``ended``: what they were when those levels ended, with a
    value for each name in ``earlier``. An error that is no number never counts.
    """
    reason = ""
    worse = [name for name, now in earlier.items() if not now <= ended[name] + gate.tolerance * abs(ended[name])]
    if not error < gate.threshold:
        reason = f"error {_say(error)} is not below {_say(gate.threshold)}"
    elif worse:
        name = worse[0]
        reason = f"the error of level {name} rose from {_say(ended[name])} to {_say(earlier[name])}, by more than {gate.tolerance:.0%}"
    return GateState(0 if reason else state.passed + 1, state.evaluations + 1, reason)


def is_open(gate: Gate, state: GateState) -> bool:
    """Whether enough evaluations running counted."""
    return state.passed >= gate.patience


def failure(gate: Gate, state: GateState) -> str:
    """Why a gate that is not open is not: for reports."""
    if not state.evaluations:
        return "it was never evaluated"
    return state.reason or f"the error stayed below {_say(gate.threshold)} in {state.passed} evaluations running, not in {gate.patience}"


def _say(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not a number"
