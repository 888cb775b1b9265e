"""Runs every packed kernel of this processor once, with one column and with several, against the kernels for weights as they are.

    python kernels.py OUT.npz [REFERENCE.npz]

Prints a line for each type of weights: the layout the plugin's table foretells, whether the library has a kernel, whether the packed bytes
are that layout, and how far the products are apart. OUT.npz holds the packed bytes by type and layout, and the weights they were made from;
with another processor's REFERENCE its weights are taken, as to quantise is float arithmetic too, so that bytes of one layout must be equal.
The exit status is 1 if anything is not as foretold.
"""

from __future__ import annotations

import ctypes as C
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from edge_rt_arm.layouts import CHOICES, packed_layouts

from edge_rt.core.load.gguf_tables import GGML_TYPES
from edge_rt.native import ggml, logs
from edge_rt.native.libs import function

ROWS, COLUMNS = 32, 512
COUNTS = (1, 3, 8, 17)
"""Columns of the right side: one is a token, four or more take the kernels of prompts, the rest of a division by four those of tokens."""
MOST_APART = 2e-3
"""Of the largest product: both sides quantise the right side to 8 bits in blocks of the same size, and sum up in another order."""
_KERNELS_OF_X86 = {"Q4_0": "8x8", "Q4_K": "8x8", "IQ4_NL": "8x8", "MXFP4": "8x8", "Q2_K": "8x8"}
"""ggml_repack_get_optimal_repack_type for AVX2, so that the bytes of an x86 processor can be compared with."""
_FLIPPED = {"Q4_0": 0x88}
"""Quants are stored with an offset of 8; packing makes them signed by flipping these bits."""
_SIMPLE = ("Q4_0", "Q8_0", "IQ4_NL")
"""Types whose blocks are a 16-bit scale and quants: rows are interleaved run by run, scales first."""


class Found(NamedTuple):
    """What came of a type. ``layout``: foretold, "" for none. ``apart``: of the products, as a share of the largest."""

    type: str
    layout: str
    data: bytes
    packed: bytes | None
    as_foretold: bool
    bytes_right: bool | None
    apart: float


def interleaved(blocks: np.ndarray[Any, Any], rows: int, run: int, flip: int) -> bytes:
    """Blocks [rows, blocks in a row, bytes] of a simple type as R rows interleaved in runs of ``run`` bytes: repack.cpp, make_block_*."""
    groups = blocks.reshape(-1, rows, *blocks.shape[1:]).swapaxes(1, 2)  # [group, block, row, bytes]
    scales, quants = groups[..., :2], groups[..., 2:] ^ np.uint8(flip)
    runs = quants.reshape(*quants.shape[:3], -1, run).swapaxes(2, 3)
    joined = [scales.reshape(*groups.shape[:2], -1), runs.reshape(*groups.shape[:2], -1)]
    return np.concatenate(joined, axis=-1).tobytes()


def quantised(type_: int, weights: np.ndarray[Any, Any]) -> bytes:
    """As libggml quantises them, with all columns of the same importance (which some types ask for)."""
    quantise = function("ggml_quantize_chunk", C.c_size_t, C.c_int, C.c_void_p, C.c_void_p, C.c_int64, C.c_int64, C.c_int64, C.c_void_p)
    out = np.zeros(ROWS * ggml.c.row_size(type_, COLUMNS), np.uint8)
    importance = np.ones(COLUMNS, np.float32)
    size = quantise(type_, weights.ctypes.data, out.ctypes.data, 0, ROWS, COLUMNS, importance.ctypes.data)
    assert size == out.size, f"{size} bytes instead of {out.size}"
    return out.tobytes()


def product(type_: int, buffer_type: int, data: bytes, right: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], bytes] | None:
    """Weights times ``right`` [n, COLUMNS] with weights in a kind of buffer, and their bytes there; None if it has no kernel for them."""
    with ggml.context(8, (8,)) as ctx, ggml.buffer(buffer_type, len(data) * 2 + 4096) as room, ggml.cpu_backend(1) as backend:
        weights = ggml.new_tensor(ctx.address, type_, (COLUMNS, ROWS))
        base = -(-ggml.c.backend_buffer_get_base(room.address) // 64) * 64
        columns = ggml.new_tensor(ctx.address, ggml.TYPE_F32, (COLUMNS, len(right)))
        result = ggml.c.mul_mat(ctx.address, weights, columns)
        ggml.place(weights, room.address, base)
        if buffer_type != ggml.c.backend_cpu_buffer_type() and not (ggml.fields(weights).extra and ggml.supports(result)):
            return None
        ggml.c.backend_tensor_set(weights, data, 0, len(data))
        with ggml.allocate_context(ctx):
            ggml.view(columns, "f4", right.shape)[:] = right
            graph = ggml.c.new_graph_custom(ctx.address, 8, False)
            ggml.c.build_forward_expand(graph, result)
            ggml.compute(backend, graph)
            packed = bytes(ggml.memory_at(base, len(data)))
            return ggml.view(result, "f4", (len(right), ROWS)).copy(), packed


def look(features: tuple[str, ...], given: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[Found]:
    """Every type that has a packed kernel on some ARM or x86 core."""
    foretold = _KERNELS_OF_X86 if "avx2" in features else packed_layouts(features, ggml.vector_length())
    numbers = {name: number for number, (name, _, _) in GGML_TYPES.items()}
    generator = np.random.default_rng(6)
    weights = generator.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    right = generator.standard_normal((max(COUNTS), COLUMNS)).astype(np.float32)
    for name in dict.fromkeys([*(choice.type for choice in CHOICES), "Q2_K", "Q4_1"]):
        data = given[name].tobytes() if name in given else quantised(numbers[name], weights)
        layout = foretold.get(name, "")
        kernel = ggml.extra_buffer_types()["CPU_REPACK"]
        apart, packed = 0.0, None
        for count in COUNTS:
            found = product(numbers[name], kernel, data, right[:count])
            if found is None:
                break
            plain = product(numbers[name], ggml.c.backend_cpu_buffer_type(), data, right[:count])
            assert plain is not None
            apart = max(apart, float(np.abs(found[0] - plain[0]).max() / np.abs(plain[0]).max()))
            packed = found[1]
        yield Found(name, layout, data, packed, (packed is not None) == bool(layout), _right(name, layout, data, packed), apart)


def _right(name: str, layout: str, data: bytes, packed: bytes | None) -> bool | None:
    """Whether packed bytes are the layout's, None for types whose layout is not made here."""
    if packed is None or name not in _SIMPLE or not layout:
        return None
    rows, run = map(int, layout.split("x"))
    block, size = next((elements, nbytes) for kind, elements, nbytes in GGML_TYPES.values() if kind == name)
    blocks = np.frombuffer(data, np.uint8).reshape(ROWS, COLUMNS // block, size)
    return interleaved(blocks, rows, run, _FLIPPED.get(name, 0)) == packed


def main(out: str, reference: str = "") -> int:
    """Look, print and save."""
    logs.install()
    names = {"fp16_va": "fp16", "matmul_int8": "i8mm"}
    features = tuple(names.get(name, name) for name in ggml.cpu_features())
    print(f"features {' '.join(features)}; vector of {ggml.vector_length()} bytes")
    good, kept = True, {}
    for found in look(features, np.load(reference) if reference else {}):
        right = "" if found.bytes_right is None else "bytes as foretold, " if found.bytes_right else "WRONG BYTES, "
        what = "no packed kernel" if found.packed is None else f"{right}products apart {found.apart:.1e}"
        fine = found.as_foretold and found.bytes_right is not False and found.apart < MOST_APART
        good &= fine
        print(f"{found.type:<7} {found.layout or '-':<4} {what}{'' if fine else '   NOT AS FORETOLD'}")
        kept[found.type] = np.frombuffer(found.data, np.uint8)
        if found.packed is not None:
            kept[f"{found.type}:{found.layout}"] = np.frombuffer(found.packed, np.uint8)
    np.savez(Path(out), **kept)  # type: ignore[arg-type]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
