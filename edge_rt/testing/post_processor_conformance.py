"""What every post-processor must do; part of ``edge_rt.testing.conformance``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_rt.hooks import CountsWork, HandlesCut, HoldsText, PostProcessor, PostProcessorFactory, Rules

TEXTS = ("", "a", "The quick brown fox.\n", "naïve café — 12,5 %", "你好，世界。", "👩‍👩‍👧 e\u0301", "\r\n\t  \0")
"""Texts of many kinds."""

Make = Callable[[], PostProcessor]

_suite = settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
)


class PostProcessorConformance:
    """Subclass with a fixture ``factory``, and ``examples``: texts that make the processor do all it does, and what they become.

    ``rules`` are those it is tested with, as its table of a rule file: subclass once for each set that matters.
    """

    examples: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Input and output. The suite also feeds them in every division, in parts and mixed, where it can only compare."""
    rules: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Its table of the rule file."""
    max_held: ClassVar[int] = 256
    """Characters of output the processor may hold back, at most."""

    @pytest.fixture
    def factory(self) -> PostProcessorFactory:
        """The factory under test."""
        raise NotImplementedError("define the fixture factory in your subclass")

    @pytest.fixture
    def make(self, factory: PostProcessorFactory) -> Make:
        """What makes a post-processor for one stream."""
        rules = Rules(self.rules)
        make = factory.compile(rules)
        rules.finish()
        return make

    @_suite
    @given(data=st.data())
    def test_every_split_gives_the_same_text(self, make: Make, data: st.DataObject) -> None:
        text = data.draw(self._texts())
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert _transform(make, pieces) == _transform(make, [text])

    def test_examples(self, make: Make) -> None:
        assert self.examples, "define examples in your subclass"
        assert {text: _transform(make, [text]) for text in self.examples} == dict(self.examples)

    def test_character_by_character(self, make: Make) -> None:
        for text in (*self.examples, *TEXTS, "".join(self.examples)):
            assert _transform(make, text) == _transform(make, [text])

    @_suite
    @given(data=st.data())
    def test_streams_do_not_touch_each_other(self, make: Make, data: st.DataObject) -> None:
        texts = [data.draw(self._texts()) for _ in range(2)]
        streams, outputs = [make() for _ in texts], ["", ""]
        for i in range(max(map(len, texts))):
            for number, text in enumerate(texts):
                outputs[number] += streams[number].feed(text[i : i + 1])
        for number, text in enumerate(texts):
            outputs[number] += streams[number].flush()
            assert outputs[number] == _transform(make, [text])

    def test_flush_gives_the_rest_once(self, make: Make) -> None:
        assert _transform(make, []) == _transform(make, [""])
        for text in (*self.examples, *TEXTS):
            processor = make()
            processor.feed(text)
            processor.flush()
            assert processor.flush() == "", "the second flush returned text again"

    @_suite
    @given(data=st.data())
    def test_a_cut_text_is_the_same_however_it_was_split(self, make: Make, data: st.DataObject) -> None:
        text, following = data.draw(self._texts()), data.draw(st.sampled_from(("", "\n\n", "###")))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert _cut(make, pieces, following) == _cut(make, [text], following)

    @_suite
    @given(data=st.data())
    def test_what_it_says_of_itself_is_true(self, make: Make, data: st.DataObject) -> None:
        processor, fed = make(), ""
        before: dict[str, int] = {}
        for piece in data.draw(st.lists(self._texts(), max_size=4)):
            processor.feed(piece)
            fed += piece
            if isinstance(processor, HoldsText):
                assert fed.endswith(processor.held), "what is held is not the end of the text"
                assert len(processor.held) <= self.max_held
            if isinstance(processor, CountsWork):
                counts = dict(processor.counts)
                assert all(counts.get(kind, 0) >= count for kind, count in before.items()), "counts went down"
                before = counts
        processor.flush()
        assert not isinstance(processor, HoldsText) or processor.held == "", "something is held after the end"

    def test_what_is_held_back_is_bounded(self, make: Make) -> None:
        for text in self._long_texts(4000):
            processor, sent = make(), 0
            for start in range(0, len(text), 16):
                sent += len(processor.feed(text[start : start + 16]))
                if start % 512 == 0:
                    so_far = text[: start + 16]
                    held = len(_transform(make, [so_far])) - sent
                    assert held <= self.max_held, f"{held} characters are held back after {so_far[-40:]!r}"

    def test_time_is_linear(self, make: Make) -> None:
        for text in self._long_texts(16_000):
            short, long = _best_time(make, _pieces(text[:2_000], 4)), _best_time(make, _pieces(text, 4))
            # Eight times the text: linear takes 8 times as long, quadratic 64 times.
            assert long < 24 * short + 0.01, f"8 times the text took {long / short:.0f} times as long"

    def _texts(self) -> st.SearchStrategy[str]:
        """Examples, parts of them and other characters, in any order."""
        known = [text for text in (*self.examples, *TEXTS) if text]
        part = st.sampled_from(known).flatmap(lambda text: st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(_part(text)))
        return st.lists(st.one_of(st.sampled_from(known), part, st.text(max_size=4)), max_size=6).map("".join)

    def _long_texts(self, length: int) -> Iterator[str]:
        """The examples over and over, and single characters of theirs repeated, which is where holding back goes wrong."""
        yield _repeat("".join((*self.examples, *TEXTS)), length)
        for character in sorted(set("".join(self.examples)))[:40]:
            yield character * length


def _part(text: str) -> Callable[[tuple[int, int]], str]:
    return lambda ends: text[min(ends) : max(ends)]


def _repeat(text: str, length: int) -> str:
    return (text * (length // len(text) + 1))[:length]


def _pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def _transform(make: Make, pieces: Sequence[str]) -> str:
    processor = make()
    return "".join([*map(processor.feed, pieces), processor.flush()])


def _cut(make: Make, pieces: Sequence[str], following: str) -> str:
    processor = make()
    return "".join([*map(processor.feed, pieces), processor.cut(following) if isinstance(processor, HandlesCut) else processor.flush()])


def _best_time(make: Make, pieces: Sequence[str]) -> float:
    """Seconds of processor time of the quickest of three runs."""
    times = []
    for _ in range(3):
        start = time.process_time()
        _transform(make, pieces)
        times.append(time.process_time() - start)
    return min(times)
