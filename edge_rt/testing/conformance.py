"""Suites that plugin authors subclass, with pytest: what every engine, device, embedder and post-processor must do.

    class TestMyEngine(EngineConformance):
        @pytest.fixture
        def engine_factory(self): return MyEngineFactory()

        @pytest.fixture
        def model(self): return ModelFile.open("tiny.gguf")

They need pytest and hypothesis (``pip install "edge-rt[dev]"``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from edge_rt.guarded import PluginEmbedder
from edge_rt.hooks import Embedder
from edge_rt.testing.device_conformance import DeviceConformance
from edge_rt.testing.engine_conformance import EngineConformance
from edge_rt.testing.post_processor_conformance import TEXTS, PostProcessorConformance

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["DeviceConformance", "EmbedderConformance", "EngineConformance", "PostProcessorConformance"]


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
