"""Tokens in, logits out, and whether two of them are the same to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_rt.core.engine import Engine, SequenceBatch


def random_tokens(engine: Engine, n: int, seed: int = 0) -> list[int]:
    """The same for the same seed and vocabulary."""
    return [int(t) for t in np.random.default_rng(seed).integers(0, engine.info.n_vocab, n)]


def feed(engine: Engine, sequence: int, tokens: list[int]) -> Any:
    """Logits of every token, as a copy."""
    (logits,) = engine.step([SequenceBatch(sequence, tokens, "all")])
    return np.array(logits)


def same_bits(ours: Any, theirs: Any) -> None:
    """Equal to the last bit, and not trivially so."""
    assert np.isfinite(theirs).all()
    assert theirs.std() > 1e-3
    np.testing.assert_array_equal(np.asarray(ours).view(np.uint32), theirs.view(np.uint32))
