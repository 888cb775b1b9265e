"""Writes random LoRA adapters for a model, as llama.cpp's convert_lora_to_gguf.py would."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_rt.core.load.adapter import EMBEDDING
from edge_rt.core.load.header import Header
from edge_rt.testing.gguf_bytes import build, metadata, tensor

LINEAR = r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.weight"
"""Matrices of a block, the usual targets."""


def write_random_adapter(
    path: str | os.PathLike[str],
    model: Header,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float | None = 8.0,
    gain: float = 0.3,
    target: str = LINEAR,
    type: str = "F32",
    changes: Mapping[str, tuple[str, Any] | None] | None = None,
) -> Path:
    """Write an adapter of every weight whose name matches ``target``, and return its path. The same arguments give the same file.

    ``gain``: how large what it adds is beside inputs of size 1, before the scale; 0: B is all zeros. ``type``: F32, F16 or Q8_0.
    ``changes`` replaces metadata, as (kind, value), or leaves it out (None).
    """
    import gguf
    import numpy as np

    rng, infos, data = np.random.default_rng(seed), list[bytes](), bytearray()
    kind = gguf.GGMLQuantizationType[type]

    def add(name: str, shape: tuple[int, ...], deviation: float) -> None:
        values = (rng.standard_normal(shape[::-1]) * deviation).astype(np.float32)
        infos.append(tensor(name, shape, int(kind), len(data)))
        data.extend(gguf.quants.quantize(values, kind).tobytes())
        data.extend(bytes(-len(data) % 32))

    for base, info in model.tensors.items():
        if not re.fullmatch(target, base):
            continue
        inner, outer, *more = info.shape
        a, b = ((rank, outer), (rank, inner)) if base == EMBEDDING else ((inner, rank), (rank, outer))
        add(f"{base}.lora_a", (*a, *more), 1 if base == EMBEDDING else 1 / math.sqrt(inner))
        add(f"{base}.lora_b", (*b, *more), gain / math.sqrt(rank))
    entries: dict[str, tuple[str, Any] | None] = {
        "general.architecture": ("str", model.architecture),
        "general.type": ("str", "adapter"),
        "adapter.type": ("str", "lora"),
        "adapter.lora.alpha": ("f32", alpha) if alpha is not None else None,
        **(changes or {}),
    }
    values = [metadata(key, *entry) for key, entry in entries.items() if entry is not None]
    Path(path).write_bytes(build(values, infos, bytes(data)))
    return Path(path)
