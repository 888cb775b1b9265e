"""Block formats hold against the package gguf and libggml, bit for bit; GPTQ and its refinement lower the error they are meant to lower."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from edge_rt_distill.quantise.formats import BLOCK, FORMATS, Blocks, search, unpack
from edge_rt_distill.quantise.gptq import GptqOptions, error, gptq, refine_codes, refit_scales
from edge_rt_distill.quantise.matrices import decode, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edge_rt.deploy.writer import float_rows
from edge_rt.hooks import GGML_TYPES, ModelFile, OptionError

NAMES = list(FORMATS)


def _random_blocks(name: str, seed: int) -> Blocks:
    """Any codes, and scales of every size float16 has, zero and subnormal ones among them."""
    format, draw = FORMATS[name], torch.Generator().manual_seed(seed)
    codes = torch.randint(len(format.levels), (5, 3 * BLOCK), generator=draw).to(torch.uint8)
    sizes = torch.randn(2, 5, 3, generator=draw) * 10.0 ** torch.randint(-7, 4, (2, 5, 3), generator=draw)
    sizes[:, 0, 0] = 0
    scales, minima = sizes.half().float()
    return Blocks(format, codes, scales, minima if format.shifted else torch.zeros_like(scales))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_bytes_are_read_by_gguf_as_the_values_they_were_made_of(name: str, seed: int) -> None:
    blocks = _random_blocks(name, seed)
    raw = blocks.pack()
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    assert np.array_equal(blocks.values().numpy().view(np.uint32), theirs.astype(np.float32).view(np.uint32))
    again = unpack(blocks.format, raw)
    for mine, read in zip(blocks[1:], again[1:], strict=True):
        assert torch.equal(mine, read)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_read_by_libggml_as_the_values_they_were_made_of(name: str, tmp_path: Path) -> None:
    blocks = _random_blocks(name, 7)
    assert blocks.format.block_bytes == next(size for type_name, _, size in GGML_TYPES.values() if type_name == name)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("token_embd.weight", blocks.pack(), raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = ModelFile.open(tmp_path / "one.gguf")
    rows = np.concatenate(list(float_rows(file, file.header.tensors["token_embd.weight"])))
    file.close()
    assert np.array_equal(rows.view(np.uint32), blocks.values().numpy().view(np.uint32))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_on_a_formats_grid_is_found_again(name: str) -> None:
    blocks = _random_blocks(name, 3)
    draw = torch.Generator().manual_seed(1)
    scales = (torch.rand(5, 3, generator=draw) + 0.5).half().float()
    minima = (torch.randn(5, 3, generator=draw)).half().float() if blocks.format.shifted else torch.zeros(5, 3)
    codes = blocks.codes.clone()
    codes.view(5, 3, BLOCK)[..., 0], codes.view(5, 3, BLOCK)[..., 1] = 0, len(blocks.format.levels) - 1
    values = Blocks(blocks.format, codes, scales, minima).values()
    torch.testing.assert_close(search(blocks.format, values).values(), values, rtol=1e-3, atol=1e-3)


def _correlated(seed: int = 0, out: int = 48, width: int = 96, n: int = 600) -> tuple[Tensor, Tensor]:
    """Weights, and the second moments of inputs whose columns depend on each other and differ in size."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, width // 3, generator=draw) @ torch.randn(width // 3, width, generator=draw)
    x = (mixed + 0.5 * torch.randn(n, width, generator=draw)) * torch.rand(width, generator=draw).square() * 3
    return torch.randn(out, width, generator=draw) * 0.05, x.T @ x / n


@pytest.mark.parametrize("name", NAMES)
def test_gptq_has_less_error_on_correlated_inputs_than_rounding_by_importance(name: str) -> None:
    w, h = _correlated()
    plain = error(w, decode(encode(w, name)), h)
    weighted = error(w, decode(encode(w, name, h.diagonal())), h)
    searched = error(w, search(FORMATS[name], w, h.diagonal()).values(), h)
    fed_back = error(w, gptq(w, h, FORMATS[name], GptqOptions(sweeps=0)).values(), h)
    refined = error(w, gptq(w, h, FORMATS[name]).values(), h)
    print(name, plain, weighted, searched, fed_back, refined)
    assert searched < 1.1 * weighted
    assert fed_back < 0.7 * min(weighted, searched, plain)
    assert refined < 0.95 * fed_back


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "IQ4_NL"])
def test_neither_part_of_the_refinement_makes_it_worse(name: str) -> None:
    w, h = _correlated(5)
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    blocks = search(FORMATS[name], w)
    errors = [error(w, blocks.values(), h)]
    for _ in range(3):
        blocks = refine_codes(w, blocks, h)
        errors.append(error(w, blocks.values(), h))
        blocks = refit_scales(w, blocks, h)
        errors.append(error(w, blocks.values(), h))
    assert all(later <= before * (1 + 1e-5) for before, later in pairwise(errors)), errors
    assert errors[-1] < 0.7 * errors[0]


def test_a_code_of_the_refinement_is_the_best_with_all_others_as_they_are() -> None:
    w, h = _correlated(2, out=3, width=32)
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    blocks = search(FORMATS["Q4_0"], w)
    for _ in range(30):
        blocks = refine_codes(w, blocks, h)
    least = error(w, blocks.values(), h)
    for row in range(3):
        for column in range(32):
            for code in range(16):
                codes = blocks.codes.clone()
                codes[row, column] = code
                assert error(w, blocks._replace(codes=codes).values(), h) >= least * (1 - 1e-6)


def test_columns_that_are_never_used_cost_nothing_and_break_nothing() -> None:
    w, h = _correlated(1)
    h[10:50], h[:, 10:50] = 0, 0
    found = gptq(w, h, FORMATS["Q4_0"])
    assert bool(torch.isfinite(found.values()).all())
    assert error(w, found.values(), h) < error(w, decode(encode(w, "Q4_0", h.diagonal())), h)


@pytest.mark.parametrize("by_importance", [True, False])
def test_a_matrix_of_zeros_stays_one(by_importance: bool) -> None:
    found = gptq(torch.zeros(4, 64), _correlated(width=96)[1][:64, :64], FORMATS["Q4_1"], GptqOptions(by_importance=by_importance))
    assert float(found.values().abs().max()) == 0.0


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match="multiples of 32"):
        search(FORMATS["Q4_0"], torch.zeros(2, 48))
    with pytest.raises(OptionError, match="not finite"):
        gptq(torch.full((2, 32), float("nan")), torch.eye(32), FORMATS["Q4_0"])
    with pytest.raises(OptionError, match="Q4_K"):
        encode(torch.zeros(2, 96), "Q4_K")
