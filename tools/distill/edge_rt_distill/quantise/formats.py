"""ggml's formats of 32 weights to a block, in torch: bytes to values and back, and the search of a block's scale.

A block's weight is ``scale * level[code] + minimum``, scale and minimum in float16. The layouts are those of ggml-common.h (block_q4_0 and
so on); a test holds what is decoded here against libggml and the package gguf, bit for bit. The products are exact in float32 (11 bits of
the scale times at most 8 of the level), so that there is nothing to round differently.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_rt.hooks import OptionError

BLOCK = 32
"""Weights in a block."""
_LARGEST = 65504.0
"""float16's largest."""
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""kvalues_iq4nl of ggml-common.h."""


class Format(NamedTuple):
    """A block format. ``levels``: what each code stands for, ascending; ``shifted``: the block has a minimum beside its scale."""

    name: str
    bits: int
    levels: tuple[int, ...]
    shifted: bool = False

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of 32."""
        return 2 + 2 * self.shifted + BLOCK * self.bits // 8

    @property
    def even(self) -> bool:
        """Whether the levels are a step apart, so that the nearest is found by rounding."""
        return self.levels[-1] - self.levels[0] == len(self.levels) - 1


FORMATS = {
    one.name: one
    for one in (
        Format("Q4_0", 4, tuple(range(-8, 8))),
        Format("Q4_1", 4, tuple(range(16)), shifted=True),
        Format("IQ4_NL", 4, _NONLINEAR),
        Format("Q5_0", 5, tuple(range(-16, 16))),
        Format("Q5_1", 5, tuple(range(32)), shifted=True),
        Format("Q8_0", 8, tuple(range(-127, 128))),
    )
}


def format_named(name: str) -> Format:
    """Raises OptionError for a type that is none of ``FORMATS``."""
    if name not in FORMATS:
        raise OptionError(f"{name} is no format of blocks of {BLOCK}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


class Blocks(NamedTuple):
    """A quantised matrix: codes uint8 [out, in], scales and minima float32 [out, in / 32] of float16's values."""

    format: Format
    codes: Tensor
    scales: Tensor
    minima: Tensor

    def values(self) -> Tensor:
        """float32 [out, in]: what every reader of the format makes of it."""
        levels = torch.tensor(self.format.levels, dtype=torch.float32)
        out, width = self.codes.shape
        blocks = levels[self.codes.long()].view(out, -1, BLOCK) * self.scales.unsqueeze(-1)
        return (blocks + self.minima.unsqueeze(-1) if self.format.shifted else blocks).view(out, width)

    def pack(self) -> npt.NDArray[np.uint8]:
        """ggml's bytes [out, bytes of a row]."""
        out, width = self.codes.shape
        codes = self.codes.numpy().reshape(out, width // BLOCK, BLOCK)
        parts: list[npt.NDArray[Any]] = [_half_bytes(self.scales)]
        if self.format.shifted:
            parts.append(_half_bytes(self.minima))
        if self.format.bits == 8:
            parts.append((codes.astype(np.int16) + self.format.levels[0]).astype(np.int8).view(np.uint8))
        else:
            if self.format.bits == 5:
                parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
            low, high = codes[..., : BLOCK // 2] & 15, codes[..., BLOCK // 2 :] & 15
            parts.append(low | high << 4)
        return np.concatenate(parts, axis=-1).reshape(out, -1)


def unpack(format: Format, raw: npt.NDArray[np.uint8]) -> Blocks:
    """The matrix of which ``raw`` [out, bytes of a row] are the bytes. Raises OptionError if they are no whole blocks."""
    out, length = raw.shape
    if length % format.block_bytes:
        raise OptionError(f"rows of {length} bytes are no blocks of {format.name}; give multiples of {format.block_bytes}")
    blocks = raw.reshape(out, -1, format.block_bytes)
    scales, at = _halves(blocks[..., :2]), 2
    minima = torch.zeros_like(scales)
    if format.shifted:
        minima, at = _halves(blocks[..., 2:4]), 4
    codes: npt.NDArray[Any]
    if format.bits == 8:
        codes = (blocks[..., at:].view(np.int8).astype(np.int16) - format.levels[0]).clip(0).astype(np.uint8)
    else:
        nibbles = blocks[..., -BLOCK // 2 :]
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
        if format.bits == 5:
            codes = codes | np.unpackbits(blocks[..., at : at + 4], axis=-1, bitorder="little") << 4
    return Blocks(format, torch.from_numpy(codes.reshape(out, -1).copy()), scales, minima)


def _half_bytes(values: Tensor) -> npt.NDArray[np.uint8]:
    """[out, blocks] -> [out, blocks, 2]."""
    return np.ascontiguousarray(values.numpy().astype("<f2")).view(np.uint8).reshape(*values.shape, 2)


def _halves(raw: npt.NDArray[np.uint8]) -> Tensor:
    """[out, blocks, 2] -> float32 [out, blocks]."""
    return torch.from_numpy(np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32))


def half(values: Tensor) -> Tensor:
    """Rounded to what float16 can hold, as float32; beyond its range the largest it has."""
    return values.clamp(-_LARGEST, _LARGEST).half().float()


def nearest(format: Format, x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The index (as float) of the level nearest to each weight; ``scale`` and ``minimum`` broadcast. With a scale of 0 that of level 0."""
    steps = torch.where(scale == 0, torch.zeros_like(x), (x - minimum) / torch.where(scale == 0, torch.ones_like(scale), scale))
    if format.even:
        return (steps - format.levels[0]).round_().clamp_(0, len(format.levels) - 1)
    levels = torch.tensor(format.levels, dtype=x.dtype)
    return torch.bucketize(steps, (levels[1:] + levels[:-1]) / 2).to(x.dtype)


def level(format: Format, index: Tensor) -> Tensor:
    """The levels of indices as ``nearest`` gives them."""
    if format.even:
        return index + format.levels[0]
    return torch.tensor(format.levels, dtype=index.dtype)[index.long()]


def candidates(format: Format, x: Tensor, weight: Tensor, factors: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and minima worth trying for blocks ``x`` [n, 32], and the squared error of each, weighted by ``weight`` [n, 32]: [K, n] each.

    Each is a range that covers ``factors`` of the block's own, then fitted to its codes by least squares and rounded to float16.
    """
    found: list[tuple[Tensor, Tensor]] = []
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if format.shifted:
        # A minimum above zero would be as good a guess as any; ggml holds it at or below zero, least squares need not.
        span, zero = (high - low) / format.levels[-1], torch.zeros_like(low)
        found += [(span * f, low + span * (1 - f) * format.levels[-1] / 2) for f in factors]
        found.append((torch.maximum(high, zero) / format.levels[-1], zero))
    else:
        extreme = torch.where(high >= -low, high, low)
        found += [(extreme * f / end, torch.zeros_like(low)) for f in factors for end in (format.levels[0], format.levels[-1])]
    scales, minima, errors = [], [], []
    for guess, shift in found:
        lvl = level(format, nearest(format, x, guess, shift))
        scale, minimum = (half(value) for value in _least_squares(format, x, lvl, weight, guess, shift))
        got = level(format, nearest(format, x, scale, minimum)) * scale + minimum
        scales.append(scale[:, 0])
        minima.append(minimum[:, 0])
        errors.append((weight * (got - x).square()).sum(-1))
    return torch.stack(scales), torch.stack(minima), torch.stack(errors)


def _least_squares(format: Format, x: Tensor, lvl: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum [n, 1] that fit levels [n, 32] to ``x`` best; what is given stays where a block does not determine them."""
    wl = weight * lvl
    ll, lx = (wl * lvl).sum(-1, keepdim=True), (wl * x).sum(-1, keepdim=True)
    if not format.shifted:
        return torch.where(ll > 0, lx / ll.clamp(min=1e-38), scale), minimum
    w, l1, x1 = weight.sum(-1, keepdim=True), wl.sum(-1, keepdim=True), (weight * x).sum(-1, keepdim=True)
    det = w * ll - l1 * l1
    sound = det > 1e-6 * w * ll
    det = torch.where(sound, det, torch.ones_like(det))
    return torch.where(sound, (w * lx - l1 * x1) / det, scale), torch.where(sound, (ll * x1 - l1 * lx) / det, minimum)


FACTORS = tuple(round(1 + 0.03 * i, 2) for i in range(-9, 4))
"""Ranges a search tries, as shares of a block's own: .73 to 1.09."""


def search(format: Format, weights: Tensor, importance: Tensor | None = None, factors: tuple[float, ...] = FACTORS) -> Blocks:
    """Each weight [out, in] rounded to the nearest level of its block, whose scale has the least error of those tried.

    ``importance`` [in] weighs squared errors by column (mean squares of the input), None: all alike.
    Raises OptionError if rows are no whole blocks or something is not finite.
    """
    check(format, weights)
    out, width = weights.shape
    x = weights.float().reshape(-1, BLOCK)
    weight = torch.ones(width) if importance is None else importance.float().clamp(min=0) + 1e-30
    weight = weight.view(1, -1, BLOCK).expand(out, -1, -1).reshape(-1, BLOCK)
    scales, minima, errors = candidates(format, x, weight, factors)
    best = errors.argmin(0, keepdim=True)
    scale, minimum = scales.gather(0, best)[0], minima.gather(0, best)[0]
    codes = nearest(format, x, scale.unsqueeze(-1), minimum.unsqueeze(-1)).to(torch.uint8).view(out, width)
    return Blocks(format, codes, scale.view(out, -1), minimum.view(out, -1))


def check(format: Format, weights: Tensor) -> None:
    """Raise OptionError for weights [out, in] that the format cannot hold."""
    if weights.ndim != 2 or weights.shape[1] % BLOCK:
        raise OptionError(
            f"weights of shape {tuple(weights.shape)} are no rows of {BLOCK}-blocks for {format.name}; keep widths multiples of {BLOCK}"
        )
    if not bool(torch.isfinite(weights).all()):
        raise OptionError("there are weights that are not finite; the model is damaged or its training diverged")
