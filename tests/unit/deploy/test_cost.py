"""The shape of a model read from its header, and what the roofline makes of it."""

from __future__ import annotations

import math
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.deploy import cost, plot, target
from edge_rt.deploy.cost import ModelShape, read_shape
from edge_rt.deploy.target import Kernel, Target
from edge_rt.testing.random_models import write_random_model

SIZES = {"n_layer": 3, "n_embd": 256, "n_head": 8, "n_head_kv": 2, "n_ff": 512, "n_vocab": 1024}


def shape_of(path: Path, architecture: str = "llama", types: dict[str, str] | None = None, **changes: object) -> ModelShape:
    write_random_model(path, architecture, **{**SIZES, "type": "Q4_0", **changes})  # type: ignore[arg-type]
    with ModelFile.open(path) as file:
        return read_shape(file.header, types)


@pytest.fixture
def shape(tmp_path: Path) -> ModelShape:
    return shape_of(tmp_path / "model.gguf")


@pytest.fixture
def pi() -> Target:
    return target.load("rpi-cm4")


@pytest.mark.parametrize("tied", [True, False])
def test_units_add_up_to_the_tensors(tmp_path: Path, tied: bool) -> None:
    path = tmp_path / "model.gguf"
    found = shape_of(path, tied=tied)
    with ModelFile.open(path) as file:
        assert found.weights == sum(info.nbytes for info in file.header.tensors.values())
    assert list(found.units) == [*(() if tied else ("embedding",)), "blk.0", "blk.1", "blk.2", "norm", "head"]
    assert sum(found.types.values()) == found.weights
    assert next(iter(found.types)) == "Q4_0"


def test_products_are_those_of_the_graph(shape: ModelShape) -> None:
    block = [(one.name, one.inputs, one.outputs, one.tokens) for one in shape.products if one.unit == "blk.0"]
    assert block == [
        ("attn_q|attn_k|attn_v", 256, 256 + 2 * 64, True),
        ("attn_output", 256, 256, True),
        ("ffn_gate|ffn_up", 256, 1024, True),
        ("ffn_down", 512, 256, True),
    ]
    # In the last block only the tokens whose logits are wanted go on behind attention.
    assert [one.name for one in shape.products if not one.tokens] == ["attn_output", "ffn_gate|ffn_up", "ffn_down", "output"]
    weights = 3 * (256 * 384 + 256 * 256 + 256 * 1024 + 512 * 256) + 256 * 1024
    assert shape.parameters == weights
    assert shape.streamed == weights // 32 * 18


def test_weights_of_different_types_are_not_one_product(tmp_path: Path) -> None:
    found = shape_of(tmp_path / "model.gguf", types={"blk.1.attn_v.weight": "Q8_0", "blk.1.ffn_up.weight": "F16"})
    names = [one.name for one in found.products if one.unit == "blk.1"]
    assert names == ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert {one.name: one.nbytes for one in found.products if one.unit == "blk.1"}["attn_v"] == 64 * 256 // 32 * 34
    assert found.types["F16"] == 2 * 256 * 512


def test_experts_count_by_what_a_token_uses(tmp_path: Path) -> None:
    found = shape_of(tmp_path / "moe.gguf", "qwen3moe", n_expert=8, n_expert_used=2, n_ff=512)
    experts = [one for one in found.products if one.name.startswith("ffn_gate_exps")]
    assert experts[0].share == 0.25
    assert found.streamed < found.weights / 2


def test_cells_are_keys_and_values_of_all_layers(shape: ModelShape) -> None:
    assert shape.cell_bytes() == 3 * 2 * 64 * 2
    assert shape.cell_bytes("q8_0") == 3 * (64 * 2 + 64 // 32 * 34)


def test_a_step_that_reads_is_bound_by_bandwidth(shape: ModelShape, pi: Target) -> None:
    # A model that no cache holds, on a machine that computes far faster than it reads.
    fast = pi._replace(profile=pi.profile._replace(operations={"int8": 1e18, "f16": 1e18, "f32": 1e18}), node=1e-12, step=1e-12)
    big = shape._replace(products=tuple(one._replace(nbytes=one.nbytes * 1000) for one in shape.products))
    found = cost.decode(big, fast, 256, 4)
    assert found.bound == "bandwidth"
    assert found.bandwidth == pytest.approx(big.streamed / (3.6e9 * pi.reading) + 256 * shape.cell_bytes() / (3.6e9 * pi.reading), rel=0.05)
    half = fast._replace(profile=fast.profile._replace(bandwidth={4: 1.8e9}))
    assert cost.decode(big, half, 256, 4).seconds == pytest.approx(2 * found.seconds, rel=0.01)


def test_a_prompt_is_bound_by_compute_and_a_small_model_by_overhead(shape: ModelShape, pi: Target) -> None:
    assert cost.prefill(shape, pi, 512, 4).bound == "compute"
    slow = pi._replace(node=1e-3)
    assert cost.decode(shape, slow, 1, 4).bound == "overhead"
    cold = cost.first_token_cold(shape, pi._replace(opening=0.001, profile=pi.profile._replace(storage=1e5)), 8, 4)
    assert cold is not None
    assert cold.bound == "storage"
    assert cold.storage == pytest.approx(shape.weights / 1e5)


def test_longer_is_never_faster(shape: ModelShape, pi: Target) -> None:
    tokens = [cost.decode(shape, pi, cells, 4).seconds for cells in (1, 256, 1024, 4096, 16384)]
    assert tokens == sorted(tokens)
    prompts = [cost.prefill(shape, pi, n, 4).seconds for n in (1, 2, 8, 9, 63, 64, 512, 513, 2048)]
    assert prompts == sorted(prompts)
    threads = [cost.prefill(shape, pi, 512, n).seconds for n in (4, 3, 2, 1)]
    assert threads == sorted(threads)


def test_measured_kernels_come_first(shape: ModelShape, pi: Target) -> None:
    exact, alike = Kernel(1e9, 2e9, 3e9, 0.0), Kernel(4e9, 5e9, 6e9, 0.0)
    own = pi._replace(kernels={("Q4_0 256x256", 4): exact, ("Q4_0 512x256", 4): alike})
    assert cost.kernel(own, "Q4_0", 4, 256, 256) == exact
    assert cost.kernel(own, "Q4_0", 4, 999, 999)[:3] == (2.5e9, 3.5e9, 4.5e9)
    assert cost.kernel(own, "Q4_0", 2, 256, 256).many == pytest.approx(1.75e9)  # half the cores
    stated = cost.kernel(own, "F16", 4)
    assert (stated.one, stated.reading) == (96e9 * 0.07, 3.6e9 * 0.95)


def test_rows_say_what_fits_and_what_it_costs(shape: ModelShape, pi: Target) -> None:
    row = cost.predict(shape, pi, context=1000, prompt=100)
    assert row.memory is not None
    assert row.memory.cells == 1024 * shape.cell_bytes()
    assert row.memory.weights == shape.weights
    assert row.fits
    assert row.energy == pytest.approx(6.4 / row.rate)
    assert (row.measured, row.basis) == (False, "projected")
    small = pi._replace(profile=pi.profile._replace(memory=1_000_000))
    assert not cost.predict(shape, small, context=1000, prompt=100).fits
    assert cost.power(pi, 2) == pytest.approx(4.2)


def test_the_picture_is_xml_with_a_bar_for_each_row(shape: ModelShape) -> None:
    rows = [cost.predict(shape, target.load(name), context=512, prompt=64) for name in target.names()]
    rows.append(rows[0]._replace(target="<here & now>", measured=True))
    root = xml.fromstring(plot.svg(rows, "a model <of> mine"))
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sum(text.startswith("<here & now>") for text in texts) == 2
    assert sum("(measured)" in text for text in texts) == 2
    widths = [float(one.get("width", "nan")) for one in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert all(math.isfinite(width) and 0 < width <= 760 for width in widths)
