"""The suite that every engine must pass: ``EngineConformance``, to subclass in a plugin's tests."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from edge_rt.core.gguf.lora import LoraFile, open_lora
from edge_rt.hooks import (
    AppliesAdapters,
    ContextError,
    EdgeError,
    EmbedsText,
    EmbedsTokens,
    Engine,
    EngineFactory,
    EngineOptions,
    MovesCells,
    OptionError,
    OutOfMemory,
    PrunesCells,
    Refusal,
    RemovesCells,
    SequenceBatch,
    SessionFileError,
    TellsProgress,
)
from edge_rt.testing.engine_helpers import feed, feed_new, hidden_after, kept_rows, sequences, tokens_of
from edge_rt.testing.random_models import LINEAR, write_random_adapter

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt.hooks import ModelFile

_MISUSE = (EdgeError, LookupError, ValueError)  # what use after free or close may raise: anything but silence or a crash


class EngineConformance:
    """Subclass with fixtures ``engine_factory`` and ``model``."""

    options: ClassVar[EngineOptions] = EngineOptions(context=640, threads=1)
    """What the engine is opened with; ``context`` must be at least 64, and 40 more than its ``chunk`` for all tests to run."""

    tolerance: ClassVar[float] = 1e-3
    """Largest mean |difference| / mean |logits| between two ways to feed the same tokens; 0 asks for equal bits."""

    exact_texts: ClassVar[int] = 12
    """On how many texts ``exact_rows`` is checked."""

    @pytest.fixture
    def engine_factory(self) -> EngineFactory:
        """The factory under test."""
        raise NotImplementedError("define the fixture engine_factory in your subclass")

    @pytest.fixture
    def model(self) -> ModelFile:
        """A model it can open; a tiny one will do."""
        raise NotImplementedError("define the fixture model in your subclass")

    @pytest.fixture
    def engine(self, engine_factory: EngineFactory, model: ModelFile) -> Iterator[Engine]:
        """A fresh engine for every test, closed before ``model`` is."""
        engine = engine_factory.open(model, self.options)
        yield engine
        engine.close()

    def test_supports_the_model_and_says_what_it_is(self, engine_factory: EngineFactory, model: ModelFile, engine: Engine) -> None:
        score = engine_factory.supports(model, self.options)
        assert not isinstance(score, Refusal), f"the factory refuses the model it is tested with: {score}"
        assert math.isfinite(score)
        assert isinstance(engine, Engine)
        info = engine.info
        assert info.engine == engine_factory.name
        assert info.max_context == self.options.context
        assert min(info.n_vocab, info.n_layer, info.n_embd, info.chunk) > 0

    def test_returns_the_rows_that_were_asked_for(self, engine: Engine) -> None:
        tokens = tokens_of(engine, 9)
        with sequences(engine, 3) as (a, b, c):
            none, *wanted = engine.step(
                [SequenceBatch(a, tokens, "none"), SequenceBatch(b, tokens, "last"), SequenceBatch(c, tokens, "all")]
            )
            assert none is None
            last, all_ = map(kept_rows, wanted)
            assert last.shape == (1, engine.info.n_vocab)
            assert all_.shape == (9, engine.info.n_vocab)
            assert last.dtype == all_.dtype == np.float32
            assert np.isfinite(all_).all()
            self._assert_close(last[0], all_[-1])
            assert [engine.length(s) for s in (a, b, c)] == [9, 9, 9]
        assert engine.step([]) == []

    def test_logits_depend_on_every_token_before(self, engine: Engine) -> None:
        tokens = tokens_of(engine, 12)
        whole = feed_new(engine, tokens)
        for changed in (0, 6, 10):
            other = [*tokens]
            other[changed] = (other[changed] + 1) % engine.info.n_vocab
            assert not np.array_equal(whole[-1], feed_new(engine, other)[-1]), f"token {changed} makes no difference"

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
    def test_any_division_gives_the_same_logits(self, engine: Engine, size: int) -> None:
        tokens = tokens_of(engine, 40)
        self._assert_close(feed_new(engine, tokens, size), feed_new(engine, tokens))

    def test_a_part_longer_than_a_chunk(self, engine: Engine) -> None:
        chunk = engine.info.chunk
        if chunk + 40 > engine.info.max_context:
            pytest.skip(f"a chunk of {chunk} tokens and 40 more do not fit the context; raise options.context")
        tokens = tokens_of(engine, chunk + 40)
        self._assert_close(feed_new(engine, tokens), feed_new(engine, tokens, chunk))

    def test_several_sequences_in_one_step_equal_one_by_one(self, engine: Engine) -> None:
        texts = [tokens_of(engine, n, seed=n) for n in (17, 5, 11)]
        alone = [feed_new(engine, text) for text in texts]
        with sequences(engine, 3) as opened:
            rows: list[list[npt.NDArray[np.float32]]] = [[], [], []]
            for start in range(0, 17, 4):  # shorter ones drop out on the way, as finished requests do
                live = [i for i in range(3) if start < len(texts[i])]
                results = engine.step([SequenceBatch(opened[i], texts[i][start : start + 4], "all") for i in live])
                for i, result in zip(live, results, strict=True):
                    rows[i].append(kept_rows(result))
            for got, expected in zip(rows, alone, strict=True):
                self._assert_close(np.concatenate(got), expected)

    def test_a_fork_and_its_source_do_not_touch_each_other(self, engine: Engine) -> None:
        tokens, left, right = tokens_of(engine, 24), tokens_of(engine, 8, seed=2), tokens_of(engine, 8, seed=3)
        if not self._can_go_back(engine):
            return
        source = engine.new_sequence()
        feed(engine, source, tokens)
        fork = engine.fork_sequence(source, 16)
        assert (engine.length(source), engine.length(fork)) == (24, 16)
        got_left, got_right = feed(engine, fork, left), feed(engine, source, right)
        engine.free_sequence(source)
        after = feed(engine, fork, right)
        engine.free_sequence(fork)
        self._assert_close(got_left, feed_new(engine, tokens[:16] + left)[16:])
        self._assert_close(got_right, feed_new(engine, tokens + right)[24:])
        self._assert_close(after, feed_new(engine, tokens[:16] + left + right)[24:])

    def test_a_fork_of_everything_and_of_nothing(self, engine: Engine) -> None:
        tokens, more = tokens_of(engine, 10), tokens_of(engine, 4, seed=2)
        with sequences(engine, 1) as (source,):
            feed(engine, source, tokens)
            whole, empty = engine.fork_sequence(source, 10), engine.fork_sequence(source, 0)
            self._assert_close(feed(engine, whole, more), feed_new(engine, tokens + more)[10:])
            self._assert_close(feed(engine, empty, more), feed_new(engine, more))
            engine.free_sequence(whole)
            engine.free_sequence(empty)

    def test_truncated_cells_are_forgotten(self, engine: Engine) -> None:
        tokens, more = tokens_of(engine, 24), tokens_of(engine, 8, seed=2)
        if not self._can_go_back(engine):
            return
        with sequences(engine, 1) as (sequence,):
            feed(engine, sequence, tokens)
            engine.truncate(sequence, 10)
            assert engine.length(sequence) == 10
            self._assert_close(feed(engine, sequence, more), feed_new(engine, tokens[:10] + more)[10:])
            engine.truncate(sequence, 0)
            self._assert_close(feed(engine, sequence, tokens), feed_new(engine, tokens))

    def _can_go_back(self, engine: Engine) -> bool:
        """Can the engine cut a sequence? One that cannot must say so, for forks and truncation alike, and change nothing."""
        tokens, more = tokens_of(engine, 6), tokens_of(engine, 2, seed=2)
        with sequences(engine, 1) as (sequence,):
            feed(engine, sequence, tokens)
            try:
                engine.truncate(sequence, 3)
            except ContextError:
                with pytest.raises(ContextError):
                    engine.fork_sequence(sequence, 3)
                assert engine.length(sequence) == 6
                self._assert_close(feed(engine, sequence, more), feed_new(engine, tokens + more)[6:])
                return False
            return True

    def test_an_imported_sequence_goes_on_like_the_exported_one(self, engine: Engine) -> None:
        tokens, more = tokens_of(engine, 20), tokens_of(engine, 4, seed=2)
        with sequences(engine, 1) as (sequence,):
            feed(engine, sequence, tokens)
            data = engine.export_sequence(sequence)
            expected = feed(engine, sequence, more)
        for exported in (data, memoryview(data)):
            copy = engine.import_sequence(exported)
            assert engine.length(copy) == 20
            self._assert_close(feed(engine, copy, more), expected)
            engine.free_sequence(copy)
        with sequences(engine, 1) as (empty,):
            copy = engine.import_sequence(engine.export_sequence(empty))
            assert engine.length(copy) == 0
            engine.free_sequence(copy)

    def test_what_is_no_saved_sequence_is_refused(self, engine: Engine) -> None:
        tokens = tokens_of(engine, 20)
        with sequences(engine, 1) as (sequence,):
            feed(engine, sequence, tokens)
            data = engine.export_sequence(sequence)
        cuts = {0, 1, 8, 16, 40, len(data) // 2, len(data) - 1}
        for bad in [*(data[:cut] for cut in sorted(cuts)), b"\xff" * len(data), bytes(len(data)), data + b"\0", data[1:]]:
            with pytest.raises(SessionFileError):
                engine.import_sequence(bad)
        self._assert_close(feed_new(engine, tokens), feed_new(engine, tokens))

    def test_a_step_beyond_the_context_changes_nothing(self, engine: Engine) -> None:
        context = engine.info.max_context
        tokens, more = tokens_of(engine, context - 4), tokens_of(engine, 5, seed=2)
        with sequences(engine, 2) as (full, other):
            feed(engine, full, tokens)
            with pytest.raises(ContextError):
                engine.step([SequenceBatch(other, more), SequenceBatch(full, more)])
            assert (engine.length(full), engine.length(other)) == (context - 4, 0)
            with pytest.raises(ContextError):
                engine.step([SequenceBatch(other, [*tokens, *more])])
            assert engine.length(other) == 0
            got = feed(engine, full, more[:4])
            assert engine.length(full) == context
            with pytest.raises(ContextError):
                engine.step([SequenceBatch(full, more[:1])])
        self._assert_close(got, feed_new(engine, tokens + more[:4], context - 4)[-4:])

    def test_tokens_outside_the_vocabulary_are_refused(self, engine: Engine) -> None:
        with sequences(engine, 1) as (sequence,):
            for bad in (-1, engine.info.n_vocab, 1 << 40):
                with pytest.raises(OptionError):
                    engine.step([SequenceBatch(sequence, [1, bad])])
            assert engine.length(sequence) == 0

    def test_exact_rows_are_exact(self, engine: Engine) -> None:
        """On many texts: kernels that round differently agree on most inputs, because later rounding hides the difference."""
        rows = min(engine.exact_rows(), 16)
        assert rows >= 1
        for seed in range(self.exact_texts if rows > 1 else 0):
            before, tokens, after = (tokens_of(engine, n, seed=3 * seed + i) for i, n in enumerate((8, rows, 1)))
            with sequences(engine, 1) as (single,):
                feed(engine, single, before)
                one_by_one = feed(engine, single, tokens, 1)
                next_ = feed(engine, single, after)
            for n in sorted({2, (rows + 2) // 2, rows}):
                with sequences(engine, 1) as (joint,):
                    feed(engine, joint, before)
                    together = feed(engine, joint, tokens[:n])
                    feed(engine, joint, tokens[n:], 1)
                    same = np.array_equal(together.view(np.uint32), one_by_one[:n].view(np.uint32))
                    assert same, f"text {seed}: {n} rows at once differ from one by one, exact_rows() is {rows} or more"
                    assert np.array_equal(feed(engine, joint, after), next_), f"text {seed}: after {n} rows at once the cache differs"

    def test_a_freed_sequence_is_gone_and_its_memory_back(self, engine: Engine) -> None:
        tokens = tokens_of(engine, 30)
        gone = engine.new_sequence()
        engine.free_sequence(gone)
        for use in (lambda: engine.step([SequenceBatch(gone, [1])]), lambda: engine.length(gone), lambda: engine.free_sequence(gone)):
            with pytest.raises(_MISUSE):
                use()
        before = engine.memory().cache
        for _ in range(40):
            feed_new(engine, tokens)
        assert engine.memory().cache == before

    def test_opens_sequences_until_it_says_no(self, engine: Engine) -> None:
        opened: list[int] = []
        try:
            for _ in range(64):
                opened.append(engine.new_sequence())
        except OutOfMemory:
            assert len(opened) >= 4
        assert len(set(opened)) == len(opened)
        for sequence in opened:
            engine.free_sequence(sequence)
        feed_new(engine, tokens_of(engine, 4))

    def test_the_memory_report_adds_up(self, engine: Engine) -> None:
        with sequences(engine, 1) as (sequence,):
            feed(engine, sequence, tokens_of(engine, 30))
            report = engine.memory()
        counts = [count for count in report if count is not None]
        assert all(isinstance(count, int) and count >= 0 for count in counts)
        assert report.cache > 0
        assert report.weights_resident is None or report.weights_resident <= report.weights_mapped + (1 << 16)

    def test_token_embeddings_are_rows_that_stay_the_same(self, engine: Engine) -> None:
        if not isinstance(engine, EmbedsTokens):
            pytest.skip("this engine does not show what it takes a token for")
        last = engine.info.n_vocab - 1
        rows = np.array(engine.token_embeddings([0, last, 0]))
        assert rows.shape == (3, engine.info.n_embd)
        assert rows.dtype == np.float32
        assert np.isfinite(rows).all()
        assert np.array_equal(rows[0], rows[2])
        assert not np.array_equal(rows[0], rows[1])
        feed_new(engine, tokens_of(engine, 8))
        assert np.array_equal(engine.token_embeddings([last]), rows[1:2]), "embeddings of tokens depend on nothing but the token"
        for token in (-1, last + 1):
            with pytest.raises(OptionError):
                engine.token_embeddings([token])

    def test_a_long_step_says_that_it_goes_on(self, engine: Engine) -> None:
        if not isinstance(engine, TellsProgress):
            pytest.skip("this engine does not say that a step goes on")
        tokens = tokens_of(engine, 100)
        before = feed_new(engine, tokens)
        moved: list[int] = []
        engine.tell(lambda: moved.append(threading.get_ident()))
        after = feed_new(engine, tokens)
        assert set(moved) == {threading.get_ident()}, "it is said while the step is taken, by whoever takes it"
        assert np.array_equal(before, after)

    def test_hidden_states_are_of_the_cells_that_logits_are_of(self, engine: Engine) -> None:
        if not isinstance(engine, EmbedsText):
            pytest.skip("this engine does not show its hidden states")
        tokens, more = tokens_of(engine, 20), tokens_of(engine, 4, seed=2)
        with sequences(engine, 3) as (a, b, c):
            none, *wanted = engine.hidden(
                [SequenceBatch(a, tokens, "none"), SequenceBatch(b, tokens, "last"), SequenceBatch(c, tokens, "all")]
            )
            assert none is None
            last, all_ = (np.array(rows) for rows in wanted)
            assert last.shape == (1, engine.info.n_embd)
            assert all_.shape == (20, engine.info.n_embd)
            assert last.dtype == all_.dtype == np.float32
            assert np.isfinite(all_).all()
            self._assert_close(last[0], all_[-1])
            for sequence in (a, b, c):  # their cells are those that a step fills
                assert engine.length(sequence) == 20
                self._assert_close(feed(engine, sequence, more), feed_new(engine, tokens + more)[20:])
        for size in (1, 3, 16):
            with sequences(engine, 1) as (sequence,):
                parts = [SequenceBatch(sequence, tokens[start : start + size], "all") for start in range(0, 20, size)]
                self._assert_close(np.concatenate([np.array(engine.hidden([part])[0]) for part in parts]), all_)
        with sequences(engine, 1) as (sequence,):
            engine.hidden([SequenceBatch(sequence, [(tokens[0] + 1) % engine.info.n_vocab, *tokens[1:]], "none")])
            (other,) = engine.hidden([SequenceBatch(sequence, more, "last")])
            assert other is not None
            other = np.array(other)  # it is valid until the next call
            assert not np.array_equal(other, hidden_after(engine, [*tokens, *more])), "the first token makes no difference"
            for bad in (-1, engine.info.n_vocab):
                with pytest.raises(OptionError):
                    engine.hidden([SequenceBatch(sequence, [bad], "last")])

    def test_closing_twice_is_harmless_and_use_after_it_an_error(self, engine_factory: EngineFactory, model: ModelFile) -> None:
        engine = engine_factory.open(model, self.options)
        sequence = engine.new_sequence()
        feed(engine, sequence, tokens_of(engine, 4))
        engine.close()
        engine.close()
        with pytest.raises(_MISUSE):
            engine.step([SequenceBatch(sequence, [1])])

    # ---- engines that remove or move cells ---------------------------------------------------------------------------

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

    # ---- engines that prune cells ------------------------------------------------------------------------------------

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

    # ---- engines that apply adapters ---------------------------------------------------------------------------------

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
            got = engine.step([SequenceBatch(sequence, text, "all") for sequence, text in zip(joint, texts, strict=True)])
            for rows, wanted in zip([kept_rows(rows) for rows in got], expected, strict=True):
                self._assert_close(rows, wanted)
            next_ = [feed(engine, sequence, [1]) for sequence in alone]
            got = engine.step([SequenceBatch(sequence, [1], "last") for sequence in joint])
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

    def _assert_close(self, got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
        assert got.shape == expected.shape
        if self.tolerance == 0:
            assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), "logits are not equal to the bit"
        error = float(np.abs(got - expected).mean() / np.abs(expected).mean())
        assert error <= self.tolerance, f"logits differ by {error:.2g}, more than {self.tolerance:g}"

    def _assert_bits(self, got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
        assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), "logits are not equal to the bit"
