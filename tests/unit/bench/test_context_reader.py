"""A reader takes no context for another, changes none, and leaves nothing behind; methods get the tokens they asked for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.context import retrieval
from bench.context.methods import LOSSES, METHODS, RANKS, UNBOUNDED
from bench.context.prompt import Prompt, kept
from bench.context.reader import KEPT, Reader
from bench.context.runner import Item, evaluate
from edge_rt.core.context.history import segments
from edge_rt.core.engine import SequenceBatch
from edge_rt.testing.null_device import NullEngine

_TEXTS = ["One.", "Two.", "Three.", "Four."]
_PROMPT = Prompt([7], segments([{"role": "user", "content": text} for text in _TEXTS]), [[10, 11, 12]] * 4, [20, 21], 3, 1)


class _Engine(NullEngine):
    """Writes down what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.fed: list[list[int]] = []

    def step(self, parts: Any) -> Any:
        self.fed += [list(part.tokens) for part in parts]
        return super().step(parts)


@pytest.fixture
def engine() -> _Engine:
    return _Engine()


@pytest.fixture
def reader(engine: _Engine) -> Reader:
    vocab = SimpleNamespace(is_eog=lambda token: False)
    return Reader(SimpleNamespace(engine=engine, info=engine.info, vocab=vocab, detokenize=lambda tokens: "x" * len(tokens)))  # type: ignore[arg-type]


def test_a_context_is_read_once_and_never_changed(engine: _Engine, reader: Reader) -> None:
    answers = []
    for _ in range(2):
        with reader.after([1, 2, 3]) as sequence:
            assert engine.length(sequence) == 3
            answers.append(reader.answer(sequence, [4, 5], 2))
    assert engine.fed.count([1, 2, 3]) == 1
    assert engine.fed.count([4, 5]) == 2
    assert answers[0] == answers[1] == "xx"


def test_contexts_that_differ_in_one_token_are_not_confused(engine: _Engine, reader: Reader) -> None:
    for tokens in ([1, 2, 3], [1, 2, 4], [1, 2], [1, 2, 3]):
        with reader.after(tokens) as sequence:
            fresh = engine.new_sequence()
            (wanted,) = engine.step([SequenceBatch(fresh, [*tokens, 9])])
            (found,) = engine.step([SequenceBatch(sequence, [9])])
            assert wanted is not None
            assert found is not None
            assert np.array_equal(wanted[0], found[0])


def test_few_contexts_are_kept_and_none_after_closing(engine: _Engine, reader: Reader) -> None:
    empty = engine.memory().cache
    with reader:
        for token in range(KEPT + 3):
            with reader.after([token] * 10):
                pass
        assert engine.memory().cache == KEPT * 10 * engine.cell_bytes
    assert engine.memory().cache == empty


def test_losses_are_those_of_the_tokens_after_the_first(engine: _Engine, reader: Reader) -> None:
    with reader.after([1, 2]) as sequence:
        found = reader.losses(sequence, [3, 4, 5])
    fresh = engine.new_sequence()
    (rows,) = engine.step([SequenceBatch(fresh, [1, 2, 3, 4], "all")])
    logits = np.asarray(rows, dtype=np.float64)[2:]
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found == pytest.approx([-math.log(odds[0, 4]), -math.log(odds[1, 5])])


def test_every_method_answers_and_each_reads_a_text_once(engine: _Engine, reader: Reader) -> None:
    items = [Item("x", 13, _PROMPT._replace(question=[question]), lambda answer: len(answer) / 3) for question in (30, 31)]
    scores = list(evaluate(reader, items, METHODS, (0.7, 0.4)))
    bounded = len(METHODS) - len(UNBOUNDED)
    assert len(scores) == 2 * (2 * bounded + len(UNBOUNDED))
    assert {score.value for score in scores} == {1.0}
    assert engine.fed.count(_PROMPT.context) == 1
    assert [score.method for score in scores[:2]] == ["full", "full"]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in UNBOUNDED])
def test_what_a_method_keeps_is_what_the_model_reads(name: str, engine: _Engine, reader: Reader) -> None:
    METHODS[name](reader, _PROMPT, 9)
    assert len(engine.fed[0]) == 9
    assert engine.fed[1] == _PROMPT.question
    engine.fed.clear()
    LOSSES[name](reader, _PROMPT, 9)
    assert engine.fed == [_PROMPT.question]  # the context is still kept


def test_a_budget_that_holds_everything_changes_nothing() -> None:
    assert kept(_PROMPT, 13, lambda prompt: [0.0] * len(prompt.parts)) == _PROMPT.context


def test_the_survey_finds_every_answer_in_the_whole_text_and_fewer_in_a_tenth(engine: _Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters are tokens here."""
    model = SimpleNamespace(engine=engine, tokenize=lambda text, bos: [ord(c) for c in text], detokenize=lambda ids: "".join(map(chr, ids)))
    monkeypatch.setattr(retrieval, "BUDGETS", (1.0, 0.1))
    found = list(retrieval.survey(Reader(model), 1000, 8000))  # type: ignore[arg-type]
    assert {score.value for score in found if score.budget == 1.0} == {1.0}
    assert 0.0 <= sum(score.value for score in found if score.budget == 0.1) < len(found) / 4
    assert {score.method for score in found} == set(RANKS)
    assert engine.fed == []
