"""Q4_1 weights as Q4_0 and offsets, where the library has packed kernels for Q4_0 and none for Q4_1.

A block of 32 weights is ``d q + m`` in Q4_1 (q from 0 to 15) and ``d (q - 8)`` in Q4_0. As ``d q + m = d (q - 8) + (m + 8 d)``, a product
with Q4_1 is one with Q4_0, whose kernels are fast, and one of the offsets ``m + 8 d`` with the sums of 32 inputs each
(graph/offsets.py), which has a 32nd of the multiplications. Offsets are kept in F16: where a block's m is between -16 d and -4 d, as in
most, they are exact (Sterbenz's lemma), else rounded by 2**-11 of themselves at most; ggml's own kernel rounds each sum of inputs as much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

OFFSETS = ".offsets"
"""How the names of matrices of offsets end."""
BLOCK = 32
"""Weights of a block."""
_BYTES = 20
"""Of a Q4_1 block: d and m in F16, sixteen bytes of two weights each, as a Q4_0 block has them after its d (ggml-common.h)."""
MULTIPLE = 16
"""The width of the matrix of offsets is one of it: the library's fast kernels for F16 take no other (llamafile/sgemm.cpp)."""


class TooLarge(Exception):
    """An offset is beyond F16, as no trained model has it: such weights stay as they are."""


def offsets_name(weight: str) -> str:
    """What the offsets of a weight are called."""
    return weight.removesuffix(".weight") + OFFSETS


def weight_name(offsets: str) -> str:
    """Whose offsets they are."""
    return offsets.removesuffix(OFFSETS) + ".weight"


def offsets_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the F16 matrix of offsets of a weight [in, out]: [in / 32, out], filled up with zeros to a MULTIPLE."""
    return -(-(shape[0] // BLOCK) // MULTIPLE) * MULTIPLE, shape[1]


def quants(data: memoryview) -> npt.NDArray[np.uint8]:
    """The bytes of the Q4_0 weight out of those of a Q4_1 weight."""
    import numpy as np

    blocks = np.frombuffer(data, np.uint8).reshape(-1, _BYTES)
    return np.concatenate((blocks[:, :2], blocks[:, 4:]), axis=1)


def offsets(data: memoryview, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
    """The offsets of a Q4_1 weight [in, out]: float16 [out, padded in / 32]. Raises TooLarge."""
    import numpy as np

    wide, rows = offsets_shape(shape)
    scales = np.frombuffer(data, np.float16).reshape(rows, shape[0] // BLOCK, _BYTES // 2)[:, :, :2].astype(np.float32)
    found = scales[:, :, 1] + 8 * scales[:, :, 0]
    if np.abs(found[np.isfinite(scales).all(axis=2)]).max(initial=0) > np.finfo(np.float16).max:
        raise TooLarge
    padded = np.zeros((rows, wide), np.float16)
    padded[:, : found.shape[1]] = found
    return padded
