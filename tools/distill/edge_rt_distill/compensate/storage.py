"""How corrections are stored: types by part, bytes, and what is left of a tensor's values in a type.

A gain is measured with what the file will hold, so candidates are rounded before they are tried. Q8_0 has blocks of 32 along a row: rows of
``low_a`` and ``centroids`` are as wide as the linear's input, which is a multiple of 32 wherever its weight is INT4; those of ``low_b`` are
as wide as the rank, so it is F16 unless the rank is a multiple of 32.
"""

from __future__ import annotations

from typing import Literal

import gguf
import numpy as np
import torch
from torch import Tensor

from edge_rt_distill.compensate.correction import Compensation, Correction

Storage = Literal["Q8_0", "F16", "F32"]
_BLOCK = 32
_BITS = {"F32": 32.0, "F16": 16.0, "Q8_0": 8.5}


def part_type(name: str, width: int, storage: Storage) -> Storage:
    """The type that a part whose rows are this wide is stored in. Offsets and biases are F32: they are small, and added as they are."""
    if name in ("offsets", "bias"):
        return "F32"
    return "F16" if storage == "Q8_0" and width % _BLOCK else storage


def encoded(tensor: Tensor, type_: Storage) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Values as ggml stores them: float32, float16, or for Q8_0 bytes [rows, bytes of a row]."""
    values = np.ascontiguousarray(tensor.detach().to(torch.float32).numpy())
    found = gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_])
    return np.asarray(found)


def rounded(tensor: Tensor, type_: Storage) -> Tensor:
    """The values that are left of a tensor [.., width] in a type, float32."""
    if type_ == "F32":
        return tensor.detach().clone()
    kind = gguf.GGMLQuantizationType[type_]
    return torch.from_numpy(np.array(gguf.quants.dequantize(encoded(tensor, type_), kind), dtype=np.float32)).reshape(tensor.shape)


def as_stored(correction: Correction, storage: Storage) -> Correction:
    """A correction with the values that its file will have."""
    return correction._replace(**{name: rounded(part, part_type(name, part.shape[-1], storage)) for name, part in correction.parts()})


def all_as_stored(compensation: Compensation, storage: Storage) -> Compensation:
    """`as_stored` of every site."""
    return {site: as_stored(correction, storage) for site, correction in compensation.items()}


def stored_bytes(correction: Correction, storage: Storage) -> int:
    """Bytes of a correction's tensors in its file, without the padding between them (at most 31 bytes a tensor)."""
    return sum(int(part.numel() * _BITS[part_type(name, part.shape[-1], storage)] / 8) for name, part in correction.parts())
