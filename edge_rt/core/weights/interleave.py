"""ggml's interleaved rows in NumPy, so that packed weights for another CPU are made on this one.

The layouts, and which of them a CPU takes, are those of ggml-cpu/repack.cpp and repack.h in ggml 0.25.3 (llama-cpp-python 0.3.36), whose
buffer type is CPU_REPACK. A layout RxB takes the same block of R rows of a matrix together: scales of all R first, then R runs of B bytes
of quants, one of each row, again and again. Not here: RISC-V's layouts, and the tiles of AMX (ggml-cpu/amx).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.core.gguf.reader import GGML_TYPES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

BUFFER_TYPE = "CPU_REPACK"
"""What the library calls this kind of packed weights."""
_PIECE = 1 << 20
"""Bytes that are interleaved at once: what lies between source and result stays in a cache."""


class Layout(NamedTuple):
    """``rows`` are interleaved in runs of ``run`` bytes; a matrix has a multiple of ``rows``."""

    rows: int
    run: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.run}"


class Choice(NamedTuple):
    """A type of weights takes ``layout`` on a CPU that has all of ``needs``."""

    type: str
    needs: frozenset[str]
    layout: Layout


def _choices(*rows: tuple[str, str, int, int]) -> tuple[Choice, ...]:
    """From rows of types, what they need, and the layout's rows and run."""
    return tuple(Choice(type_, frozenset(needs.split()), Layout(*size)) for types, needs, *size in rows for type_ in types.split())


CHOICES = _choices(
    ("Q4_0 Q4_K IQ4_NL MXFP4", "avx2", 8, 8),
    ("Q2_K", "avx512f", 8, 8),
    ("Q4_0", "neon sve sve256 i8mm", 8, 8),
    ("Q4_0 Q8_0 Q1_0", "neon i8mm", 4, 8),
    ("Q4_K Q5_K Q6_K", "neon i8mm", 8, 8),
    ("Q4_0 Q8_0 Q1_0 IQ4_NL MXFP4", "neon dotprod", 4, 4),
    ("Q4_K Q5_K Q6_K", "neon dotprod", 8, 4),
)
"""Best first: ``ggml_repack_get_optimal_repack_type``. Features are named as in cpuinfo.py; ``sve256``: vectors of 256 bits."""
_AMX = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
"""Types with tiles of AMX: ``qtype_has_amx_kernels`` of ggml-cpu/amx/common.h."""


def has_tiles(features: Collection[str]) -> bool:
    """Whether the library prefers the tiles of AMX on such a CPU, which are not made here."""
    return "amx_int8" in features


def packed_types(features: Collection[str]) -> tuple[str, ...]:
    """Types with packed kernels on a CPU with these features. Q4_1 is one where Q4_0 is: it lies as Q4_0 and offsets (repack.py)."""
    found = dict.fromkeys(choice.type for choice in CHOICES if choice.needs.issubset(features))
    tiles = _AMX if has_tiles(features) else ()
    return tuple(dict.fromkeys([*found, *(("Q4_1",) if "Q4_0" in found else ()), *tiles]))


def layout(type_: str, shape: tuple[int, ...], features: Collection[str]) -> Layout | None:
    """The layout of a weight of a type (its ggml name) and shape [in, out] or [in, out, experts]; None if it stays as it is.

    As the library has it, rows that do not divide take the next layout they fit, or none. It asks for a multiple of 8 columns too, of
    which all blocks are one.
    """
    if len(shape) not in (2, 3) or shape[-1] == 1:  # what ends in a 1 has a dimension less in the library
        return None
    fitting = (one.layout for one in CHOICES if one.type == type_ and one.needs.issubset(features))
    return next((one for one in fitting if shape[1] % one.rows == 0), None)


# ---- one block of several rows ---------------------------------------------------------------------------------------


class _Field(NamedTuple):
    """Bytes ``start``:``end`` of a block, and how those of the rows of a group are put together. ``run``: bytes, 0: the layout's."""

    start: int
    end: int
    run: int = 0
    flip: int = 0
    join: Callable[[Bytes, Layout], Bytes] | None = None


def _six_bits(scales: Bytes, _: Layout) -> Bytes:
    """Scales and mins of Q4_K and Q5_K of eight rows [n, 8, 12] -> [n, 96]: make_block_q4_Kx8, make_block_q5_Kx8.

    A row has eight scales s and mins m of 6 bits in its 12 bytes; the result has 12 bytes for each sub-block, of all eight rows.
    """
    import numpy as np

    first, second, low = scales[..., :4], scales[..., 4:8], scales[..., 8:]
    s = np.concatenate([first & 63, (first & 192) >> 2 | low & 15], axis=2).swapaxes(1, 2)  # [n, sub-block, row]
    m = np.concatenate([second & 63, (second & 192) >> 2 | low >> 4], axis=2).swapaxes(1, 2)
    near = [one[..., :4] | (one[..., 4:] & 48) << 2 for one in (s, m)]
    return np.concatenate([*near, s[..., 4:] & 15 | (m[..., 4:] & 15) << 4], axis=2).reshape(len(scales), -1)


def _bits(quants: Bytes, layout_: Layout) -> Bytes:
    """Bits of Q1_0 of four rows [n, 4, 16] -> [n, 64]: make_block_q1_0x4. With a run of 4, each two rows share a byte for four weights."""
    import numpy as np

    if layout_.run != 4:  # of 8 weights, a byte
        return _interleaved(quants, 1)
    halves = np.stack([quants & 15, quants >> 4], axis=-1).reshape(*quants.shape[:2], -1)  # [n, row, four weights]
    return np.stack([halves[:, 0] | halves[:, 1] << 4, halves[:, 2] | halves[:, 3] << 4], axis=-1).reshape(len(quants), -1)


_FIELDS = {
    "Q4_0": (_Field(0, 2, 2), _Field(2, 18, flip=0x88)),  # the offset of 8 becomes a sign
    "Q8_0": (_Field(0, 2, 2), _Field(2, 34)),
    "IQ4_NL": (_Field(0, 2, 2), _Field(2, 18)),
    "MXFP4": (_Field(0, 1, 1), _Field(1, 17)),
    "Q1_0": (_Field(0, 2, 2), _Field(2, 18, join=_bits)),
    "Q2_K": (_Field(80, 82, 2), _Field(82, 84, 2), _Field(0, 16, 2), _Field(16, 80)),
    "Q4_K": (_Field(0, 2, 2), _Field(2, 4, 2), _Field(4, 16, join=_six_bits), _Field(16, 144)),
    "Q5_K": (_Field(0, 2, 2), _Field(2, 4, 2), _Field(4, 16, join=_six_bits), _Field(16, 48), _Field(48, 176)),
    "Q6_K": (_Field(208, 210, 2), _Field(192, 208, 1), _Field(0, 128), _Field(128, 192)),
}
"""In the order of the packed struct (repack.h), taken from that of the plain one (ggml-common.h)."""
_SIZES = {name: (elements, nbytes) for name, elements, nbytes in GGML_TYPES.values()}


def _interleaved(field: Bytes, run: int) -> Bytes:
    """Bytes of a field of the rows of a group [n, rows, bytes] -> [n, rows * bytes], a run of each row in turn."""
    import numpy as np

    n, rows, nbytes = field.shape
    items: npt.NDArray[Any] = np.ascontiguousarray(field).view(f"u{run}")
    taken = items.swapaxes(1, 2).reshape(-1)  # a copy
    return np.frombuffer(taken, np.uint8).reshape(n, rows * nbytes)


def interleave(data: memoryview | bytes, type_: str, shape: tuple[int, ...], layout_: Layout) -> Bytes:
    """The packed bytes of a weight, as many as ``data`` has: ``repack_*`` of repack.cpp.

    ``type_``: its ggml name; ``shape``: [in, out] or [in, out, experts] as ``layout`` was asked for; ``data``: its blocks.
    Memory: the result, and a few pieces of 1 MB.
    """
    import numpy as np

    elements, size = _SIZES[type_]
    blocks, rows = shape[0] // elements, layout_.rows
    source = np.frombuffer(data, np.uint8).reshape(-1, rows, blocks, size)
    packed = np.empty((len(source), blocks, rows * size), np.uint8)
    step = max(1, _PIECE // (rows * blocks * size))
    for at in range(0, len(source), step):
        piece = source[at : at + step].swapaxes(1, 2).reshape(-1, rows, size)  # the same block of each row of a group
        parts = []
        for field in _FIELDS[type_]:
            part = piece[..., field.start : field.end]
            joined = field.join(part, layout_) if field.join else _interleaved(part, field.run or layout_.run)
            parts.append(joined ^ np.uint8(field.flip) if field.flip else joined)
        np.concatenate(parts, axis=1, out=packed[at : at + step].reshape(len(piece), -1))
    return packed.reshape(-1)
