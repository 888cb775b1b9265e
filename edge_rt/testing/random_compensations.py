"""Writes random compensations for a model, as tools/distill would after calibration."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_rt.core.load.compensation import compensation_fingerprint
from edge_rt.core.load.model_file import ModelFile
from edge_rt.testing.gguf_bytes import build, metadata, tensor

SITES = r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight"
"""All weights that can be corrected."""


def write_random_compensation(
    path: str | os.PathLike[str],
    model: ModelFile,
    *,
    seed: int = 0,
    rank: int = 4,
    rows: int = 4,
    offsets: bool = True,
    bias: bool = True,
    gain: float = 0.3,
    target: str = SITES,
    type: str = "F32",
    changes: Mapping[str, tuple[str, Any] | None] | None = None,
) -> Path:
    """Write a compensation of every weight whose name matches ``target``, and return its path. The same arguments give the same file.

    ``rank`` of the low-rank terms and ``rows`` of the tables: 0 for none. ``gain``: how large what each kind adds is beside inputs of size
    1. ``type`` of matrices: F32, F16 or Q8_0. ``changes`` replaces metadata, as (kind, value), or leaves it out (None).
    """
    import gguf
    import numpy as np

    rng, infos, data = np.random.default_rng(seed), list[bytes](), bytearray()

    def add(name: str, shape: tuple[int, ...], deviation: float) -> None:
        kind = gguf.GGMLQuantizationType[type if len(shape) > 1 else "F32"]
        values = (rng.standard_normal(shape[::-1]) * deviation).astype(np.float32)
        infos.append(tensor(name, shape, int(kind), len(data)))
        data.extend(gguf.quants.quantize(values, kind).tobytes())
        data.extend(bytes(-len(data) % 32))

    for weight, info in model.header.tensors.items():
        if not re.fullmatch(target, weight):
            continue
        (inner, outer), site = info.shape, weight.removesuffix(".weight")
        if rank:
            add(f"{site}.low_a", (inner, rank), 1 / math.sqrt(inner))
            add(f"{site}.low_b", (rank, outer), gain / math.sqrt(rank))
        if rows:
            add(f"{site}.centroids", (inner, rows), 1 / math.sqrt(inner))
            if offsets:
                add(f"{site}.offsets", (rows,), 0.3)
            add(f"{site}.rows", (outer, rows), gain)
        if bias:
            add(f"{site}.bias", (outer,), gain)
    entries: dict[str, tuple[str, Any] | None] = {
        "general.architecture": ("str", model.header.architecture),
        "general.type": ("str", "compensation"),
        "edge_rt.compensation.version": ("u32", 1),
        "edge_rt.compensation.model": ("str", compensation_fingerprint(model)),
        **(changes or {}),
    }
    values = [metadata(key, *entry) for key, entry in entries.items() if entry is not None]
    Path(path).write_bytes(build(values, infos, bytes(data)))
    return Path(path)
