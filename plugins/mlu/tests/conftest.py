"""Nothing that a test keeps ends up in the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EDGE_RT_CACHE", str(folder))
    return folder
