"""Reads the tensors of a GGUF file, piece by piece, in single precision; those of models and of adapters alike."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from edge_rt.hooks import ModelChanged, ModelFileError, OptionError, UnsupportedModel

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt.hooks import ModelFile

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_PIECE = 16 << 20  # elements that are dequantised at a time: 64 MiB of float32


def dtype_named(name: object) -> torch.dtype:
    """The type of that name. Raises OptionError."""
    if not isinstance(name, str) or name not in DTYPES:
        raise OptionError(f"torch.dtype is {name!r}; choose from {', '.join(DTYPES)}")
    return DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """``float16`` for torch.float16."""
    return str(dtype).removeprefix("torch.")


class Reader:
    """Tensors of one file by name. ``done`` is told with every piece: bytes of the file."""

    def __init__(self, file: ModelFile, done: Callable[[int], None] = lambda nbytes: None) -> None:
        self._file, self._done = file, done
        self.unread = set(file.header.tensors)

    def has(self, name: str) -> bool:
        """Whether the file has it."""
        return name in self._file.header.tensors

    def rows(self, name: str, default: int) -> int:
        """Rows of a matrix as the file has it: pruned models differ from block to block."""
        info = self._file.header.tensors.get(name)
        return info.shape[1] if info is not None and len(info.shape) > 1 else default

    def fill(self, target: torch.Tensor, name: str, shape: tuple[int, ...], first: int = 0) -> None:
        """Copy rows of a tensor of ``shape`` (in ggml's order) from ``first`` on into a matrix [rows, columns] in the host's memory.

        Raises ModelFileError, ModelChanged, UnsupportedModel for a number that is too large for float16.
        """
        start = 0
        for piece in self._pieces(name, shape, first, first + len(target)):
            end = start + len(piece)
            target[start:end] = torch.from_numpy(piece)
            if target.dtype is torch.float16 and not target[start:end].isfinite().all():
                raise UnsupportedModel(f"the weights of {name} do not fit float16; open the model with torch.dtype = bfloat16")
            start = end

    def numbers(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """A vector in single precision."""
        return np.concatenate([piece.reshape(-1) for piece in self._pieces(name, shape, 0, math.prod(shape) // shape[0])])

    def _pieces(self, name: str, shape: tuple[int, ...], first: int, last: int) -> Iterator[npt.NDArray[np.float32]]:
        """Rows [first, last) of a tensor, some at a time: float32 [n, columns]."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        info = self._file.header.tensors.get(name)
        if info is None:
            raise ModelFileError(f"the model lacks the tensor {name}; the file is incomplete, download it again")
        if (*info.shape, 1, 1, 1)[:4] != (*shape, 1, 1, 1)[:4]:
            raise ModelFileError(f"the tensor {name} has the shape {info.shape} where {shape} is expected; the file is damaged")
        self.unread.discard(name)
        row_bytes, step = info.nbytes // (math.prod(shape) // shape[0]), max(1, _PIECE // shape[0])
        for row in range(first, last, step):
            n = min(step, last - row)
            # Not through the mapping: a file that is cut meanwhile would end the process, not the read.
            data = os.pread(self._file.fd, n * row_bytes, info.offset + row * row_bytes)
            if len(data) < n * row_bytes:
                raise ModelChanged(f"{self._file.path} was changed while it was open; open the model again")
            raw = np.frombuffer(data, np.uint8).reshape(n, row_bytes)
            yield np.array(dequantize(raw, GGMLQuantizationType(info.type)), np.float32)
            self._done(len(data))
