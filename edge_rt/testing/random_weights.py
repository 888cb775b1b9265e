"""Random weights in GGUF's element types, made fast and one tensor at a time."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_rt.core.load.gguf_tables import GGML_TYPES

Array = npt.NDArray[Any]
TYPE_NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()}


@dataclass(frozen=True, slots=True)
class _Block:
    """How to make a block of a quantised type from random bytes.

    ``scale``, ``offset``: where the block's F16 scale and its second F16 (a minimum) lie; ``ratio``: second / first, so that the
    mean is zero; ``deviation``: standard deviation of the weights when the scale is 1 and all other bytes are uniformly random;
    ``signed``: give the scale a random sign, because the codes are not centred on zero.
    """

    scale: int
    deviation: float
    offset: int | None = None
    ratio: float = 0.0
    signed: bool = False


_BLOCKS = {
    "Q4_0": _Block(scale=0, deviation=4.64, signed=True),
    "Q4_1": _Block(scale=0, deviation=4.61, offset=2, ratio=-7.5),
    "Q5_0": _Block(scale=0, deviation=9.25, signed=True),
    "Q5_1": _Block(scale=0, deviation=9.23, offset=2, ratio=-15.5),
    "Q8_0": _Block(scale=0, deviation=73.9, signed=True),
    "IQ4_NL": _Block(scale=0, deviation=68.0, signed=True),
    "Q2_K": _Block(scale=80, deviation=13.9, offset=82, ratio=1.5),
    "Q3_K": _Block(scale=108, deviation=43.3),
    "Q4_K": _Block(scale=0, deviation=258.0, offset=2, ratio=7.5),
    "Q5_K": _Block(scale=0, deviation=526.0, offset=2, ratio=15.5),
    "Q6_K": _Block(scale=208, deviation=1366.0),
}
WEIGHT_TYPES = ("F32", "F16", "BF16", *_BLOCKS)


def random_tensor(name: str, shape: tuple[int, ...], type_name: str, deviation: float, mean: float, seed: int) -> Array:
    """Weights with the given standard deviation: [..., ne1, ne0] for F32 and F16, else bytes [..., ne1, bytes of a row].

    The same name, shape, type and seed give the same tensor. Weights of float types are normal. For quantised types the bytes of
    a block are random and only its scale is set (a tensor is then made as fast as it is written), so their mean is always 0.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    rows = shape[::-1]
    if type_name in _BLOCKS:
        return _random_blocks(rng, rows, type_name, deviation)
    weights = rng.standard_normal(rows, dtype=np.float32)
    weights *= np.float32(deviation)
    weights += np.float32(mean)
    if type_name == "F16":
        return weights.astype(np.float16)
    if type_name == "BF16":  # the upper half of an F32
        return np.ascontiguousarray(weights.view(np.uint16)[..., 1::2]).view(np.uint8)
    return weights


def _random_blocks(rng: np.random.Generator, rows: tuple[int, ...], type_name: str, deviation: float) -> Array:
    spec = _BLOCKS[type_name]
    _, elements, size = GGML_TYPES[TYPE_NUMBERS[type_name]]
    count = int(np.prod(rows)) // elements
    noise = rng.integers(0, 2**64 - 1, -(-count * size // 8), dtype=np.uint64, endpoint=True)  # eight bytes at a time
    blocks = noise.view(np.uint8)[: count * size].reshape(count, size)
    # Scales differ a little from block to block, as they do in real models.
    scale = rng.uniform(0.85, 1.15, count).astype(np.float32) * np.float32(deviation / spec.deviation)
    if spec.signed:
        scale *= rng.integers(0, 2, count).astype(np.float32) * 2 - 1
    blocks[:, spec.scale : spec.scale + 2] = scale.astype(np.float16).view(np.uint8).reshape(count, 2)
    if spec.offset is not None:
        second = scale.astype(np.float16).astype(np.float32) * np.float32(spec.ratio)
        blocks[:, spec.offset : spec.offset + 2] = second.astype(np.float16).view(np.uint8).reshape(count, 2)
    return blocks.reshape(*rows[:-1], rows[-1] // elements * size)
