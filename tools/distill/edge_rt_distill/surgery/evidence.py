"""What surgery needs of a diagnosis: how much each part of the teacher carries, as arrays."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_rt.hooks import DataError
from edge_rt_distill.model.architecture import Architecture

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """Importance of parts, larger means more; inside a layer (for ``hidden``: over the model) they are compared as shares of the sum.

    ``layer_kl`` [L]: divergence in nats a token when that layer alone is left out. ``heads`` [L, H], ``ffn_channels`` [L, F], ``hidden``
    [D]: importance of a query head, a feed-forward channel, a dimension of the residual stream. ``attention_kl``, ``ffn_kl`` [L]: of
    leaving out that half of a layer. ``drop_order``, ``drop_kl``: layers in the order in which they can go, and the divergence with all
    up to there gone, measured together (``depth.removal_order``); empty when they were not.
    ``probed``: the keys of ``scales`` were measured on cuts of this teacher (``probe.calibrated``).
    """

    layer_kl: Array
    heads: Array
    ffn_channels: Array
    hidden: Array
    attention_kl: Array
    ffn_kl: Array
    drop_order: tuple[int, ...] = ()
    drop_kl: tuple[float, ...] = ()
    scales: Mapping[str, float] | None = None

    def scale(self, name: str) -> float:
        """By how much a predicted loss of a kind (depth, ffn, heads, groups, hidden) is off, as measured; 1 where it was not."""
        return 1.0 if self.scales is None else self.scales.get(name, 1.0)


def evidence(arrays: Mapping[str, Any], architecture: Architecture) -> Evidence:
    """Evidence of a diagnosis' arrays, as ``diagnosis.npz`` names them. Raises DataError where they do not fit the model.

    Where ``attention_kl`` and ``ffn_kl`` are missing, each half of a layer is taken to carry half of what the layer does. ``drop_order``
    and ``drop_kl`` may be missing too.
    """
    layers = len(architecture.layers)
    shapes = [architecture.layers[architecture.owner(i)] for i in range(layers)]
    if len({(s.heads, s.kv_heads, s.ffn) for s in shapes}) != 1:
        raise DataError("the layers of this model have different sizes, and a plan needs equal ones; make the cut by hand")
    sizes: dict[str, tuple[int, ...]] = {
        "layer_kl": (layers,), "heads": (layers, shapes[0].heads), "ffn_channels": (layers, shapes[0].ffn), "hidden": (architecture.width,),
    }  # fmt: skip
    found = {name: _array(arrays, name, shape) for name, shape in sizes.items()}
    half = found["layer_kl"] / 2
    attention, ffn = (_array(arrays, name, (layers,)) if name in arrays else half for name in ("attention_kl", "ffn_kl"))
    order = tuple(int(i) for i in np.asarray(arrays.get("drop_order", ())))
    kl = tuple(float(one) for one in np.asarray(arrays.get("drop_kl", ())))
    if len(order) != len(kl) or len(set(order)) < len(order) or any(not 0 <= i < layers for i in order):
        raise DataError("the diagnosis' drop_order and drop_kl do not belong together; diagnose the teacher again")
    return Evidence(found["layer_kl"], found["heads"], found["ffn_channels"], found["hidden"], attention, ffn, order, kl)


def read_evidence(path: str | os.PathLike[str], architecture: Architecture) -> Evidence:
    """Evidence of a ``diagnosis.npz``, or of the folder it lies in. Raises DataError."""
    where = Path(path)
    where = where / "diagnosis.npz" if where.is_dir() else where
    try:
        with np.load(where) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{where}: no arrays of a diagnosis ({error}); diagnose the teacher again") from None
    return evidence(arrays, architecture)


def _array(arrays: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Array:
    if name not in arrays:
        raise DataError(f"the diagnosis has no {name}; diagnose the teacher again")
    found = np.asarray(arrays[name], dtype=np.float64)
    if found.shape != shape:
        raise DataError(
            f"the diagnosis' {name} has shape {found.shape} where {shape} is expected; it is of another model, diagnose this one"
        )
    if not np.isfinite(found).all():
        raise DataError(f"the diagnosis' {name} is not finite everywhere; diagnose the teacher again on more samples")
    return np.maximum(found, 0.0)  # a KL that was measured slightly below nothing, or an importance without a sign
