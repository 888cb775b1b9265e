"""How large activations are, and where: at each matrix' input, and along the residual stream.

Massive activations as in Sun et al. 2024 (arXiv:2402.17762): magnitudes above 100 and 1000 times the median. They sit in few channels at
few positions (the first, mostly), they are the same whatever the text says, and a mean over them is a mean of nothing else. Kurtosis is
Pearson's: 3 for a normal distribution; channels that stand out make it large, and quantisation hard.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edge_rt_distill.diagnose.passes import SeesValue, Step
from edge_rt_distill.model.decoder import GROUPS, Decoder
from edge_rt_distill.model.rows import Rows

MASSIVE, MASSIVE_TIMES = 100.0, 1000.0
"""A massive activation is larger than both: this number, and so many medians (Sun et al. 2024)."""
OUTLIER_TIMES = 6.0
"""A channel stands out if its root mean square is so many times the median channel's."""
_MASSIVE_KEPT = 64
"""Places of massive activations that are remembered at each layer."""


class Massive(NamedTuple):
    """A massive activation behind ``layer`` (-1: of the embeddings): how often it was ``met``, its largest magnitude, that in medians
    of its batch, and its share of the sum of squares of all that is there."""

    layer: int
    position: int
    channel: int
    met: int
    value: float
    times_median: float
    share: float


class Spread(NamedTuple):
    """The distribution of an activation. ``outliers``: channels that stand out, with their root mean square in medians, largest first.

    ``channels`` [n]: mean square by channel.
    """

    mean_square: float
    largest: float
    kurtosis: float
    outliers: list[tuple[int, float]]
    channels: Tensor


class Moments:
    """Sums of powers of a stream of activations [.., n], in float64."""

    def __init__(self) -> None:
        self.count, self.largest = 0, 0.0
        self.powers = torch.zeros(4, dtype=torch.float64)
        self.channels = torch.zeros(0, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take [N, n] more."""
        square = values * values
        by_channel = square.sum(0, dtype=torch.float64)
        self.channels = by_channel if not self.count else self.channels + by_channel
        self.powers += torch.stack([
            values.sum(dtype=torch.float64), by_channel.sum(), (square * values).sum(dtype=torch.float64),
            (square * square).sum(dtype=torch.float64),
        ])  # fmt: skip
        self.count += values.numel()
        self.largest = max(self.largest, float(square.max()) ** 0.5)

    def spread(self) -> Spread:
        """What they amount to."""
        mean, second, third, fourth = (float(power) / self.count for power in self.powers)
        variance = second - mean**2
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        channels = self.channels / (self.count / len(self.channels))
        root = channels.sqrt()
        times = root / root.median().clamp_min(1e-30)
        found = [(int(c), float(times[c])) for c in times.argsort(descending=True)[:16] if times[c] > OUTLIER_TIMES]
        return Spread(second, self.largest, central / variance**2 if variance > 0 else 0.0, found, channels)


class Activations:
    """Collects over batches. ``sites``: by the first matrix that has the input (``blk.3.attn_q`` stands for attn_k and attn_v too).

    ``stream``: the residual stream at the entry of each layer, last what leaves the last, without position 0, where massive
    activations would hide all others. ``by_position``: the stream's largest magnitude at each layer and position [L + 1, T].
    """

    def __init__(self, model: Decoder, length: int) -> None:
        self.depth = len(model.layers)
        self.sites: dict[str, Moments] = {}
        self.stream = [Moments() for _ in range(self.depth + 1)]
        self.by_position = torch.zeros(self.depth + 1, length)
        self._squares = [0.0] * (self.depth + 1)
        self._massive: list[dict[tuple[int, int], tuple[int, float, float, float]]] = [{} for _ in range(self.depth + 1)]

    def watch(self, model: Decoder, current: Callable[[], Rows]) -> list[tuple[nn.Module, SeesValue]]:
        """What ``passes.inputs`` is to show. ``current`` gives the batch under way."""

        def see(site: str, value: Tensor) -> None:
            self.sites[site].add(value[current().real])

        watched: list[tuple[nn.Module, SeesValue]] = []
        for number in range(self.depth):
            for group in GROUPS:
                site = f"blk.{number}.{group[0]}"
                self.sites.setdefault(site, Moments())
                watched.append((model.linear(site), partial(see, site)))
        return watched

    def add(self, step: Step, rows: Rows) -> None:
        """The stream before a layer, and behind the last."""
        self._add_stream(step.layer, step.entry, rows)
        if step.layer == self.depth - 1:
            self._add_stream(self.depth, step.exit, rows)

    def _add_stream(self, place: int, state: Tensor, rows: Rows) -> None:
        real = rows.real
        size = state.abs() * real[:, :, None]
        at = size.amax((0, 2))
        self.by_position[place, : len(at)] = torch.maximum(self.by_position[place, : len(at)], at)
        later = real.clone()
        later[:, 0] = False
        if later.any():
            self.stream[place].add(state[later])
        median = float(size[real].median())
        self._squares[place] += float(size.square().sum(dtype=torch.float64))
        found = (size > max(MASSIVE, MASSIVE_TIMES * median)).nonzero().tolist()
        kept = self._massive[place]
        for row, position, channel in found:
            value = float(size[row, position, channel])
            if (position, channel) in kept or len(kept) < _MASSIVE_KEPT:
                met, largest, times, squares = kept.get((position, channel), (0, 0.0, 0.0, 0.0))
                times = max(times, value / max(median, 1e-30))
                kept[position, channel] = (met + 1, max(largest, value), times, squares + value**2)

    def massive(self) -> list[Massive]:
        """All that were met, by layer, largest first."""
        found = [
            Massive(place - 1, position, channel, met, value, times, squares / self._squares[place])
            for place, kept in enumerate(self._massive)
            for (position, channel), (met, value, times, squares) in kept.items()
        ]
        return sorted(found, key=lambda one: (one.layer, -one.value))
