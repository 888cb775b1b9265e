"""Rotary position embedding as ggml_rope_ext computes it: neighbouring pairs or halves, linear scaling, YaRN, frequency factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt.hooks import ModelConfig


class Turn(NamedTuple):
    """Cosines and sines for some positions, float32 [..., D/2], on the device."""

    cos: torch.Tensor
    sin: torch.Tensor


class Rope:
    """How keys and queries of a model are rotated.

    A pair i at position p turns by p * ``frequencies[i]``: base^(-2i/D), divided by the model's factor for the pair (Llama 3), and by the
    scale, which YaRN (Peng et al. 2023) applies to slow pairs only, with a ramp between.
    """

    def __init__(self, config: ModelConfig, factors: npt.NDArray[np.float32] | None, *, neighbours: bool, device: torch.device) -> None:
        """``factors``: [D/2]. ``neighbours``: pairs are elements 2i and 2i+1 (llama), else i and i + D/2."""
        r, pairs = config.rope, np.arange(config.rope.dims // 2, dtype=np.float64)
        plain = r.base ** (-2 * pairs / r.dims) / (1.0 if factors is None else factors.astype(np.float64))
        kept = r.ext_factor * _ramp(pairs, config) if r.ext_factor else 0.0
        self._frequencies = plain * (r.scale * (1 - kept) + kept)
        self._magnitude = r.attn_factor * (1 + 0.1 * math.log(1 / r.scale) if r.ext_factor else 1.0)
        self._neighbours, self._device = neighbours, device

    def at(self, positions: Sequence[int] | npt.NDArray[np.int32]) -> Turn:
        """The turn to positions [...], with the magnitude that YaRN gives keys and queries when they are made."""
        return self._turn(positions, self._magnitude)

    def by(self, shifts: npt.NDArray[np.int32]) -> Turn:
        """The turn by so many positions, for keys that were made already."""
        return self._turn(shifts, 1.0)

    def _turn(self, positions: Sequence[int] | npt.NDArray[np.int32], magnitude: float) -> Turn:
        angles = np.asarray(positions, np.float64)[..., None] * self._frequencies
        both = np.stack([np.cos(angles), np.sin(angles)]) * magnitude
        cos, sin = torch.from_numpy(both.astype(np.float32)).to(self._device)  # one transfer
        return Turn(cos, sin)

    def turn(self, x: torch.Tensor, turn: Turn) -> torch.Tensor:
        """x [..., D] in float32, rotated; the turn's dimensions are those of x but the last, or broadcast to them."""
        x = x.float()
        if self._neighbours:
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * turn.cos - b * turn.sin, a * turn.sin + b * turn.cos), dim=-1).flatten(-2)
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * turn.cos - b * turn.sin, a * turn.sin + b * turn.cos), dim=-1)


def _ramp(pairs: npt.NDArray[np.float64], config: ModelConfig) -> npt.NDArray[np.float64]:
    """How much of each pair's own frequency YaRN keeps: 1 for those that turn often within the original context, 0 for slow ones."""
    r = config.rope

    def pair(turns: float) -> float:
        return r.dims * math.log(r.original_context / (turns * 2 * math.pi)) / (2 * math.log(r.base))

    low, high = max(0.0, math.floor(pair(r.beta_fast))), min(r.dims - 1.0, math.ceil(pair(r.beta_slow)))
    kept: npt.NDArray[np.float64] = 1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)
    return kept
