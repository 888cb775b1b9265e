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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from edge_rt.guarded import PluginEmbedder
from edge_rt.hooks import Device, Embedder, Refusal
from edge_rt.testing.engine_conformance import EngineConformance
from edge_rt.testing.post_processor_conformance import TEXTS, PostProcessorConformance

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
        for texts in (TEXTS, TEXTS[:1], ["The quick brown fox. 你好，世界。 " * 800]):
            assert len(embed(texts)) == len(texts)

    def test_examples(self, embedder: Embedder) -> None:
        assert self.examples, "define examples in your subclass"
        for question, texts in self.examples.items():
            asked, near, far = _directions(embedder, [question, *texts])
            assert asked @ near >= embedder.relevant, f"{texts[0]!r} is not found close to {question!r}: {asked @ near:.2f}"
            assert asked @ far < embedder.relevant, f"{texts[1]!r} is found close to {question!r}: {asked @ far:.2f}"

    def test_the_same_text_has_the_same_vector(self, embedder: Embedder) -> None:
        texts = (*self.examples, *TEXTS)
        together = _directions(embedder, texts)
        for text, vector in zip(texts, together, strict=True):
            assert _apart(_directions(embedder, [text]), vector) < _ROUNDING, f"{text!r} has another vector when it is alone"
        assert _apart(_directions(embedder, texts[::-1])[::-1], together) < _ROUNDING, "the order of texts matters"

    def test_on_several_threads_at_once(self, embedder: Embedder) -> None:
        texts = (*self.examples, *TEXTS)
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
