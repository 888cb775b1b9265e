"""What every engine must do, as a suite to subclass; imported by edge_rt/testing/conformance.py."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from edge_rt.hooks import (
    ContextError,
    EdgeError,
    EmbedsText,
    EmbedsTokens,
    Engine,
    EngineFactory,
    EngineOptions,
    OptionError,
    OutOfMemory,
    Part,
    Refusal,
    SessionFileError,
    TellsProgress,
)
from edge_rt.testing.adapters_conformance import AdaptersConformance
from edge_rt.testing.feeding import feed, feed_new, hidden_after, kept_rows, sequences, tokens_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt.hooks import ModelFile

_MISUSE = (EdgeError, LookupError, ValueError)  # what use after free or close may raise: anything but silence or a crash


class EngineConformance(AdaptersConformance):
    """Subclass with fixtures ``engine_factory`` and ``model``."""

    options: ClassVar[EngineOptions] = EngineOptions(context=640, threads=1)
    """What the engine is opened with; ``context`` must be at least 64, and 40 more than its ``chunk`` for all tests to run."""

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
            none, *wanted = engine.step([Part(a, tokens, "none"), Part(b, tokens, "last"), Part(c, tokens, "all")])
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
                results = engine.step([Part(opened[i], texts[i][start : start + 4], "all") for i in live])
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
                engine.step([Part(other, more), Part(full, more)])
            assert (engine.length(full), engine.length(other)) == (context - 4, 0)
            with pytest.raises(ContextError):
                engine.step([Part(other, [*tokens, *more])])
            assert engine.length(other) == 0
            got = feed(engine, full, more[:4])
            assert engine.length(full) == context
            with pytest.raises(ContextError):
                engine.step([Part(full, more[:1])])
        self._assert_close(got, feed_new(engine, tokens + more[:4], context - 4)[-4:])

    def test_tokens_outside_the_vocabulary_are_refused(self, engine: Engine) -> None:
        with sequences(engine, 1) as (sequence,):
            for bad in (-1, engine.info.n_vocab, 1 << 40):
                with pytest.raises(OptionError):
                    engine.step([Part(sequence, [1, bad])])
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
        for use in (lambda: engine.step([Part(gone, [1])]), lambda: engine.length(gone), lambda: engine.free_sequence(gone)):
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
            none, *wanted = engine.hidden([Part(a, tokens, "none"), Part(b, tokens, "last"), Part(c, tokens, "all")])
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
                parts = [Part(sequence, tokens[start : start + size], "all") for start in range(0, 20, size)]
                self._assert_close(np.concatenate([np.array(engine.hidden([part])[0]) for part in parts]), all_)
        with sequences(engine, 1) as (sequence,):
            engine.hidden([Part(sequence, [(tokens[0] + 1) % engine.info.n_vocab, *tokens[1:]], "none")])
            (other,) = engine.hidden([Part(sequence, more, "last")])
            assert other is not None
            other = np.array(other)  # it is valid until the next call
            assert not np.array_equal(other, hidden_after(engine, [*tokens, *more])), "the first token makes no difference"
            for bad in (-1, engine.info.n_vocab):
                with pytest.raises(OptionError):
                    engine.hidden([Part(sequence, [bad], "last")])

    def test_closing_twice_is_harmless_and_use_after_it_an_error(self, engine_factory: EngineFactory, model: ModelFile) -> None:
        engine = engine_factory.open(model, self.options)
        sequence = engine.new_sequence()
        feed(engine, sequence, tokens_of(engine, 4))
        engine.close()
        engine.close()
        with pytest.raises(_MISUSE):
            engine.step([Part(sequence, [1])])
