"""Fixtures for tests with the native libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from simulated import build_simulator

from edge_rt.native import devices
from edge_rt.native.llama import Vocab


@pytest.fixture(scope="module", params=["smollm2", "bpe", "spm"])
def any_vocab(request: pytest.FixtureRequest, random_model: Callable[..., Path]) -> Iterator[Vocab]:
    """Vocabularies of each kind, of a real model and of random ones."""
    path = request.getfixturevalue("smollm2") if request.param == "smollm2" else random_model("llama", vocabulary=request.param)
    vocab = Vocab.load(path)
    yield vocab
    vocab.close()


@pytest.fixture(scope="session")
def _built_simulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_simulator(tmp_path_factory.mktemp("simulator"))


@pytest.fixture(scope="module")
def simulator(_built_simulator: Path) -> Iterator[str]:
    """The name of the backend of the simulated accelerator, which is there for one module's tests; skips where it cannot be built."""
    devices.registered()  # libggml is in the process: the simulator's own dependencies are found by their names
    name = devices.load(str(_built_simulator))
    yield name
    devices.unload(name)
