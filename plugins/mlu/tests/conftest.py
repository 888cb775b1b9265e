"""Tiny models, an engine and a simulated card for the tests. Nothing that a test keeps ends up in the user's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from edge_rt_mlu.device import Mlu, System, places
from edge_rt_mlu.factory import TorchFactory

from edge_rt.hooks import EngineOptions, ModelFile

if TYPE_CHECKING:
    from edge_rt_mlu.engine import TorchEngine


@pytest.fixture(autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EDGE_RT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a tiny random model and gives its path."""
    from edge_rt.testing.random_models import write_random_model

    folder = tmp_path_factory.mktemp("models")

    def write(architecture: str = "llama", **measures: Any) -> Path:
        return write_random_model(folder / f"{len(list(folder.iterdir()))}.gguf", architecture, **measures)

    return write


@pytest.fixture(scope="session")
def tiny(make: Callable[..., Path]) -> Path:
    """A model of two blocks."""
    return make(context=1024)


@pytest.fixture
def engine(tiny: Path) -> Iterator[TorchEngine]:
    """The torch engine on the CPU."""
    from edge_rt_mlu.engine import TorchEngine

    with ModelFile.open(tiny) as file, closing(TorchFactory().open(file, EngineOptions(threads=1))) as engine:
        assert isinstance(engine, TorchEngine)
        yield engine


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mlu:
    """A simulated machine with an MLU, whose PyTorch device is the CPU."""
    from edge_rt_mlu import simulated

    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/cambricon_dev0").touch()
    cnmon = tmp_path / "cnmon"
    cnmon.write_text(f"#!/bin/sh\ncat {Path(__file__).parent / 'fixtures/cnmon-x8.txt'}\n")
    cnmon.chmod(0o755)
    simulated.install(monkeypatch, tmp_path, "torch_mlu", "mlu")
    return places(System(tmp_path, str(tmp_path), {}))[0]
