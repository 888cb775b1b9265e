"""Log-probabilities of tokens, from the model's logits before any sampling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edge_rt.errors import NativeError, OptionError

if TYPE_CHECKING:
    from edge_rt.core.engine import Row


def token_logprobs(row: Row, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The natural log-probability of ``token`` and the ``n`` likeliest tokens with theirs, best first (ties: the lowest id).

    ``row`` is float32 [n_vocab]. Stable: the maximum is taken off in float32 (exact for nearby values), the exponentials are
    summed in float64; the result is good to about 1e-6. A token with logit -inf has log-probability -inf.
    Raises OptionError for a token out of range or a negative ``n``, NativeError for logits with NaN or +inf.
    """
    logits = np.asarray(row)
    if n < 0:
        raise OptionError(f"logprobs is {n}; allowed: 0 (off) or more")
    if not 0 <= token < logits.size:
        raise OptionError(f"token {token} is out of range; this model has tokens 0 to {logits.size - 1}")
    peak = logits.max()
    if not math.isfinite(peak):
        raise NativeError(f"the logits hold {peak}; the model file or the computation is damaged")
    shifted = logits - peak
    total = math.log(np.exp(shifted).sum(dtype=np.float64))
    n = min(n, logits.size)
    if n == 0:
        return float(shifted[token]) - total, ()
    least = np.partition(shifted, -n)[-n]
    above = np.flatnonzero(shifted >= least)
    best = above[np.argsort(-shifted[above], kind="stable")][:n]
    return float(shifted[token]) - total, tuple((int(t), float(shifted[t]) - total) for t in best)
