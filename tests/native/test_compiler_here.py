"""The target auto: kernels measured here, remembered, and what is predicted with them; and the command that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_rt.cli.main import main
from edge_rt.compiler import calibrate, cost
from edge_rt.compiler.here import here, packed_types
from edge_rt.compiler.shape import ModelShape, read_shape
from edge_rt.compiler.target import Kernel
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.plugin_host.registry import Registry
from edge_rt.testing.random_models import write_random_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "_COLD", 1 << 20)
    monkeypatch.setattr(calibrate, "_MOST_COLD", 1 << 20)
    monkeypatch.setattr(calibrate, "_AT_LEAST", 0.0005)
    monkeypatch.setattr(calibrate, "_ALIKE", 1.0)  # whatever the machine does beside the test
    return write_random_model(tmp_path / "model.gguf", n_layer=2, n_embd=256, n_head=8, n_head_kv=2, n_ff=512, n_vocab=512, type="Q4_0")


@pytest.fixture
def shape(model: Path) -> ModelShape:
    with ModelFile.open(model) as file:
        return read_shape(file.header)


def test_every_product_is_measured_and_remembered(shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry.load(entry_points=False)
    target = here(registry, shape, [1])
    assert target.measured
    for product in shape.products:
        found = target.kernels[f"{product.type} {product.inputs}x{product.outputs}", 1]
        assert found.one > 1e6
        assert found.many > 1e6
        assert found.reading > 1e6
    assert {("attention", 1), ("elements", 1)} <= set(target.kernels)
    row = cost.predict(shape, target, context=256, prompt=64, threads=1)
    assert 0 < row.first < 10
    assert row.basis == "measured kernels"

    def fail(*_: object) -> None:
        raise AssertionError("what is remembered is not measured again")

    for name in ("_product", "_attention", "_elements"):
        monkeypatch.setattr(calibrate, name, fail)
    assert here(registry, shape, [1]).kernels == target.kernels


def test_measurements_that_disagree_are_made_again(shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_ALIKE", -1.0)
    calls: list[int] = []
    measure = calibrate._elements

    def counted(*arguments: Any) -> dict[int, Kernel]:
        calls.append(1)
        return measure(*arguments)

    monkeypatch.setattr(calibrate, "_elements", counted)
    registry = Registry.load(entry_points=False)
    for times in (calibrate._PASSES, 2 * calibrate._PASSES):
        assert here(registry, shape, [1]).kernels["elements", 1].many > 0
        assert len(calls) == times


def test_types_with_packed_kernels_are_those_the_library_packs(shape: ModelShape) -> None:
    assert set(packed_types()) <= {"Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"}


def test_the_table_has_a_row_for_each_target_and_one_measured(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.svg"
    words = ["plan", str(model), "--all-targets", "--measure", "--context", "128", "--prompt", "16", "--json", "--plot", str(picture)]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert [row["target"] for row in rows[:2]] == ["auto", "here"]
    assert [row["measured"] for row in rows] == [False, True, *[False] * 8]
    assert rows[1]["rate"] > 0
    assert rows[1]["memory"]["cells"] > 0
    assert picture.read_text(encoding="utf-8").startswith("<svg")
    assert main(["plan", str(model), "--target", "rpi-5", "--target", "rpi-cm4"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["TARGET", "rpi-5", "rpi-cm4"]


def test_wrong_words_are_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--target", "rpi-6"]) == 1
    assert "there is no target rpi-6" in capsys.readouterr().err
    assert main(["plan", str(model), "--target", "rpi-5", "--all-targets"]) == 1
    assert "contradict" in capsys.readouterr().err
    assert main(["plan", str(model), "--target", "rpi-5", "--plot", str(model / "no" / "plan.svg")]) == 1
    assert "cannot write" in capsys.readouterr().err
