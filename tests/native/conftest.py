"""Fixtures for tests with the native libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_rt.native.llama import Vocab


@pytest.fixture(scope="module", params=["smollm2", "bpe", "spm"])
def any_vocab(request: pytest.FixtureRequest, random_model: Callable[..., Path]) -> Iterator[Vocab]:
    """Vocabularies of each kind, of a real model and of random ones."""
    path = request.getfixturevalue("smollm2") if request.param == "smollm2" else random_model("llama", vocabulary=request.param)
    vocab = Vocab.load(path)
    yield vocab
    vocab.close()
