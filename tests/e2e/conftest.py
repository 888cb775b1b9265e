"""Fixtures for tests with the real program and the default model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Daemon

from edge_rt import model_hub
from edge_rt.config import models_dir


@pytest.fixture(scope="session", autouse=True)
def installed(smollm2: Path, _cache_of_the_tests: Path) -> None:
    """The model under its name in the tests' own cache."""
    models_dir().mkdir(parents=True, exist_ok=True)
    link = models_dir() / model_hub.CATALOG[0].file
    if not link.exists():
        link.symlink_to(smollm2)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[Daemon]:
    """A daemon with the model, ready."""
    with Daemon(tmp_path_factory.mktemp("daemon"), "-m", str(smollm2), "-c", "1024") as found:
        found.ready().close()
        yield found
