"""What an engine must do whose layers and heads forget cells one by one; part of ``EngineConformance``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from edge_rt.hooks import ContextError, Engine, MovesCells, OptionError, PrunesCells, RemovesCells
from edge_rt.testing.cells_conformance import CellsConformance
from edge_rt.testing.feeding import feed, sequences, tokens_of

if TYPE_CHECKING:
    import numpy.typing as npt


class PruningConformance(CellsConformance):
    """Skipped for engines that do not offer PrunesCells."""

    @staticmethod
    def _that_prunes(engine: Engine) -> PrunesCells:
        if not isinstance(engine, PrunesCells):
            pytest.skip("this engine does not prune")
        return engine

    def test_nothing_is_pruned_where_all_fits(self, engine: Engine) -> None:
        able, tokens, more = self._that_prunes(engine), tokens_of(engine, 40), tokens_of(engine, 6, seed=2)
        with sequences(engine, 2) as (pruned, other):
            able.watch(pruned, 8)
            for sequence in (pruned, other):
                feed(engine, sequence, tokens)
            held = engine.memory().cache
            for keep in (40, 41, 400):
                assert tuple(able.prune(pruned, keep, first=4, last=4)) == (0, 0)
            assert (engine.length(pruned), able.mixed_cells(pruned), engine.memory().cache) == (40, 0, held)
            self._assert_bits(feed(engine, pruned, more), feed(engine, other, more))

    def test_watching_changes_no_bit(self, engine: Engine) -> None:
        able, tokens, more = self._that_prunes(engine), tokens_of(engine, 40), tokens_of(engine, 6, seed=2)
        with sequences(engine, 3) as (watched, changing, other):
            able.watch(watched, 8)
            expected = feed(engine, other, tokens)
            self._assert_bits(feed(engine, watched, tokens), expected)
            able.watch(changing, 3)
            self._assert_bits(feed(engine, changing, tokens), expected)
            able.watch(changing, 16)
            able.watch(watched, 0)
            expected = feed(engine, other, more, size=1)
            for sequence in (watched, changing):
                self._assert_bits(feed(engine, sequence, more, size=1), expected)

    def test_what_is_left_goes_on(self, engine: Engine) -> None:
        """Length, position and memory are what they should be, and a restored copy, a fork and a second pass agree."""
        able, tokens, more = self._that_prunes(engine), tokens_of(engine, 60), tokens_of(engine, 6, seed=2)
        with sequences(engine, 1) as (sequence,):
            able.watch(sequence, 8)
            feed(engine, sequence, tokens)
            held = engine.memory().cache
            pruned = able.prune(sequence, 20, first=3, last=5)
            assert (pruned.cells, engine.length(sequence)) == (40, 20)
            assert pruned.released_bytes == held - engine.memory().cache
            assert able.mixed_cells(sequence) <= 15, "the protected end is the same in every head"
            if isinstance(engine, RemovesCells):
                assert engine.next_position(sequence) == 60
            fork, copy = engine.fork_sequence(sequence, 20), engine.import_sequence(engine.export_sequence(sequence))
            assert able.mixed_cells(fork) == able.mixed_cells(copy) == able.mixed_cells(sequence)
            expected = feed(engine, sequence, more)
            for other in (fork, copy):
                self._assert_bits(feed(engine, other, more), expected)
                engine.free_sequence(other)
            assert able.prune(sequence, 12, first=3, last=5).cells == 14
            assert engine.length(sequence) == 12
            assert np.isfinite(feed(engine, sequence, more)).all()

    def test_pruning_does_not_touch_what_was_shared(self, engine: Engine) -> None:
        able, tokens, more = self._that_prunes(engine), tokens_of(engine, 40), tokens_of(engine, 6, seed=2)
        with sequences(engine, 3) as (source, other, never):
            for sequence in (source, other):
                able.watch(sequence, 8)
            for sequence in (source, other, never):
                feed(engine, sequence, tokens)
            forks = [engine.fork_sequence(source, 30), engine.fork_sequence(source, 40)]
            able.watch(forks[1], 8)
            feed(engine, forks[1], more)
            able.prune(forks[1], 10, first=2, last=2)
            expected = feed(engine, never, more)
            able.prune(other, 10, first=2, last=2)
            self._assert_bits(feed(engine, source, more), expected)
            feed(engine, forks[0], tokens[30:])
            able.prune(source, 10, first=2, last=2)
            self._assert_close(feed(engine, forks[0], more), expected)
            for fork in forks:
                engine.free_sequence(fork)

    def test_mixed_cells_go_or_stay_together(self, engine: Engine) -> None:
        able, tokens, more = self._that_prunes(engine), tokens_of(engine, 60), tokens_of(engine, 6, seed=2)
        with sequences(engine, 2) as (sequence, never):
            able.watch(sequence, 8)
            feed(engine, sequence, tokens)
            able.prune(sequence, 30, first=3, last=5)
            mixed = able.mixed_cells(sequence)
            if not mixed:
                return  # a single head holds the same cells as itself
            copy = engine.import_sequence(engine.export_sequence(sequence))
            for cut in (1, mixed - 1):
                with pytest.raises(ContextError):
                    engine.truncate(sequence, cut)
                with pytest.raises(ContextError):
                    engine.fork_sequence(sequence, cut)
            if isinstance(engine, RemovesCells):
                with pytest.raises(ContextError):
                    engine.remove_cells(sequence, [(mixed - 1, mixed + 1)])
            if isinstance(engine, MovesCells):
                with pytest.raises(ContextError):
                    engine.export_cells(sequence, 1, mixed + 1)
                with pytest.raises(ContextError):
                    engine.insert_cells(sequence, 30, engine.export_sequence(copy))
            assert (engine.length(sequence), able.mixed_cells(sequence)) == (30, mixed)
            self._assert_bits(feed(engine, sequence, more), feed(engine, copy, more))
            engine.truncate(sequence, mixed)
            engine.truncate(copy, mixed)
            self._assert_bits(feed(engine, sequence, more), feed(engine, copy, more))
            engine.truncate(sequence, 0)
            assert able.mixed_cells(sequence) == 0
            self._assert_bits(feed(engine, sequence, tokens), feed(engine, never, tokens))
            engine.free_sequence(copy)

    def test_nonsense_is_refused(self, engine: Engine) -> None:
        able, tokens = self._that_prunes(engine), tokens_of(engine, 40)
        with sequences(engine, 1) as (sequence,):
            feed(engine, sequence, tokens)
            for keep, first, last in ((0, 0, 0), (-1, 0, 0), (10, 6, 5), (10, -1, 0), (10, 0, -1)):
                with pytest.raises(OptionError):
                    able.prune(sequence, keep, first=first, last=last)
            with pytest.raises(OptionError, match="no such way"):
                able.prune(sequence, 10, first=1, last=1, method="no such way")
            with pytest.raises(OptionError, match="queries"):
                able.prune(sequence, 10, first=1, last=1, queries=0)
            with pytest.raises(OptionError):
                able.watch(sequence, -1)
            with pytest.raises(ContextError):
                able.prune(sequence, 10, first=1, last=1)  # nobody watched
            assert (engine.length(sequence), able.mixed_cells(sequence)) == (40, 0)

    def _assert_bits(self, got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
        assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), "logits are not equal to the bit"
