"""Cells as bytes: what a session file keeps of a sequence, and what an evicted segment leaves on disk."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.context.kv import KvCache, cell_bytes
from edge_rt.core.context.placed_cells import saved_mixed
from edge_rt.core.context.positions import Positions, Run
from edge_rt.core.graph.hyper import Hyper
from edge_rt.errors import SessionFileError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_HEADER = struct.Struct("<4sIIIIIII")  # magic, layers, KV width, key type, cells, runs, next position, mixed cells
_RUN = struct.Struct("<III")
_MAGIC = b"EKV3"


class Cells(NamedTuple):
    """Exported cells: where their tokens stand (``mixed``: head by head, see ``KvCache``), and the keys and values."""

    positions: Positions
    mixed: npt.NDArray[np.int32] | None
    data: memoryview


def write_cells(cache: KvCache, hyper: Hyper, key_type: int, start: int, end: int) -> bytes:
    """Cells [start, end) of a cache. Raises ContextError for some of the mixed cells: only with all others they make sense."""
    whole = cache.is_whole(start, end)
    runs = cache.positions.part(start, end)
    mixed = b"" if cache.mixed is None or not whole else cache.mixed.tobytes()
    counts = (end - start, len(runs), cache.positions.of(end), cache.n_mixed if whole else 0)
    head = _HEADER.pack(_MAGIC, hyper.n_layer, hyper.kv_width, key_type, *counts)
    out = io.BytesIO()  # written to piece by piece: joined, there would be two of all cells for a while
    for piece in (head, *(_RUN.pack(*run) for run in runs), mixed):
        out.write(piece)
    for piece in cache.export(start, end):
        out.write(piece)
    return out.getvalue()


def read_cells(data: bytes | memoryview, hyper: Hyper, key_type: int) -> Cells:
    """Check exported cells against a model. Raises SessionFileError."""
    view = memoryview(data).cast("B")
    if len(view) < _HEADER.size:
        raise SessionFileError("the saved cells are cut short; start a new session")
    magic, layers, width, kind, n, n_runs, following, n_mixed = _HEADER.unpack(view[: _HEADER.size])
    if magic != _MAGIC or (layers, width, kind) != (hyper.n_layer, hyper.kv_width, key_type):
        raise SessionFileError("the saved cells have another format, shape or key type than this model; start a new session")
    noted = _HEADER.size + _RUN.size * n_runs
    body = noted + 4 * hyper.n_layer * hyper.n_head_kv * n_mixed
    if len(view) != body + n * cell_bytes(hyper, key_type) or n_mixed > n:
        raise SessionFileError("the saved cells are cut short or too long; start a new session")
    positions = Positions.saved([Run(*_RUN.unpack_from(view, _HEADER.size + _RUN.size * i)) for i in range(n_runs)], n, following)
    return Cells(positions, saved_mixed(view[noted:body], hyper.n_layer, hyper.n_head_kv, n_mixed, positions), view[body:])
