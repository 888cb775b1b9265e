"""Memory of tensors without NumPy, which takes longer to import than a small model takes for its first token."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from edge_rt.native import ggml

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Kind = Literal["H", "i", "q", "f"]


def elements(tensor: int, kind: Kind, count: int) -> memoryview[Any]:
    """The first elements of a tensor's data, ``kind`` in struct's letters; valid while the tensor's buffer lives."""
    return ggml.memory_at(ggml.data_address(tensor), count * struct.calcsize(kind)).cast(kind)


class Rows:
    """A float32 matrix [rows, width]: a row is a memoryview, and ``np.asarray`` makes an array of the whole without a copy."""

    __slots__ = ("_memory", "_width")

    def __init__(self, memory: memoryview[float], width: int) -> None:
        """``memory``: the rows one after the other, a contiguous view of kind ``f``."""
        self._memory, self._width = memory, width

    @classmethod
    def of(cls, tensor: int, count: int, width: int) -> Rows:
        """Over a contiguous tensor; valid while its buffer lives."""
        return cls(elements(tensor, "f", count * width), width)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Copies of all rows of several matrices of one width."""
        return cls(memoryview(b"".join(part._memory for part in parts)).cast("f"), parts[0]._width)

    def __len__(self) -> int:
        return len(self._memory) // self._width

    def __getitem__(self, index: int) -> memoryview[float]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"row {index} of {count}")
        first = index % count * self._width
        return self._memory[first : first + self._width]

    def part(self, first: int, count: int) -> Rows:
        """Some of the rows, in place."""
        return Rows(self._memory[first * self._width : (first + count) * self._width], self._width)

    def copy(self, into: Rows | None = None) -> Rows:
        """The same in memory of its own: that of ``into``, an earlier copy, if it is as large. New memory takes longer than copying."""
        if into is None or len(into._memory) != len(self._memory):
            return Rows(memoryview(bytearray(self._memory)).cast("f"), self._width)
        into._memory[:] = self._memory
        return into

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.float32]:
        import numpy as np

        array: npt.NDArray[np.float32] = np.asarray(self._memory).reshape(len(self), self._width)
        return array if dtype is None and not copy else np.array(array, dtype=dtype, copy=copy)
