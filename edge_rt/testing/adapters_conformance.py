"""What an engine must do whose sequences go through adapters; part of ``EngineConformance``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_rt.core.load.adapter import LoraFile, open_lora
from edge_rt.hooks import AppliesAdapters, ContextError, Engine, ModelFile, Part
from edge_rt.testing.feeding import feed, feed_new, kept_rows, sequences, tokens_of
from edge_rt.testing.pruning_conformance import PruningConformance
from edge_rt.testing.random_adapters import LINEAR, write_random_adapter


class AdaptersConformance(PruningConformance):
    """Skipped for engines that do not offer AppliesAdapters."""

    @pytest.fixture
    def loras(self, engine: Engine, model: ModelFile, tmp_path: Path) -> Iterator[tuple[LoraFile, LoraFile]]:
        """Two random adapters, whose files outlive the engine."""
        if not isinstance(engine, AppliesAdapters):
            pytest.skip("this engine applies no adapters")
        if not any(re.fullmatch(LINEAR, name) for name in model.header.tensors):
            pytest.skip("the model has none of the weights that these adapters change")
        first, second = (write_random_adapter(tmp_path / f"{seed}.gguf", model.header, seed=seed) for seed in (1, 2))
        a, b = open_lora(first, model.header), open_lora(second, model.header)
        with a.file, b.file:
            yield a, b
            engine.close()

    @staticmethod
    def _numbers(engine: Engine, loras: tuple[LoraFile, LoraFile]) -> tuple[AppliesAdapters, int, int]:
        assert isinstance(engine, AppliesAdapters)
        return engine, engine.open_adapter(loras[0]), engine.open_adapter(loras[1])

    def test_each_sequence_goes_through_its_own_adapter(self, engine: Engine, loras: tuple[LoraFile, LoraFile]) -> None:
        able, a, b = self._numbers(engine, loras)
        texts = [tokens_of(engine, n, seed=n) for n in (17, 5, 11, 17, 9)]
        bindings = [(a, 1.0), (None, 1.0), (b, 1.0), (a, 0.5), (a, 1.0)]
        with sequences(engine, 5) as alone, sequences(engine, 5) as joint:
            for sequence, binding in zip([*alone, *joint], bindings * 2, strict=True):
                able.adapt(sequence, *binding)
            expected = [feed(engine, sequence, text) for sequence, text in zip(alone, texts, strict=True)]
            got = engine.step([Part(sequence, text, "all") for sequence, text in zip(joint, texts, strict=True)])
            for rows, wanted in zip([kept_rows(rows) for rows in got], expected, strict=True):
                self._assert_close(rows, wanted)
            next_ = [feed(engine, sequence, [1]) for sequence in alone]
            got = engine.step([Part(sequence, [1], "last") for sequence in joint])
            for rows, wanted in zip([kept_rows(rows) for rows in got], next_, strict=True):
                self._assert_close(rows, wanted)
        self._assert_close(expected[1], feed_new(engine, texts[1]))
        for other in (expected[3], feed_new(engine, texts[0])):
            assert not np.allclose(expected[0], other, atol=1e-3), "an adapter, or its scale, makes no difference"

    def test_an_adapter_is_bound_to_an_empty_sequence_alone(self, engine: Engine, loras: tuple[LoraFile, LoraFile]) -> None:
        able, a, b = self._numbers(engine, loras)
        tokens = tokens_of(engine, 12)
        with sequences(engine, 2) as (sequence, other):
            able.adapt(other, b)
            expected = feed(engine, other, tokens)
            feed(engine, sequence, tokens)
            for number in (a, None):
                with pytest.raises(ContextError):
                    able.adapt(sequence, number)
            for number in (a, b):
                engine.truncate(sequence, 0)
                able.adapt(sequence, number)
                got = feed(engine, sequence, tokens)
            self._assert_close(got, expected)
            engine.truncate(sequence, 0)
            able.adapt(sequence, None)
            self._assert_close(feed(engine, sequence, tokens), feed_new(engine, tokens))

    def test_forks_and_restored_sequences_go_on_through_it(self, engine: Engine, loras: tuple[LoraFile, LoraFile]) -> None:
        able, a, _ = self._numbers(engine, loras)
        tokens, more = tokens_of(engine, 12), tokens_of(engine, 4, seed=2)
        with sequences(engine, 1) as (sequence,):
            able.adapt(sequence, a, 0.5)
            feed(engine, sequence, tokens)
            fork, copy = engine.fork_sequence(sequence, 12), engine.import_sequence(engine.export_sequence(sequence))
            able.adapt(copy, a, 0.5, imported=True)
            expected = feed(engine, sequence, more)
            for other in (fork, copy):
                self._assert_close(feed(engine, other, more), expected)
                engine.free_sequence(other)
