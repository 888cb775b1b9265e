"""The embedder suite passes a correct embedder, and finds each way to break the contract."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from edge_rt.errors import PluginError
from edge_rt.hooks import Embedder
from edge_rt.testing.conformance import EmbedderConformance


def embed(texts: Sequence[str]) -> Any:
    """Counts of hashed groups of three letters."""
    found = np.zeros((len(texts), 512), np.float32)
    for vector, text in zip(found, texts, strict=True):
        for i in range(len(text) - 2):
            vector[zlib.crc32(text[i : i + 3].encode()) % 512] += 1
    return found + 1e-3


class TestLetters(EmbedderConformance):
    examples = {"Which pump failed?": ("The pump failed again.", "Have a nice day!")}  # noqa: RUF012

    @pytest.fixture
    def embedder(self) -> Embedder:
        return Embedder("letters", embed, 0.4)


def loses_one(texts: Sequence[str]) -> Any:
    return embed(texts)[1:]


def refuses_blanks(texts: Sequence[str]) -> Any:
    return [vector / float(bool(text.strip())) for vector, text in zip(embed(texts), texts, strict=True)]


def refuses_long_ones(texts: Sequence[str]) -> Any:
    if max(map(len, texts)) > 2000:
        raise ValueError("too long")
    return embed(texts)


def all_alike(texts: Sequence[str]) -> Any:
    return embed(["the same"] * len(texts))


def all_different(texts: Sequence[str]) -> Any:
    return np.eye(1000, dtype=np.float32)[[zlib.crc32(text.encode()) % 1000 for text in texts]]


def centred(texts: Sequence[str]) -> Any:
    """Takes away what the texts of a call have in common."""
    found = embed(texts)
    return found - 0.9 * found.mean(axis=0)


BUFFER = np.zeros((100, 512), np.float32)


def shares_a_buffer(texts: Sequence[str]) -> Any:
    for i, text in enumerate(texts):
        BUFFER[i] = embed([text])[0]
        time.sleep(0.001)  # other threads have their turn
    return BUFFER[: len(texts)]


FAULTS: dict[Callable[[Sequence[str]], Any], str] = {
    loses_one: "test_a_vector_for_every_text",
    refuses_blanks: "test_a_vector_for_every_text",
    refuses_long_ones: "test_a_vector_for_every_text",
    all_alike: "test_examples",
    all_different: "test_examples",
    centred: "test_the_same_text_has_the_same_vector",
    shares_a_buffer: "test_on_several_threads_at_once",
}


def _passes(test: str, fault: Callable[[Sequence[str]], Any]) -> bool:
    try:
        getattr(TestLetters(), test)(Embedder("faulty", fault, 0.4))
    except (AssertionError, PluginError):
        return False
    return True


@pytest.mark.parametrize(("fault", "test"), FAULTS.items())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_suite_finds_the_fault(fault: Callable[[Sequence[str]], Any], test: str) -> None:
    assert _passes(test, embed)
    assert not _passes(test, fault)


@pytest.mark.parametrize("relevant", [0, 1])
def test_a_cosine_that_means_nothing_is_found(relevant: float) -> None:
    with pytest.raises(PluginError, match="must be between 0 and 1"):
        TestLetters().test_a_vector_for_every_text(Embedder("letters", embed, relevant))
