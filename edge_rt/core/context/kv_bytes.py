"""Cells as bytes: what a session file keeps of a sequence, and what an evicted segment leaves on disk."""

from __future__ import annotations

import struct
from typing import NamedTuple

from edge_rt.core.context.kv import KvCache, cell_bytes
from edge_rt.core.context.positions import Positions, Run
from edge_rt.core.graph.hyper import Hyper
from edge_rt.errors import SessionFileError

_HEADER = struct.Struct("<4sIIIIII")  # magic, layers, KV width, key type, cells, runs, next position
_RUN = struct.Struct("<III")
_MAGIC = b"EKV2"


class Cells(NamedTuple):
    """Exported cells: where their tokens stand, and the keys and values (see ``KvCache.export``)."""

    positions: Positions
    data: memoryview


def write_cells(cache: KvCache, hyper: Hyper, key_type: int, start: int, end: int) -> bytes:
    """Cells [start, end) of a cache."""
    runs = cache.positions.part(start, end)
    head = _HEADER.pack(_MAGIC, hyper.n_layer, hyper.kv_width, key_type, end - start, len(runs), cache.positions.of(end))
    return head + b"".join(_RUN.pack(*run) for run in runs) + cache.export(start, end)


def read_cells(data: bytes | memoryview, hyper: Hyper, key_type: int) -> Cells:
    """Check exported cells against a model. Raises SessionFileError."""
    view = memoryview(data).cast("B")
    if len(view) < _HEADER.size:
        raise SessionFileError("the saved cells are cut short; start a new session")
    magic, layers, width, kind, n, n_runs, following = _HEADER.unpack(view[: _HEADER.size])
    if magic != _MAGIC or (layers, width, kind) != (hyper.n_layer, hyper.kv_width, key_type):
        raise SessionFileError("the saved cells have another format, shape or key type than this model; start a new session")
    body = _HEADER.size + _RUN.size * n_runs
    if len(view) != body + n * cell_bytes(hyper, key_type):
        raise SessionFileError("the saved cells are cut short or too long; start a new session")
    runs = [Run(*_RUN.unpack_from(view, _HEADER.size + _RUN.size * i)) for i in range(n_runs)]
    cell, position = 0, 0
    for run in runs:
        if run.cell != cell or run.position < position or not run.n:
            raise SessionFileError("the saved cells do not follow each other; start a new session")
        cell, position = run.cell + run.n, run.position + run.n
    if cell != n or following < position:
        raise SessionFileError("the saved cells do not add up; start a new session")
    positions = Positions(runs)
    positions.next = following
    return Cells(positions, view[body:])
