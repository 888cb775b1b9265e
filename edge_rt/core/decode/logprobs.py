"""Logits of a whole text, and log-probabilities of tokens, from the model's logits before any sampling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edge_rt.core.engine import Part
from edge_rt.errors import NativeError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import numpy.typing as npt

    from edge_rt.core.engine import Engine, Row

LOGITS_CHUNK = 128
"""Tokens per step when logits of every token are wanted: 128 x 49,152 float32 are 25 MB."""


def text_logits(engine: Engine, lock: AbstractContextManager[object], tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits after every token of a text of its own: float32 [n_tokens, n_vocab]. Raises ContextError, OptionError."""
    if not tokens:
        raise OptionError("logits of no tokens were asked for; give at least one")
    rows = []
    with lock:
        sequence = engine.new_sequence()
        try:
            for start in range(0, len(tokens), LOGITS_CHUNK):
                (part,) = engine.step([Part(sequence, tokens[start : start + LOGITS_CHUNK], "all")])
                assert part is not None, "all rows were asked for"
                rows.append(np.array(part))
        finally:
            engine.free_sequence(sequence)
    return np.concatenate(rows)


def chosen_logprobs(rows: npt.NDArray[np.float32], tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    """The natural log-probability of a token in each row: of logits float32 [n, n_vocab], float64 [n].

    Raises NativeError for logits with NaN or +inf.
    """
    if not len(tokens):
        return np.empty(0)
    shifted, total = _shifted(rows)
    found: npt.NDArray[np.float64] = shifted[np.arange(len(tokens)), list(tokens)].astype(np.float64) - np.log(total)
    return found


def _shifted(logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Logits [..., n_vocab] less the maximum of each row, in float32 (exact for nearby values), and the sum of their exponentials, in
    float64. Raises NativeError for logits with NaN or +inf.
    """
    peak = logits.max(-1, keepdims=True)
    if not np.isfinite(peak).all():
        raise NativeError(f"the logits hold {peak[~np.isfinite(peak)][0]}; the model file or the computation is damaged")
    shifted = logits - peak
    return shifted, np.asarray(np.exp(shifted).sum(-1, dtype=np.float64))


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
    shifted, exponentials = _shifted(logits)
    total = math.log(exponentials)
    n = min(n, logits.size)
    if n == 0:
        return float(shifted[token]) - total, ()
    least = np.partition(shifted, -n)[-n]
    above = np.flatnonzero(shifted >= least)
    best = above[np.argsort(-shifted[above], kind="stable")][:n]
    return float(shifted[token]) - total, tuple((int(t), float(shifted[t]) - total) for t in best)
