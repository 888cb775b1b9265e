"""The null engine passes the conformance suite, and engines with a fault planted in them do not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_rt.hooks import EdgeError, EngineOptions, ModelFile, OptionError, Pruned, SequenceBatch, SessionFileError
from edge_rt.native.llama import Vocab
from edge_rt.testing.conformance import DeviceConformance, EngineConformance
from edge_rt.testing.null_device import BOS, EOS, EOT, NullDevice, NullEngine, NullEngineFactory, NullVocab


def _model(folder: Path, name: str = "tiny.null", content: bytes = b"weights") -> Any:
    path = folder / name
    path.write_bytes(content)
    return SimpleNamespace(path=path)


class TestNullEngine(EngineConformance):
    tolerance = 0

    @pytest.fixture
    def engine_factory(self) -> NullEngineFactory:
        return NullEngineFactory()

    @pytest.fixture
    def model(self, random_model: Callable[..., Path]) -> Iterator[ModelFile]:
        with ModelFile.open(random_model()) as model:
            yield model


class TestNullDevice(DeviceConformance):
    @pytest.fixture
    def device(self) -> NullDevice:
        return NullDevice()


# ---- faults the suite must find --------------------------------------------------------------------------------------


class _ForgetsFirstToken(NullEngine):
    def step(self, parts: Any) -> Any:
        return super().step([SequenceBatch(p.sequence, [0, *p.tokens[1:]], p.logits) if self.length(p.sequence) == 0 else p for p in parts])


class _ChunkBorderSlips(NullEngine):
    """A part longer than a chunk is fed in chunks, the second from an empty history."""

    def step(self, parts: Any) -> Any:
        long = [p for p in parts if len(p.tokens) > self.info.chunk]
        results = super().step(parts)
        for part in long:
            tokens = part.tokens[self.info.chunk :]
            self.truncate(part.sequence, 0)
            results[parts.index(part)][self.info.chunk :] = super().step([SequenceBatch(part.sequence, tokens, "all")])[0]
            self.truncate(part.sequence, 0)
            super().step([SequenceBatch(part.sequence, part.tokens, "none")])
        return results


class _BatchMixesSequences(NullEngine):
    def step(self, parts: Any) -> Any:
        results = super().step(parts)
        return results[::-1] if len(parts) == 2 and all(p.logits == "all" for p in parts) else results


class _ForkShares(NullEngine):
    def fork_sequence(self, sequence: int, length: int) -> int:
        source = self._get(sequence)
        new = super().fork_sequence(sequence, length)
        if length == len(source.tokens):
            return new
        self._sequences[new].states = source.states  # the cells of the source, not copies
        del source.states[length:]
        return new


class _TruncateKeepsState(NullEngine):
    def truncate(self, sequence: int, length: int) -> None:
        del self._get(sequence).tokens[length:]


class _GrowsWhenRefused(NullEngine):
    def step(self, parts: Any) -> Any:
        for part in parts:  # feeds the first part before it looks at the second
            super().step([part]) if part.logits == "none" else None
        first, *others = parts
        return [*super().step([first]), *(super().step(others) if others else [])]


class _LiesAboutExactRows(NullEngine):
    def step(self, parts: Any) -> Any:
        return [r if r is None or len(r) < 5 else r + np.float32(1e-6) * np.abs(r) for r in super().step(parts)]


class _ImportTrusts(NullEngine):
    def import_sequence(self, data: Any) -> int:
        try:
            return super().import_sequence(data)
        except SessionFileError:
            return self.new_sequence()


class _ImportForgets(NullEngine):
    def import_sequence(self, data: Any) -> int:
        sequence = super().import_sequence(data)
        if self.length(sequence):
            self._sequences[sequence].states[-1] ^= 1
        return sequence


class _LastIsFirst(NullEngine):
    def step(self, parts: Any) -> Any:
        results = super().step([p._replace(logits="all") if p.logits == "last" else p for p in parts])
        return [r[:1] if p.logits == "last" else r for p, r in zip(parts, results, strict=True)]


class _Leaks(NullEngine):
    def free_sequence(self, sequence: int) -> None:
        kept = self._get(sequence)
        super().free_sequence(sequence)
        self._sequences[-self._next] = kept


class _WrapsTokens(NullEngine):
    def step(self, parts: Any) -> Any:
        return super().step([p._replace(tokens=[t % self.info.n_vocab for t in p.tokens]) for p in parts])


class _RevivesAfterClose(NullEngine):
    def close(self) -> None:
        """Keeps on working."""


class _ClosesGaps(NullEngine):
    def remove_cells(self, sequence: int, spans: Sequence[tuple[int, int]]) -> int:
        given = super().remove_cells(sequence, spans)
        self.renumber(sequence)
        return given


class _RemovesWrongCells(NullEngine):
    def remove_cells(self, sequence: int, spans: Sequence[tuple[int, int]]) -> int:
        for start, end in spans:  # cells have moved down by the second span
            super().remove_cells(sequence, [(start, end)] if end <= self.length(sequence) else [])
        return 0


class _ReturnsWithoutState(NullEngine):
    def insert_cells(self, sequence: int, at: int, data: bytes | memoryview) -> int:
        inserted = super().insert_cells(sequence, at, data)
        if at + inserted < self.length(sequence):
            self._sequences[sequence].states[-1] = 0
        return inserted


class _PrunesAlways(NullEngine):
    def prune(self, sequence: int, keep: int, *, first: int, last: int, method: str = "defensive", queries: int | None = None) -> Pruned:
        return super().prune(sequence, max(1, min(keep, self.length(sequence) - 1)), first=first, last=last, method=method, queries=queries)


class _PruningForgetsPositions(NullEngine):
    def prune(self, sequence: int, keep: int, *, first: int, last: int, method: str = "defensive", queries: int | None = None) -> Pruned:
        pruned = super().prune(sequence, keep, first=first, last=last, method=method, queries=queries)
        self.renumber(sequence)
        return pruned


class _PruningReachesOthers(NullEngine):
    def prune(self, sequence: int, keep: int, *, first: int, last: int, method: str = "defensive", queries: int | None = None) -> Pruned:
        pruned = super().prune(sequence, keep, first=first, last=last, method=method, queries=queries)
        for other in self._sequences.values():
            other.states[-1:] = [state ^ pruned.cells for state in other.states[-1:]]
        return pruned


class _WatchingDisturbs(NullEngine):
    def _feed(self, part: SequenceBatch) -> Any:
        logits = super()._feed(part)
        return logits if logits is None else logits + np.float32(self._sequences[part.sequence].window)


class _HiddenStatesForget(NullEngine):
    def hidden(self, parts: Any) -> Any:
        for part in parts:
            self.truncate(part.sequence, 0)
        return super().hidden(parts)


class _KnowsAllMethods(NullEngine):
    def prune(self, sequence: int, keep: int, *, first: int, last: int, method: str = "defensive", queries: int | None = None) -> Pruned:
        return super().prune(sequence, keep, first=first, last=last)


class _IgnoresScales(NullEngine):
    def adapt(self, sequence: int, adapter: int | None, scale: float = 1.0, *, imported: bool = False) -> None:
        super().adapt(sequence, adapter, imported=imported)


class _AdaptsWhatIsThere(NullEngine):
    def adapt(self, sequence: int, adapter: int | None, scale: float = 1.0, *, imported: bool = False) -> None:
        super().adapt(sequence, adapter, scale, imported=True)


class _ForksForgetAdapters(NullEngine):
    def fork_sequence(self, sequence: int, length: int) -> int:
        fork = super().fork_sequence(sequence, length)
        self._get(fork).salt = 0
        return fork


FAULTS = {
    _IgnoresScales: "test_each_sequence_goes_through_its_own_adapter",
    _AdaptsWhatIsThere: "test_an_adapter_is_bound_to_an_empty_sequence_alone",
    _ForksForgetAdapters: "test_forks_and_restored_sequences_go_on_through_it",
    _PrunesAlways: "test_nothing_is_pruned_where_all_fits",
    _PruningForgetsPositions: "test_what_is_left_goes_on",
    _PruningReachesOthers: "test_pruning_does_not_touch_what_was_shared",
    _WatchingDisturbs: "test_watching_changes_no_bit",
    _KnowsAllMethods: "test_nonsense_is_refused",
    _HiddenStatesForget: "test_hidden_states_are_of_the_cells_that_logits_are_of",
    _ForgetsFirstToken: "test_logits_depend_on_every_token_before",
    _ChunkBorderSlips: "test_a_part_longer_than_a_chunk",
    _BatchMixesSequences: "test_several_sequences_in_one_step_equal_one_by_one",
    _ForkShares: "test_a_fork_and_its_source_do_not_touch_each_other",
    _TruncateKeepsState: "test_truncated_cells_are_forgotten",
    _GrowsWhenRefused: "test_a_step_beyond_the_context_changes_nothing",
    _LiesAboutExactRows: "test_exact_rows_are_exact",
    _ImportTrusts: "test_what_is_no_saved_sequence_is_refused",
    _ImportForgets: "test_an_imported_sequence_goes_on_like_the_exported_one",
    _LastIsFirst: "test_returns_the_rows_that_were_asked_for",
    _Leaks: "test_a_freed_sequence_is_gone_and_its_memory_back",
    _WrapsTokens: "test_tokens_outside_the_vocabulary_are_refused",
    _ClosesGaps: "test_removed_cells_leave_a_gap",
    _RemovesWrongCells: "test_spans_that_are_none_are_refused",
    _ReturnsWithoutState: "test_cells_that_come_back_were_never_away",
    _RevivesAfterClose: "test_closing_twice_is_harmless_and_use_after_it_an_error",
}


def _failures(fault: type[NullEngine], model: Any) -> list[str]:
    """Names of the suite's tests that a faulty engine fails."""
    factory = SimpleNamespace(name="null", supports=lambda *_: 1.0, open=lambda _, options: fault(context=options.context))
    failed = []
    for name, test in inspect.getmembers(EngineConformance, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        suite = TestNullEngine()
        available = {
            "engine": fault(context=suite.options.context or 0),
            "engine_factory": factory,
            "model": model,
            "loras": [SimpleNamespace(file=SimpleNamespace(key=lambda name=name: name)) for name in "ab"],
            "size": 7,
            "spans": [(5, 7), (6, 8)],
        }
        try:
            test(suite, **{key: available[key] for key in inspect.signature(test).parameters if key != "self"})
        except (AssertionError, EdgeError, LookupError, pytest.fail.Exception):
            failed.append(name)
    return failed


@pytest.mark.parametrize(("fault", "test"), FAULTS.items())
def test_the_suite_finds_the_fault(fault: type[NullEngine], test: str, tmp_path: Path) -> None:
    assert test in _failures(fault, _model(tmp_path))


def test_the_suite_finds_no_fault_where_there_is_none(tmp_path: Path) -> None:
    assert _failures(NullEngine, _model(tmp_path)) == []


# ---- what is the null engine's own -----------------------------------------------------------------------------------


def _greedy(engine: NullEngine, prompt: str, limit: int = 40) -> str:
    sequence, tokens, out = engine.new_sequence(), engine.vocab.tokenize(prompt), []
    while len(out) < limit:
        (logits,) = engine.step([SequenceBatch(sequence, tokens)])
        assert logits is not None
        tokens = [int(logits[0].argmax())]
        if engine.vocab.is_eog(tokens[0]):
            break
        out += tokens
    return engine.vocab.detokenize(out).decode()


@pytest.mark.parametrize("reply", ["Hello, world!", "abab abac", "你好", ""])
def test_writes_its_reply_and_stops(reply: str) -> None:
    assert _greedy(NullEngine(reply=reply), "Say something: ") == reply


def test_supports_null_files_first_and_others_only_by_name(tmp_path: Path) -> None:
    factory = NullEngineFactory()
    assert factory.supports(_model(tmp_path), EngineOptions()) == 100
    assert factory.supports(_model(tmp_path, "model.gguf"), EngineOptions()) == 0


def test_another_file_is_another_model(tmp_path: Path) -> None:
    def logits(model: Any) -> Any:
        engine = NullEngineFactory().open(model, EngineOptions())
        return engine.step([SequenceBatch(engine.new_sequence(), [1, 2, 3])])[0]

    first, again, other = (logits(_model(tmp_path, "m.null", content)) for content in (b"one", b"one", b"two"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_context_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="at least 1 token"):
        NullEngineFactory().open(_model(tmp_path), EngineOptions(context=0))


def test_a_sequence_of_another_model_is_refused() -> None:
    one, other = NullEngine(seed=b"1"), NullEngine(seed=b"2")
    with pytest.raises(SessionFileError, match="another model"):
        other.import_sequence(one.export_sequence(one.new_sequence()))


# ---- vocabulary ------------------------------------------------------------------------------------------------------


def test_the_vocabulary_answers_all_that_libllamas_does() -> None:
    own = {"load", "adopt"}  # ways to make one from a file or a pointer
    names = {name for name in dir(Vocab) if not name.startswith("_")} - own
    names |= {"n_tokens", "kind", "train_context", "bos", "eos", "eot", "nl", "add_bos", "add_eos"}
    assert names <= set(dir(NullVocab))
    for name, method in inspect.getmembers(Vocab, inspect.isfunction):
        if not name.startswith("_") and name not in own:
            theirs, ours = (list(inspect.signature(f).parameters.values()) for f in (method, getattr(NullVocab, name)))
            assert [(p.name, p.kind, p.default) for p in theirs] == [(p.name, p.kind, p.default) for p in ours], name


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [BOS, *b"a<|end|>"]),
        ({"bos": False}, [*b"a<|end|>"]),
        ({"special": True}, [BOS, ord("a"), EOS]),
        ({"special": True, "bos": True}, [BOS, ord("a"), EOS]),
    ],
)
def test_tokenize(arguments: dict[str, Any], expected: list[int]) -> None:
    assert NullVocab().tokenize("a<|end|>", **arguments) == expected


def test_begin_of_text_is_not_added_twice() -> None:
    assert NullVocab().tokenize("<|begin|>a", special=True) == [BOS, ord("a")]


def test_pieces() -> None:
    vocab = NullVocab()
    assert vocab.detokenize(vocab.tokenize("héllo")) == "héllo".encode()
    assert (vocab.piece(EOT), vocab.piece(EOT, special=True)) == (b"", b"<|turn|>")
    assert [vocab.is_eog(t) for t in (EOS, EOT, BOS, 65)] == [True, True, False, False]
    assert [vocab.is_control(t) for t in (EOS, BOS, 65)] == [True, True, False]
    uses: list[Callable[[int], object]] = [vocab.piece, vocab.is_eog, vocab.is_control]
    for use in uses:
        with pytest.raises(OptionError, match="out of range"):
            use(260)
