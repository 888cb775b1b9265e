"""Sequences that decode side by side go through attention as one: each gets the bits that it gets apart.

Beside them run their twins, in the same steps without stacks: products of weights may add up in another order for another number of
columns, attention may not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import bits
import numpy as np
import pytest
from bits import feed, random_tokens

from edge_rt.core.engine import SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.graph import layers
from edge_rt.errors import OptionError
from edge_rt.hooks import EngineOptions

LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["by-cell", "transposed"])
ROUNDS = 12


@contextmanager
def opened(path: Path, *, transposed: bool, key_type: str = "f16", threads: int = 1) -> Iterator[GgmlEngine]:
    options = EngineOptions(threads=threads, context=1024, key_type=key_type, extra={"ggml.transposed_values": transposed})
    with ModelFile.open(path) as file, closing(GgmlEngine(file, options)) as engine:
        yield engine


def step(engine: GgmlEngine, parts: list[tuple[int, list[int]]]) -> list[Any]:
    """Logits of all tokens of the sequences, as copies."""
    return [np.array(rows) for rows in engine.step([SequenceBatch(sequence, tokens, "all") for sequence, tokens in parts])]


def apart(engine: GgmlEngine, parts: list[tuple[int, list[int]]]) -> list[Any]:
    """The same, each sequence for itself."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layers, "runs", lambda shapes, caches: [(i, i) for i in range(len(shapes))])
        found = step(engine, parts)
    engine._last = None
    return found


def begun(engine: GgmlEngine, lengths: list[int]) -> list[int]:
    """Sequences with so many tokens of their own."""
    sequences = [engine.new_sequence() for _ in lengths]
    for number, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        feed(engine, sequence, random_tokens(engine, length, seed=number))
    return sequences


def stacks(engine: GgmlEngine) -> list[int]:
    """How many sequences each slot of the last graph carried."""
    return [shape.sequences for shape in next(reversed(engine._graphs._graphs.values())).shapes]


def same_bits(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        bits.same_bits(ours, theirs)


@pytest.fixture
def model(random_model: Callable[..., Path]) -> Path:
    return random_model("llama", head_dim=32, context=1024)


@LAYOUTS
@pytest.mark.parametrize("key_type", ["f16", "q8_0"])
@pytest.mark.parametrize("lengths", [[5, 40, 230, 12, 7], [300, 290, 310], [250, 30, 251]], ids=["short", "longer", "growing"])
@pytest.mark.parametrize("threads", [1, 2])
def test_each_of_a_stack_gets_what_it_gets_apart(model: Path, *, transposed: bool, key_type: str, lengths: list[int], threads: int) -> None:
    """Of the growing ones two move to larger caches on the way. Over 512 cells in F16 flash attention divides what it adds up."""
    with opened(model, transposed=transposed, key_type=key_type, threads=threads) as engine:
        sequences, twins = begun(engine, lengths), begun(engine, lengths)
        for number in range(ROUNDS):
            tokens = [[token] for token in random_tokens(engine, len(lengths), seed=100 + number)]
            found = step(engine, list(zip(sequences, tokens, strict=True)))
            if number and len({-(-engine.length(one) // 256) for one in sequences}) == 1:
                together = transposed or key_type == "q8_0" or max(lengths) < 256
                assert stacks(engine) == [len(lengths)] if together else [1] * len(lengths)
            same_bits(found, apart(engine, list(zip(twins, tokens, strict=True))))
        assert [engine.length(one) for one in sequences] == [length + ROUNDS for length in lengths]
        assert [engine.export_sequence(one) for one in sequences] == [engine.export_sequence(one) for one in twins]


@LAYOUTS
def test_whoever_takes_part_the_rows_are_right_and_in_order(model: Path, *, transposed: bool) -> None:
    """In any order, beside prompts or not, with gaps between the caches: those that can go together do."""
    with opened(model, transposed=transposed) as engine:
        chance = np.random.default_rng(3)
        lengths = [20 + n for n in range(8)]
        sequences, twins, seen = begun(engine, lengths), begun(engine, lengths), set[int]()
        for number in range(40):
            chosen = chance.permutation(8)[: chance.integers(1, 9)].tolist()
            tokens = {i: random_tokens(engine, 1 if chance.random() < 0.8 else 3, seed=100 * number + i) for i in chosen}
            found = step(engine, [(sequences[i], tokens[i]) for i in chosen])
            seen.add(max(stacks(engine)))
            same_bits(found, apart(engine, [(twins[i], tokens[i]) for i in chosen]))
        assert len(seen) > 3


@LAYOUTS
def test_who_leaves_and_who_comes_in_its_place_changes_nothing_for_neighbours(model: Path, *, transposed: bool) -> None:
    with opened(model, transposed=transposed) as engine:
        sequences, twins = begun(engine, [30, 31, 32, 33]), begun(engine, [30, 31, 32, 33])
        tokens = [[1], [2], [3], [4]]
        same_bits(step(engine, list(zip(sequences, tokens, strict=True))), apart(engine, list(zip(twins, tokens, strict=True))))
        for one in (sequences, twins):
            engine.free_sequence(one[1])
            one[1] = engine.new_sequence()
            feed(engine, one[1], random_tokens(engine, 50, seed=9))
            engine.truncate(one[0], 20)
        for tokens in ([[5], [6], [7], [8]], [[9], [10], [11], [12]]):
            same_bits(step(engine, list(zip(sequences, tokens, strict=True))), apart(engine, list(zip(twins, tokens, strict=True))))


def test_a_step_is_repeated_only_for_the_same_sequences_with_one_token_each(model: Path) -> None:
    """Any other step in between is seen, also one that leaves a sequence as long as it was."""
    with opened(model, transposed=True) as engine:
        sequences, twins = begun(engine, [10, 11]), begun(engine, [10, 11])
        for parts in (
            [(0, [1]), (1, [2])], [(0, [3]), (1, [4])], [(1, [5])], [(1, [6]), (0, [7])], [(1, [6]), (0, [7])], [(0, [8, 9]), (1, [10])],
            [(0, [11]), (1, [12])], [(0, [13]), (1, [14])],
        ):  # fmt: skip
            found = step(engine, [(sequences[i], tokens) for i, tokens in parts])
            same_bits(found, apart(engine, [(twins[i], tokens) for i, tokens in parts]))
        for one in (sequences, twins):
            step(engine, [(one[0], [1]), (one[1], [2])])
            engine.truncate(one[0], 12)
            length = engine.length(one[1]) - 12
            feed(engine, one[0], random_tokens(engine, length, seed=5))
        same_bits(step(engine, [(sequences[0], [1]), (sequences[1], [2])]), apart(engine, [(twins[0], [1]), (twins[1], [2])]))
        with pytest.raises(OptionError, match="vocabulary"):
            engine.step([SequenceBatch(sequences[0], [1]), SequenceBatch(sequences[1], [engine.info.n_vocab])])
        same_bits(step(engine, [(sequences[0], [3]), (sequences[1], [4])]), apart(engine, [(twins[0], [3]), (twins[1], [4])]))
