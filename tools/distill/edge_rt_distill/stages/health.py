"""Signs that training has gone wrong."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

WINDOW = 50
"""Steps whose losses are remembered."""
LEAST = 10
"""Steps before a loss is called too high: there is no usual one yet."""


def complaint(loss: float, recent: Sequence[float], times: float) -> str:
    """Why a step's loss is a reason to stop, or "": it is no number, or more than ``times`` the median of the last WINDOW ones."""
    if not math.isfinite(loss):
        return "the loss is not a number"
    if len(recent) < LEAST:
        return ""
    usual = statistics.median(recent[-WINDOW:])
    if loss > times * usual and loss > 1e-6:  # of losses that are nothing but rounding any multiple is fine
        return f"the loss rose to {loss:.4g}, more than {times:g} times its median of {usual:.4g}"
    return ""
