"""Predictions for the built-in targets against published results: within a third, and in the documentation as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import published
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.deploy import target
from edge_rt.deploy.cost import read_shape
from edge_rt.testing.random_models import write_random_model

DOCS = Path(__file__).parents[3] / "docs/compiler.md"


@pytest.mark.parametrize("row", published.ROWS, ids=lambda row: f"{row.target}-{row.model}-{row.type}-{row.prompt}-{row.published:g}")
def test_a_prediction_is_within_a_third_of_what_was_published(row: published.Row) -> None:
    ratio = published.predicted(row) / row.published
    assert 1 / published.FACTOR <= ratio <= published.FACTOR


def test_each_kind_of_device_with_published_results_is_there() -> None:
    assert {row.target for row in published.ROWS} == set(target.names()) - {"mlu370"}  # of which none was found
    assert all(row.program for row in published.ROWS if target.load(row.target).profile.kind != "cpu")
    assert any(not row.fitted for row in published.ROWS if row.target == "rpi-5")


def test_the_documentation_has_the_table() -> None:
    assert published.table() in DOCS.read_text(encoding="utf-8"), "put the output of `python -m bench.published` into docs/compiler.md"


@pytest.mark.parametrize(
    ("model", "kind", "size"),
    [
        ("TinyLlama 1.1B", "Q4_K_M", 636.18 * 2**20),  # llama-bench of the pull requests and issues that the rows name
        ("Llama 3.2 3B", "Q4_K_M", 1.87 * 2**30),
        ("Llama 3.2 1B", "Q4_0", 727.75 * 2**20),
        ("Llama 2 7B", "Q4_K_M", 3.80 * 2**30),
        ("Llama 2 7B", "F16", 12.55 * 2**30),
        ("Qwen2.5 0.5B", "Q4_0", 330.17 * 2**20),
        ("Llama 3.1 8B", "Q4_K_M", 4.58 * 2**30),
    ],
)
def test_a_models_measures_make_its_size(model: str, kind: str, size: float) -> None:
    assert published.shape(model, kind).weights == pytest.approx(size, rel=0.01)


def test_a_shape_from_measures_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = published.Measures("llama", 3, 256, 8, 2, 32, 512, 1024)
    monkeypatch.setitem(published.MODELS, "small", small)
    path = tmp_path / "model.gguf"
    write_random_model(path, n_layer=3, n_embd=256, n_head=8, n_head_kv=2, n_ff=512, n_vocab=1024, type="Q8_0", tied=False)
    with ModelFile.open(path) as file:
        theirs = read_shape(file.header, packed=())
    ours = published.shape("small", "Q8_0")
    assert (ours.parameters, ours.streamed, ours.nodes) == (theirs.parameters, theirs.streamed, theirs.nodes)
    assert (ours.config.head_dim, ours.config.n_head_kv) == (theirs.config.head_dim, theirs.config.n_head_kv)
    assert len(ours.products) == 3 * 7 + 1, "llama.cpp reads each by itself"


def test_plain_kernels_and_faster_cores_change_what_is_foretold() -> None:
    row = next(row for row in published.ROWS if row.target == "rpi-5" and row.type == "Q4_0" and row.prompt)
    packed = published.predicted(row)
    assert published.predicted(row._replace(plain=True)) < packed / 2
    assert published.predicted(row._replace(speed=2.0)) > packed * 1.5
