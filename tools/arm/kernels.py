"""Runs every packed kernel of this processor once, with one column and with several, against the kernels for weights as they are.

    python kernels.py OUT.npz [REFERENCE.npz]

Prints a line for each type of weights: the layout that is foretold, whether the library has a kernel, whether the packed bytes are those
that NumPy makes of that layout (core/weights/interleave.py), and how far the products are apart. OUT.npz holds the packed bytes by type and
layout, and the weights they were made from; with another processor's REFERENCE its weights are taken, as to quantise is float arithmetic
too, so that bytes of one layout must be equal.
The exit status is 1 if anything is not as foretold.
"""

from __future__ import annotations

import ctypes as C
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sample import features

from edge_rt.core.gguf.reader import GGML_TYPES
from edge_rt.core.weights import interleave as interleaving
from edge_rt.core.weights.interleave import CHOICES, Layout
from edge_rt.native import ggml, libs
from edge_rt.native.libs import function

ROWS, COLUMNS = 32, 512
COUNTS = (1, 3, 8, 17)
"""Columns of the right side: one is a token, four or more take the kernels of prompts, the rest of a division by four those of tokens."""
MOST_APART = 2e-3
"""Of the largest product: both sides quantise the right side to 8 bits in blocks of the same size, and sum up in another order."""


class Found(NamedTuple):
    """What came of a type. ``layout``: foretold, "" for none. ``apart``: of the products, as a share of the largest."""

    type: str
    layout: str
    data: bytes
    packed: bytes | None
    as_foretold: bool
    bytes_right: bool | None
    apart: float


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


def look(has: tuple[str, ...], given: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[Found]:
    """Every type that has a packed kernel on some ARM or x86 core."""
    numbers = {name: number for number, (name, _, _) in GGML_TYPES.items()}
    generator = np.random.default_rng(6)
    weights = generator.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    right = generator.standard_normal((max(COUNTS), COLUMNS)).astype(np.float32)
    for name in dict.fromkeys([*(choice.type for choice in CHOICES), "Q2_K", "Q4_1"]):
        data = given[name].tobytes() if name in given else quantised(numbers[name], weights)
        layout = interleaving.layout(name, (COLUMNS, ROWS), has)
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
        yield Found(name, str(layout or ""), data, packed, (packed is not None) == bool(layout), _right(name, layout, data, packed), apart)


def _right(name: str, layout: Layout | None, data: bytes, packed: bytes | None) -> bool | None:
    """Whether packed bytes are the layout's, None if there are none."""
    if packed is None or layout is None:
        return None
    return interleaving.interleave(data, name, (COLUMNS, ROWS), layout).tobytes() == packed


def main(out: str, reference: str = "") -> int:
    """Look, print and save."""
    libs.install_native_log()
    print(f"features {' '.join(has := features())}; vector of {ggml.ggml_vector_length()} bytes")
    good, kept = True, {}
    for found in look(has, np.load(reference) if reference else {}):
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
