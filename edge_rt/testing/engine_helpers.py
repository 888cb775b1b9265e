"""For tests of engines: random tokens, sequences that are freed at the end, logits that outlive the step, and what a plugin opens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_rt.hooks import EmbedsText, Engine, EngineOptions, ModelFile, SequenceBatch

if TYPE_CHECKING:
    import numpy.typing as npt
    import pytest

    from edge_rt.hooks import Logits, Wanted


def tokens_of(engine: Engine, n: int, seed: int = 1) -> list[int]:
    """n random tokens."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, engine.info.n_vocab, n)]


@contextlib.contextmanager
def sequences(engine: Engine, n: int) -> Iterator[list[int]]:
    """n new sequences, freed at the end."""
    opened = [engine.new_sequence() for _ in range(n)]
    yield opened
    for sequence in opened:
        engine.free_sequence(sequence)


def kept_rows(result: Logits | None) -> npt.NDArray[np.float32]:
    """A part's logits, kept beyond the next step."""
    assert result is not None, "logits were asked for and did not come"
    whole = np.array(result)
    for form in (result, result.copy()):
        assert len(form) == len(whole)
        assert all(np.array_equal(form[i], row, equal_nan=True) for i, row in enumerate(whole)), "a row alone differs"
    return whole


def feed(engine: Engine, sequence: int, tokens: Sequence[int], size: int | None = None, want: Wanted = "all") -> npt.NDArray[np.float32]:
    """Feed tokens, ``size`` at a time, and return the logits of all: float32 [n, n_vocab]."""
    rows = [np.empty((0, engine.info.n_vocab), np.float32)]
    for start in range(0, len(tokens), size or len(tokens) or 1):
        (result,) = engine.step([SequenceBatch(sequence, tokens[start : start + (size or len(tokens))], want)])
        rows.append(kept_rows(result))
    return np.concatenate(rows)


def feed_new(engine: Engine, tokens: Sequence[int], size: int | None = None) -> npt.NDArray[np.float32]:
    """``feed`` with a sequence of its own."""
    with sequences(engine, 1) as (sequence,):
        return feed(engine, sequence, tokens, size)


def hidden_after(engine: EmbedsText, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """The hidden state after all tokens, in a sequence of their own: float32 [1, n_embd]."""
    assert isinstance(engine, Engine)
    with sequences(engine, 1) as (sequence,):
        (rows,) = engine.hidden([SequenceBatch(sequence, tokens, "last")])
        return np.array(rows)


class Opening(NamedTuple):
    """One call of ``open_ggml_engine``; ``more``: its keywords, ``accelerator`` and ``name``."""

    model: ModelFile
    options: EngineOptions
    more: dict[str, Any]


def note_openings(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Opening]:
    """Until the test ends, a plugin's module that has imported ``open_ggml_engine`` opens nothing, and what it asked for is noted.

    What it gets is the list's last entry. Raises AttributeError for a module that has not imported it.
    """
    found: list[Opening] = []

    def note(model: ModelFile, options: EngineOptions, **more: Any) -> Opening:
        found.append(Opening(model, options, more))
        return found[-1]

    monkeypatch.setattr(module, "open_ggml_engine", note)
    return found
