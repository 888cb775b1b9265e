"""Fixtures for all tests: the default model, tiny random models, a model without native code, a cache of the tests' own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

_HERE = Path(__file__).parent
_KINDS = {
    "unit": "pure Python, milliseconds, no model",
    "native": "needs the native libraries",
    "e2e": "runs the real program or the default model",
}


def pytest_configure(config: pytest.Config) -> None:
    """A marker for each folder, for ``pytest -m unit``."""
    for kind, meaning in _KINDS.items():
        config.addinivalue_line("markers", f"{kind}: {meaning}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with its folder's name."""
    for item in items:
        kind = item.path.relative_to(_HERE).parts[0] if _HERE in item.path.parents else "unit"  # a plugin's, in its own folder
        if kind in _KINDS:
            item.add_marker(getattr(pytest.mark, kind))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Q4_1): ``$EDGE_RT_TEST_MODEL``, else the user's cache, where it is fetched the first time."""
    if given := os.environ.get("EDGE_RT_TEST_MODEL"):
        return Path(given)
    from edge_rt import model_hub

    with pytest.MonkeyPatch.context() as environment:
        if _USERS_CACHE is None:
            environment.delenv("EDGE_RT_CACHE", raising=False)
        else:
            environment.setenv("EDGE_RT_CACHE", _USERS_CACHE)
        return model_hub.fetch_model(model_hub.DEFAULT)


_USERS_CACHE = os.environ.get("EDGE_RT_CACHE")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing a test packs or fetches ends up in the user's cache; what was packed once serves the whole run."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("EDGE_RT_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _empty_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test starts with an empty cache of its own."""
    if request.node.get_closest_marker("unit"):
        monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path_factory.mktemp("unit") / "cache"))


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``random_model(architecture="llama", **measures)``: a tiny random model, written once for the same arguments."""
    from edge_rt.testing.random_models import write_random_model

    folder = tmp_path_factory.mktemp("models")
    written: dict[str, Path] = {}

    def make(architecture: str = "llama", **measures: Any) -> Path:
        key = repr((architecture, sorted(measures.items())))
        if key not in written:
            written[key] = write_random_model(folder / f"{architecture}-{len(written)}.gguf", architecture, **measures)
        return written[key]

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For a daemon: the plugin with the null engine of daemons.py is installed there."""
    from daemons import write_plugin

    write_plugin(tmp_path)
    return tmp_path


@pytest.fixture
def null_model(random_model: Callable[..., Path]) -> Iterator[Any]:
    """An open Model on the null engine, which answers "Hello, world!" when decoding greedily."""
    import edge_rt
    from edge_rt.plugin_host.registry import Registry
    from edge_rt.testing.null_device import NullPlugin

    registry = Registry.load(entry_points=False, plugins={"null": NullPlugin(reply="Hello, world!")})
    with edge_rt.open(random_model(), engine="null", device="null", registry=registry) as model:
        yield model


@pytest.fixture(scope="module")
def shared_null_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An open Model on the null engine, one for all tests of a file, with a context of 512."""
    import edge_rt
    from edge_rt.plugin_host.registry import Registry
    from edge_rt.testing.null_device import NullPlugin
    from edge_rt.testing.random_models import write_random_model

    registry, path = Registry.load(entry_points=False, plugins={"null": NullPlugin()}), tmp_path_factory.mktemp("m") / "m.gguf"
    with edge_rt.open(write_random_model(path), engine="null", device="null", registry=registry, context=512) as opened:
        yield opened


@pytest.fixture
def open_null(random_model: Callable[..., Path]) -> Iterator[Callable[..., Any]]:
    """``open_null(reply=None, plugins={}, **options)``: a model on the null engine."""
    import edge_rt
    from edge_rt.plugin_host.registry import Registry
    from edge_rt.testing.null_device import NullPlugin

    opened: list[Any] = []

    def make(reply: str | None = None, plugins: Mapping[str, object] = MappingProxyType({}), **options: Any) -> Any:
        registry = Registry.load(entry_points=False, plugins={"null": NullPlugin(reply=reply), **plugins})
        opened.append(edge_rt.open(random_model(), engine="null", device="null", registry=registry, **options))
        return opened[-1]

    yield make
    for model in opened:
        model.close()


@pytest.fixture
def client(daemon: Any) -> Iterator[Any]:
    """A client of the ``daemon`` that a test module starts."""
    with daemon.client() as found:
        yield found
