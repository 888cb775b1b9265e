"""Reading and pooling texts, exactly: the null engine's hidden states are the same however they are computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.core.engine import SequenceBatch
from edge_rt.core.generate.scoring import POOLINGS, TextReader, finished, pooling_of, tokens_of
from edge_rt.errors import ContextOverflow, NativeError, OptionError, OutOfMemory
from edge_rt.testing.null_device import BOS, EOS, NullEngine, NullVocab

tokens = st.lists(st.integers(0, 255), min_size=1, max_size=80)


def read(reader: TextReader, text: list[int], pooling: Any, sizes: list[int]) -> Any:
    reader.begin(text, pooling)
    found, turn = None, 0
    while found is None:
        found = reader.read(sizes[min(turn, len(sizes) - 1)])
        turn += 1
    return found


def states(text: list[int]) -> Any:
    engine = NullEngine()
    return engine.hidden([SequenceBatch(engine.new_sequence(), text, "all")])[0]


@given(texts=st.lists(tokens, min_size=1, max_size=4), sizes=st.lists(st.integers(1, 90), min_size=1, max_size=5))
def test_poolings_whatever_the_pieces_and_the_texts_before(texts: list[list[int]], sizes: list[int]) -> None:
    reader = TextReader(NullEngine())
    for text in texts:
        every = states(text)
        expected = {"mean": every.mean(axis=0, dtype=np.float64).astype(np.float32), "cls": every[0], "last": every[-1]}
        for pooling in POOLINGS:
            found = read(reader, text, pooling, sizes)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected[pooling], rtol=1e-6)
            np.testing.assert_array_equal(found, read(reader, text, pooling, [1]))


def test_nothing_is_left_behind() -> None:
    engine = NullEngine()
    reader = TextReader(engine)
    read(reader, [1, 2, 3], "last", [2])
    assert engine.memory().cache
    reader.close()
    reader.close()
    assert not engine._sequences
    assert read(reader, [1], "mean", [1]) is not None, "it goes on with another sequence"


@given(numbers=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=9), dimensions=st.none() | st.integers(1, 9))
def test_what_is_handed_out(numbers: list[float], dimensions: int | None) -> None:
    vector = np.array(numbers, np.float32)
    if dimensions is not None and dimensions > len(vector):
        with pytest.raises(OptionError, match="ask for fewer"):
            finished(vector, dimensions=dimensions)
        return
    plain = finished(vector, normalize=False, dimensions=dimensions)
    np.testing.assert_array_equal(plain, vector[:dimensions])
    found = finished(vector, dimensions=dimensions)
    assert found.dtype == np.float32
    length = math.sqrt(math.fsum(float(x) ** 2 for x in plain))
    np.testing.assert_allclose(np.linalg.norm(found.astype(np.float64)), 1 if length else 0, atol=1e-6)
    if length:
        np.testing.assert_allclose(found * length, plain, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none(bad: float) -> None:
    with pytest.raises(NativeError, match="damaged"):
        finished(np.array([1, bad], np.float32))


@pytest.mark.parametrize("dimensions", [0, -1, 3])
def test_impossible_dimensions(dimensions: int) -> None:
    with pytest.raises(OptionError, match="has 2 numbers"):
        finished(np.ones(2, np.float32), dimensions=dimensions)


def header(**metadata: Any) -> Any:
    found = {f"qwen3.{name.replace('__', '.')}": value for name, value in metadata.items()}
    return SimpleNamespace(architecture="qwen3", get=lambda key, default=None: found.get(key, default))


def test_what_the_file_says() -> None:
    assert [pooling_of(header(pooling_type=kind)) for kind in (None, 0, 1, 2, 3)] == ["mean", "mean", "mean", "cls", "last"]
    assert pooling_of(header(pooling_type=4), "cls") == "cls"
    for kind in (4, 5, -7, "last", [3]):
        with pytest.raises(OptionError):
            pooling_of(header(pooling_type=kind))
    with pytest.raises(OptionError, match="both directions"):
        pooling_of(header(attention__causal=False), "mean")
    with pytest.raises(OptionError, match="no pooling rank; choose from mean, cls, last"):
        pooling_of(header(), "rank")


def test_the_tokens_around_a_text() -> None:
    vocab: Any = NullVocab()
    assert tokens_of(vocab, "ab", 0, 9) == [BOS, *b"ab"]
    vocab.add_eos = True
    assert tokens_of(vocab, "ab", 0, 9) == [BOS, *b"ab", EOS]
    assert tokens_of(vocab, "ab<|end|>", 0, 9) == [BOS, *b"ab", EOS], "not twice"
    assert tokens_of(vocab, [5, 6], 0, 2) == [5, 6], "tokens stay as they are"
    with pytest.raises(ContextOverflow, match="text 3 has 4 tokens and the context 3") as caught:
        tokens_of(vocab, "ab", 2, 3)
    assert (caught.value.needed, caught.value.available) == (4, 3)
    for empty in ("", []):
        with pytest.raises(OptionError, match="text 1 is empty"):
            tokens_of(vocab, empty, 0, 9)
    with pytest.raises(OptionError, match="outside the vocabulary"):
        tokens_of(vocab, [260], 0, 9)


def test_an_engine_without_hidden_states() -> None:
    with pytest.raises(OptionError, match="the engine null makes no embeddings"):
        TextReader(SimpleNamespace(info=NullEngine().info))  # type: ignore[arg-type]


class _Scarce(NullEngine):
    """Has no memory for the first attempts."""

    failures, left_behind = 1, 0

    def hidden(self, parts: Any) -> Any:
        if self.failures:
            self.failures -= 1
            super().hidden([part._replace(tokens=part.tokens[: self.left_behind]) for part in parts])
            raise OutOfMemory("no memory")
        return super().hidden(parts)


def test_memory_is_asked_for_once() -> None:
    asked: list[int] = []

    def relieve() -> bool:
        asked.append(1)
        return len(asked) == 1

    np.testing.assert_array_equal(read(TextReader(_Scarce(), relieve), [1, 2], "last", [2]), states([1, 2])[-1])
    assert asked == [1]
    with pytest.raises(OutOfMemory):
        read(TextReader(_Scarce(), relieve), [1, 2], "last", [2])
    half: Callable[[], _Scarce] = type("Half", (_Scarce,), {"left_behind": 1})
    with pytest.raises(OutOfMemory):  # some of the tokens are in their cells: feeding them again would be another text
        read(TextReader(half(), lambda: True), [1, 2], "last", [2])


def test_a_model_embeds(open_null: Callable[..., Any]) -> None:
    with open_null(context=40) as model:
        found = model.embed(["ab", "abc", [256, *b"ab"]])
        assert found.shape == (3, 8)
        np.testing.assert_array_equal(found[0], found[2])
        assert not np.array_equal(found[0], found[1])
        assert model.embed([]).shape == (0, 8)
        with pytest.raises(ContextOverflow, match="text 2 has 41 tokens"):
            model.embed(["a", "x" * 40])
        assert model.memory().cache == 0
