"""Cells as bytes: what a session file keeps of a sequence, and what an evicted segment leaves on disk.

The same on every device, as long as cells have the same type: a session saved on an MLU goes on on a CPU.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.hooks import Positions, Run, SessionFileError, saved_mixed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt_mlu.cells import Cells, Shape

_MAGIC = b"ETC1"
# Magic, type, layers, heads, head size, cells, runs, next position, mixed cells, CRC-32 of what follows.
_HEADER = struct.Struct("<4s8sIIIIIIII")
_RUN = struct.Struct("<III")


class Saved(NamedTuple):
    """Exported cells: where their tokens stand (``mixed``: head by head), and the keys and values."""

    positions: Positions
    mixed: npt.NDArray[np.int32] | None
    data: memoryview


def _type(shape: Shape) -> bytes:
    return str(shape.dtype).removeprefix("torch.").encode()[:8]


def write_cells(cells: Cells, start: int, end: int) -> bytes:
    """Cells [start, end). Raises ContextError for some of the mixed cells: only with all others they make sense."""
    whole, shape = cells.is_whole(start, end), cells.shape
    runs = cells.positions.part(start, end)
    out = io.BytesIO()  # written to piece by piece: joined, there would be two of all cells for a while
    out.write(bytes(_HEADER.size))
    for run in runs:
        out.write(_RUN.pack(*run))
    if cells.mixed is not None and whole:
        out.write(cells.mixed.tobytes())
    for piece in cells.export(start, end):
        out.write(piece)
    check = zlib.crc32(out.getbuffer()[_HEADER.size :])
    counts = (end - start, len(runs), cells.positions.of(end), cells.n_mixed if whole else 0, check)
    out.seek(0)
    out.write(_HEADER.pack(_MAGIC, _type(shape), shape.layers, shape.heads, shape.size, *counts))
    return out.getvalue()


def read_cells(data: bytes | memoryview, shape: Shape) -> Saved:
    """Check exported cells against a model. Raises SessionFileError."""
    view = memoryview(data).cast("B")
    if len(view) < _HEADER.size:
        raise SessionFileError("the saved cells are cut short; start a new session")
    magic, kind, layers, heads, size, n, n_runs, following, n_mixed, check = _HEADER.unpack(view[: _HEADER.size])
    if magic != _MAGIC or (kind.rstrip(b"\0"), layers, heads, size) != (_type(shape), shape.layers, shape.heads, shape.size):
        raise SessionFileError("the saved cells have another format, shape or type than this model's; start a new session")
    noted = _HEADER.size + _RUN.size * n_runs
    body = noted + 4 * layers * heads * n_mixed
    if len(view) != body + n * shape.cell_bytes or n_mixed > n or zlib.crc32(view[_HEADER.size :]) != check:
        raise SessionFileError("the saved cells are damaged; start a new session")
    positions = Positions.saved([Run(*_RUN.unpack_from(view, _HEADER.size + _RUN.size * i)) for i in range(n_runs)], n, following)
    return Saved(positions, saved_mixed(view[noted:body], shape.layers, shape.heads, n_mixed, positions), view[body:])
