"""The layout of values is chosen by time; a measurement that says two things at once is not remembered."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_rt.core import autotune
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.graph.config import ModelConfig, read_config
from edge_rt.native import ggml


@pytest.fixture
def config(random_model: Callable[..., Path]) -> ModelConfig:
    with ModelFile.open(random_model("llama")) as file:
        return read_config(file.header)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path))
    return tmp_path / "attention.json"


def timed(monkeypatch: pytest.MonkeyPatch, times: Iterator[float]) -> list[bool]:
    """Transposed values take these times, those by cell 1; which were asked for."""
    asked: list[bool] = []

    @contextlib.contextmanager
    def attention(*_: object, transposed: bool) -> Iterator[Callable[[], float]]:
        def once() -> float:
            asked.append(transposed)
            return next(times) if transposed else 1.0

        yield once

    monkeypatch.setattr(autotune, "_attention", attention)
    return asked


@pytest.mark.parametrize(("time", "faster"), [(0.2, True), (0.5, False)])
def test_the_layout_is_chosen_by_time_and_remembered(
    config: ModelConfig, cache: Path, monkeypatch: pytest.MonkeyPatch, time: float, *, faster: bool
) -> None:
    asked = timed(monkeypatch, itertools.repeat(time))
    assert autotune.autotune_v_layout(config, 1) is faster
    assert asked[:4] == [False, True, False, True], "they take turns"
    asked.clear()
    assert autotune.autotune_v_layout(config, 1) is faster
    assert asked == []


def test_disturbed_rounds_do_not_count(config: ModelConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, itertools.cycle([7.0, 0.9, 0.2]))
    assert autotune.autotune_v_layout(config, 1)
    assert list(json.loads(cache.read_text())["values"].values()) == [0.2]


def test_what_the_halves_do_not_agree_about_is_asked_again_by_the_next(
    config: ModelConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = autotune._ROUNDS
    timed(monkeypatch, iter([0.2] * half + [0.9] * half + [0.2] * 2 * half))
    assert not autotune.autotune_v_layout(config, 1), "the layout of libllama"
    assert not cache.exists()
    assert autotune.autotune_v_layout(config, 1)
    assert cache.exists()


def test_both_layouts_can_be_timed_here(config: ModelConfig) -> None:
    for transposed in (False, True):
        with ggml.cpu_backend(1) as backend, autotune._attention(config._replace(n_layer=1), 1, backend, transposed=transposed) as once:
            assert 0 < once() < 1
