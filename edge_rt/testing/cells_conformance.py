"""What an engine must do whose cells can leave the middle of a sequence, and come back; part of ``EngineConformance``."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from edge_rt.hooks import ContextError, Engine, MovesCells, RemovesCells, SessionFileError
from edge_rt.testing.feeding import feed, sequences, tokens_of

if TYPE_CHECKING:
    import numpy.typing as npt


class CellsConformance:
    """Skipped for engines that offer neither RemovesCells nor MovesCells."""

    tolerance: ClassVar[float] = 1e-3
    """Largest mean |difference| / mean |logits| between two ways to feed the same tokens; 0 asks for equal bits."""

    def _that_removes(self, engine: Engine) -> RemovesCells:
        """The engine, if it can forget cells in the middle of this model's sequences; else the test is skipped."""
        if not isinstance(engine, RemovesCells):
            pytest.skip("this engine keeps cells from the front only")
        with sequences(engine, 1) as (sequence,):
            feed(engine, sequence, tokens_of(engine, 6))
            try:
                engine.remove_cells(sequence, [(2, 4)])
            except ContextError:
                assert engine.length(sequence) == 6
                pytest.skip("this model's cells cannot leave one by one")
        return engine

    def test_removed_cells_leave_a_gap(self, engine: Engine) -> None:
        able, tokens, more = self._that_removes(engine), tokens_of(engine, 40), tokens_of(engine, 6, seed=2)
        with sequences(engine, 2) as (one, other):
            for sequence in (one, other):
                feed(engine, sequence, tokens)
            assert able.next_position(one) == 40
            able.remove_cells(one, [(4, 9), (20, 30)])
            able.remove_cells(other, [(20, 30)])
            able.remove_cells(other, [(4, 9)])
            assert (engine.length(one), able.next_position(one)) == (25, 40)
            fork = engine.fork_sequence(one, 25)
            copy = engine.import_sequence(engine.export_sequence(one))
            expected = feed(engine, one, more)
            assert (engine.length(one), able.next_position(one)) == (31, 46)
            for sequence in (other, fork, copy):
                self._assert_close(feed(engine, sequence, more), expected)
            engine.truncate(one, 25)
            assert able.next_position(one) == 40
            self._assert_close(feed(engine, one, more), expected)
            engine.truncate(one, 10)
            assert able.next_position(one) == 15, "cell 10 holds the token of position 15"
            engine.free_sequence(fork)
            engine.free_sequence(copy)

    @pytest.mark.parametrize("spans", [[(0, 11)], [(4, 2)], [(5, 7), (6, 8)], [(5, 7), (1, 2)], [(-1, 2)]])
    def test_spans_that_are_none_are_refused(self, engine: Engine, spans: list[tuple[int, int]]) -> None:
        able, tokens = self._that_removes(engine), tokens_of(engine, 10)
        with sequences(engine, 1) as (sequence,):
            feed(engine, sequence, tokens)
            with pytest.raises(ValueError, match="spans"):
                able.remove_cells(sequence, spans)
            assert (engine.length(sequence), able.next_position(sequence)) == (10, 10)

    def test_closing_a_gap_in_front_changes_little(self, engine: Engine) -> None:
        able, tokens, more = self._that_removes(engine), tokens_of(engine, 40), tokens_of(engine, 6, seed=2)
        with sequences(engine, 2) as (moved, still):
            for sequence in (moved, still):
                feed(engine, sequence, tokens)
                able.remove_cells(sequence, [(0, 12)])
            try:
                able.renumber(moved)
            except ContextError:
                assert able.next_position(moved) == 40
                return
            assert (engine.length(moved), able.next_position(moved), able.next_position(still)) == (28, 28, 40)
            # Attention sees distances only, and all of them are the same: what differs is the rounding of rotated keys.
            got, expected = np.asarray(feed(engine, moved, more)), np.asarray(feed(engine, still, more))
            assert np.abs(got - expected).mean() <= max(self.tolerance, 0.02) * np.abs(expected).mean()

    def test_cells_that_come_back_were_never_away(self, engine: Engine) -> None:
        able, tokens, more = self._that_removes(engine), tokens_of(engine, 40), tokens_of(engine, 6, seed=2)
        if not isinstance(engine, MovesCells):
            pytest.skip("this engine's cells cannot come back")
        with sequences(engine, 1) as (sequence,):
            feed(engine, sequence, tokens)
            first, second = engine.export_cells(sequence, 4, 9), engine.export_cells(sequence, 20, 30)
            able.remove_cells(sequence, [(4, 9), (20, 30)])
            with pytest.raises(SessionFileError):
                engine.insert_cells(sequence, 4, first[:-1])
            assert engine.insert_cells(sequence, 15, second) == 10
            assert engine.insert_cells(sequence, 4, memoryview(first)) == 5
            assert (engine.length(sequence), able.next_position(sequence)) == (40, 40)
            got = feed(engine, sequence, more)
        with sequences(engine, 1) as (never_left,):
            feed(engine, never_left, tokens)
            assert np.array_equal(got.view(np.uint32), feed(engine, never_left, more).view(np.uint32)), "logits are not equal to the bit"

    def test_cells_come_back_where_the_gap_was_closed(self, engine: Engine) -> None:
        able, tokens, more = self._that_removes(engine), tokens_of(engine, 40), tokens_of(engine, 6, seed=2)
        if not isinstance(engine, MovesCells):
            pytest.skip("this engine's cells cannot come back")
        with sequences(engine, 2) as (moved, never_left):
            feed(engine, moved, tokens)
            feed(engine, never_left, tokens)
            cells = engine.export_cells(moved, 10, 22)
            able.remove_cells(moved, [(10, 22)])
            able.renumber(moved)
            assert engine.insert_cells(moved, 10, cells) == 12
            assert (engine.length(moved), able.next_position(moved)) == (40, 40)
            got, expected = feed(engine, moved, more), feed(engine, never_left, more)
            # Every token is where it was: what differs is the rounding of keys that were rotated there and back.
            assert np.abs(got - expected).mean() <= max(self.tolerance, 0.02) * np.abs(expected).mean()

    def _assert_close(self, got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
        assert got.shape == expected.shape
        if self.tolerance == 0:
            assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), "logits are not equal to the bit"
        error = float(np.abs(got - expected).mean() / np.abs(expected).mean())
        assert error <= self.tolerance, f"logits differ by {error:.2g}, more than {self.tolerance:g}"
