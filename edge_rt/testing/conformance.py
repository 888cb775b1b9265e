"""Suites that plugin authors subclass, with pytest: what every engine, device, embedder and post-processor must do.

    class TestMyEngine(EngineConformance):
        @pytest.fixture
        def engine_factory(self): return MyEngineFactory()

        @pytest.fixture
        def model(self): return ModelFile.open("tiny.gguf")

They need pytest and hypothesis (``pip install "edge-rt[dev]"``).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_rt.guarded import PluginEmbedder
from edge_rt.hooks import Device, Embedder, PostProcessorFactory, Refusal
from edge_rt.testing.engine_conformance import EngineConformance

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["DeviceConformance", "EmbedderConformance", "EngineConformance", "PostProcessorConformance"]


# ---- devices ---------------------------------------------------------------------------------------------------------


class DeviceConformance:
    """Subclass with a fixture ``device``. It passes with and without the hardware, and says which it saw."""

    @pytest.fixture
    def device(self) -> Device:
        """The device under test."""
        raise NotImplementedError("define the fixture device in your subclass")

    def test_probe_offers_or_refuses(self, device: Device) -> None:
        assert isinstance(device, Device)
        assert device.name
        assert device.name == device.name.strip().lower()
        answer = device.probe()
        if isinstance(answer, Refusal):
            assert answer.reason
            assert answer.remedy, "a refusal must say what the user can do"
            return
        assert math.isfinite(answer.score)
        assert answer.description
        assert answer.memory_bytes > 0
        assert answer.engines
        assert answer.basis in ("measured", "simulated", "projected", "unknown")
        assert all(feature and feature == feature.lower() for feature in answer.features)
        assert len(set(answer.features)) == len(answer.features)

    def test_probing_is_quick_repeatable_and_leaves_no_trace(self, device: Device, capfd: pytest.CaptureFixture[str]) -> None:
        before = dict(os.environ), os.getcwd()
        first = device.probe()
        start = time.perf_counter()
        second = device.probe()
        assert time.perf_counter() - start < 1.0
        assert first == second
        assert (dict(os.environ), os.getcwd()) == before
        assert capfd.readouterr() == ("", "")


_DEFAULT_TEXTS = ("", "a", "The quick brown fox.\n", "naïve café — 12,5 %", "你好，世界。", "👩‍👩‍👧 e\u0301", "\r\n\t  \0")


# ---- embedders -------------------------------------------------------------------------------------------------------


class EmbedderConformance:
    """Subclass with a fixture ``embedder``, and ``examples``: questions, each with a text about it and one that is not."""

    examples: ClassVar[Mapping[str, tuple[str, str]]] = MappingProxyType({})
    """The cosine of a question and the first text must be ``relevant`` or more, that with the second less."""

    @pytest.fixture
    def embedder(self) -> Embedder:
        """The embedder under test."""
        raise NotImplementedError("define the fixture embedder in your subclass")

    def test_a_vector_for_every_text(self, embedder: Embedder) -> None:
        guarded = PluginEmbedder("the plugin under test", embedder)
        assert 0 < guarded.relevant < 1
        embed = guarded.start()  # which raises for what a session would not take
        for texts in (_DEFAULT_TEXTS, _DEFAULT_TEXTS[:1], [_repeat("The quick brown fox. 你好，世界。 ", 20_000)]):
            assert len(embed(texts)) == len(texts)

    def test_examples(self, embedder: Embedder) -> None:
        assert self.examples, "define examples in your subclass"
        for question, texts in self.examples.items():
            asked, near, far = _directions(embedder, [question, *texts])
            assert asked @ near >= embedder.relevant, f"{texts[0]!r} is not found close to {question!r}: {asked @ near:.2f}"
            assert asked @ far < embedder.relevant, f"{texts[1]!r} is found close to {question!r}: {asked @ far:.2f}"

    def test_the_same_text_has_the_same_vector(self, embedder: Embedder) -> None:
        texts = (*self.examples, *_DEFAULT_TEXTS)
        together = _directions(embedder, texts)
        for text, vector in zip(texts, together, strict=True):
            assert _apart(_directions(embedder, [text]), vector) < _ROUNDING, f"{text!r} has another vector when it is alone"
        assert _apart(_directions(embedder, texts[::-1])[::-1], together) < _ROUNDING, "the order of texts matters"

    def test_on_several_threads_at_once(self, embedder: Embedder) -> None:
        texts = (*self.examples, *_DEFAULT_TEXTS)
        alone = _directions(embedder, texts)
        with ThreadPoolExecutor(4) as threads:
            for n, found in enumerate(threads.map(lambda n: _directions(embedder, texts[n % len(texts) :]), range(16))):
                assert _apart(found, alone[n % len(texts) :]) < _ROUNDING, "threads disturb each other"


_ROUNDING = 0.03
"""How far apart vectors of length 1 of the same text may be, because other texts were in the same call: a cosine of 0.9995."""


def _apart(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a - b, axis=-1).max())


def _directions(embedder: Embedder, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Vectors of length 1."""
    return PluginEmbedder("the plugin under test", embedder).start()(texts)


# ---- post-processors -------------------------------------------------------------------------------------------------

_suite = settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
)


class PostProcessorConformance:
    """Subclass with a fixture ``factory``, and ``examples``: texts that make the processor do all it does, and what they become."""

    examples: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Input and output. The suite also feeds them in every division, in parts and mixed, where it can only compare."""
    max_held: ClassVar[int] = 256
    """Characters of output the processor may hold back, at most."""

    @pytest.fixture
    def factory(self) -> PostProcessorFactory:
        """The factory under test."""
        raise NotImplementedError("define the fixture factory in your subclass")

    @_suite
    @given(data=st.data())
    def test_every_split_gives_the_same_text(self, factory: PostProcessorFactory, data: st.DataObject) -> None:
        text = data.draw(self._texts())
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert _transform(factory, pieces) == _transform(factory, [text])

    def test_examples(self, factory: PostProcessorFactory) -> None:
        assert self.examples, "define examples in your subclass"
        assert {text: _transform(factory, [text]) for text in self.examples} == dict(self.examples)

    def test_character_by_character(self, factory: PostProcessorFactory) -> None:
        for text in (*self.examples, *_DEFAULT_TEXTS, "".join(self.examples)):
            assert _transform(factory, text) == _transform(factory, [text])

    @_suite
    @given(data=st.data())
    def test_streams_do_not_touch_each_other(self, factory: PostProcessorFactory, data: st.DataObject) -> None:
        texts = [data.draw(self._texts()) for _ in range(2)]
        streams, outputs = [factory.make() for _ in texts], ["", ""]
        for i in range(max(map(len, texts))):
            for number, text in enumerate(texts):
                outputs[number] += streams[number].feed(text[i : i + 1])
        for number, text in enumerate(texts):
            outputs[number] += streams[number].flush()
            assert outputs[number] == _transform(factory, [text])

    def test_flush_gives_the_rest_once(self, factory: PostProcessorFactory) -> None:
        assert _transform(factory, []) == _transform(factory, [""])
        for text in (*self.examples, *_DEFAULT_TEXTS):
            processor = factory.make()
            processor.feed(text)
            processor.flush()
            assert processor.flush() == "", "the second flush returned text again"

    def test_what_is_held_back_is_bounded(self, factory: PostProcessorFactory) -> None:
        for text in self._long_texts(4000):
            processor, sent = factory.make(), 0
            for start in range(0, len(text), 16):
                sent += len(processor.feed(text[start : start + 16]))
                if start % 512 == 0:
                    so_far = text[: start + 16]
                    held = len(_transform(factory, [so_far])) - sent
                    assert held <= self.max_held, f"{held} characters are held back after {so_far[-40:]!r}"

    def test_time_is_linear(self, factory: PostProcessorFactory) -> None:
        for text in self._long_texts(32_000):
            short, long = _best_time(factory, _pieces(text[:4_000], 4)), _best_time(factory, _pieces(text, 4))
            # Eight times the text: linear takes 8 times as long, quadratic 64 times.
            assert long < 24 * short + 0.01, f"8 times the text took {long / short:.0f} times as long"

    def _texts(self) -> st.SearchStrategy[str]:
        """Examples, parts of them and other characters, in any order."""
        known = [text for text in (*self.examples, *_DEFAULT_TEXTS) if text]
        part = st.sampled_from(known).flatmap(lambda text: st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(_part(text)))
        return st.lists(st.one_of(st.sampled_from(known), part, st.text(max_size=4)), max_size=6).map("".join)

    def _long_texts(self, length: int) -> Iterator[str]:
        """The examples over and over, and single characters of theirs repeated, which is where holding back goes wrong."""
        yield _repeat("".join((*self.examples, *_DEFAULT_TEXTS)), length)
        for character in sorted(set("".join(self.examples)))[:40]:
            yield character * length


def _part(text: str) -> Callable[[tuple[int, int]], str]:
    return lambda ends: text[min(ends) : max(ends)]


def _repeat(text: str, length: int) -> str:
    return (text * (length // len(text) + 1))[:length]


def _pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def _transform(factory: PostProcessorFactory, pieces: Sequence[str]) -> str:
    processor = factory.make()
    return "".join([*map(processor.feed, pieces), processor.flush()])


def _best_time(factory: PostProcessorFactory, pieces: Sequence[str]) -> float:
    """Seconds of processor time of the quickest of three runs."""
    times = []
    for _ in range(3):
        start = time.process_time()
        _transform(factory, pieces)
        times.append(time.process_time() - start)
    return min(times)
