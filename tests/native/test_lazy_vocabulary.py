"""A file that was found sound is open before its vocabulary is loaded; any other only after."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edge_rt
from edge_rt.core.gguf import model_file
from edge_rt.errors import ModelFileError, NativeError, PluginError
from edge_rt.native import libs, llama
from edge_rt.plugin_host.registry import Registry
from edge_rt.testing.null_device import NullPlugin


def is_known(path: Path) -> bool:
    with path.open("rb") as file:
        return model_file.is_verified(model_file.fingerprint(file.fileno()))


def loading() -> bool:
    return any(thread.name == "edge-rt-vocabulary" for thread in threading.enumerate())


@pytest.fixture
def fresh(random_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model no one has opened."""
    return Path(shutil.copy(random_model("llama"), tmp_path / "m.gguf"))


@pytest.fixture
def sound(fresh: Path) -> Path:
    """A model that was opened before."""
    edge_rt.open(fresh, threads=1).close()
    return fresh


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Vocabularies load no further until it is set."""
    load, event = llama.c.model_load_from_file, threading.Event()

    def held(*arguments: Any) -> Any:
        event.wait(30)
        return load(*arguments)

    monkeypatch.setattr(llama.c, "model_load_from_file", held)
    yield event
    event.set()


def test_the_engine_takes_tokens_before_the_vocabulary_is_there(sound: Path, gate: threading.Event) -> None:
    with edge_rt.open(sound, threads=1) as model:
        assert len(model.logits([1, 2, 3])) == 3
        assert loading()
        threading.Timer(0.05, gate.set).start()
        tokens = model.tokenize("one two three")  # waits
        assert model.detokenize(tokens) == "one two three"
        assert not loading()
        assert model.vocab is model.vocab


def test_a_fresh_file_is_open_only_with_its_vocabulary(fresh: Path, gate: threading.Event) -> None:
    threading.Timer(0.05, gate.set).start()
    with edge_rt.open(fresh, threads=1):
        assert gate.is_set()
        assert not loading()


def test_closing_while_it_loads(sound: Path, gate: threading.Event) -> None:
    model = edge_rt.open(sound, threads=1)
    threading.Timer(0.05, gate.set).start()
    model.close()
    assert not loading()
    model.close()
    with pytest.raises(NativeError, match="closed"):
        model.tokenize("a")


def test_a_failed_opening_leaves_no_thread(sound: Path, gate: threading.Event) -> None:
    threading.Timer(0.05, gate.set).start()
    with pytest.raises(PluginError):
        edge_rt.open(sound, engine="nonsense")
    assert not loading()


def test_a_vocabulary_that_does_not_load(fresh: Path, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``open`` refuses it, unless it is known to be sound: then its first use does."""
    other = Path(shutil.copy(fresh, tmp_path / "other.gguf"))
    monkeypatch.setattr(llama.c, "model_load_from_file", lambda *_: None)
    with pytest.raises(ModelFileError, match="vocabulary"):
        edge_rt.open(other, threads=1)
    assert not is_known(other)
    with edge_rt.open(sound, threads=1) as model, model.session() as session:
        for use in (lambda: model.tokenize("a"), lambda: session.generate("a")):
            with pytest.raises(ModelFileError, match="vocabulary"):
                use()
        assert len(model.logits([1])) == 1
    assert not loading()


def test_what_makes_a_file_unknown(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_known(sound)
    with monkeypatch.context() as patch:
        patch.setattr(libs, "identity", lambda: "another libllama")
        assert not is_known(sound)
    with monkeypatch.context() as patch:
        patch.setattr(model_file, "__version__", "0.0.0")
        assert not is_known(sound)
    status = sound.stat()
    with sound.open("r+b") as file:
        file.write(b"GGUF")
    os.utime(sound, ns=(status.st_atime_ns, status.st_mtime_ns))  # a forger sets the time back
    assert not is_known(sound)


def test_an_engine_with_a_vocabulary_of_its_own_proves_nothing(fresh: Path) -> None:
    registry = Registry.load(entry_points=False, plugins={"null": NullPlugin(reply="Hello")})
    with edge_rt.open(fresh, engine="null", device="null", registry=registry) as model:
        assert model.vocab is model.engine.vocab  # type: ignore[attr-defined]
    assert not is_known(fresh)
    assert not loading()
