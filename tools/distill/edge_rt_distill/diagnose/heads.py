"""What the loss owes to each head, KV group, FFN channel and hidden dimension.

A mask of ones multiplies the unit; |dLoss / d mask| of each sequence, averaged over sequences, is the first-order estimate of what its
removal costs. For heads this is Michel et al. 2019 (arXiv:1905.10650). For a channel or dimension it equals the summed w * dLoss/dw of the
weights that read or write it (Molchanov et al. 2019, arXiv:1906.10771; grouped over coupled matrices as LLM-Pruner, Ma et al. 2023,
arXiv:2305.11627). The other measure looks at sizes alone: root mean square of the activation times the norm of the weights that read it
(Wanda, Sun et al. 2023, arXiv:2306.11695; summed over a unit's weights as in Minitron, Muralidharan et al. 2024, arXiv:2407.14679).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from edge_rt_distill.diagnose.passes import SeesValue, Watch, counted
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.rows import Rows

Current = Callable[[], Rows]
"""Gives the batch under way."""


def table(rows: Iterable[Tensor]) -> Tensor:
    """Vectors of several lengths as one table [L, longest]; what a shorter one has not is NaN."""
    found = list(rows)
    out = torch.full((len(found), max(len(row) for row in found)), float("nan"))
    for number, row in enumerate(found):
        out[number, : len(row)] = row.float()
    return out


class HeadImportance:
    """|dLoss / d mask| of each head. ``by_sequence`` [N, L, H]: signed, of the mean loss of each sequence (nats a token)."""

    def __init__(self, model: Decoder, sequences: int) -> None:
        self.shapes = [(layer.heads, layer.kv_heads) for layer in model.architecture.layers]
        self.by_sequence = torch.zeros(sequences, len(self.shapes), max(heads for heads, _ in self.shapes))

    def watch(self, model: Decoder, current: Current) -> list[Watch]:
        """For ``passes.backward``."""
        head = model.architecture.head

        def see(layer: int, value: Tensor, gradient: Tensor) -> None:
            rows = current()
            owed = (value * gradient).sum(1).view(len(value), -1, head).sum(-1)
            self.by_sequence[list(rows.numbers), layer, : owed.shape[1]] = (owed / counted(rows)[:, None]).float()

        return [Watch(model.linear(f"blk.{number}.attn_output"), "input", partial(see, number)) for number in range(len(self.shapes))]

    def heads(self, among: Tensor | None = None) -> Tensor:
        """[L, H], mean over all sequences or those of the index ``among``; NaN where a layer has fewer heads."""
        mean = (self.by_sequence if among is None else self.by_sequence[among]).abs().mean(0)
        return table(mean[number, :heads] for number, (heads, _) in enumerate(self.shapes))

    def groups(self) -> Tensor:
        """[L, KV]: of all heads together that share keys and values, which can only be removed together."""
        return kv_groups(self.heads(), [kv for _, kv in self.shapes])


def kv_groups(heads: Tensor, kv_heads: list[int]) -> Tensor:
    """[L, KV] of [L, H]: sums over the heads of each group."""
    rows = []
    for row, groups in zip(heads, kv_heads, strict=True):
        own = row[~row.isnan()]
        rows.append(own.view(groups, -1).sum(1))
    return table(rows)


class ChannelImportance:
    """FFN channels by |dLoss / d mask|: ``taylor`` [L, F]."""

    def __init__(self, model: Decoder) -> None:
        self.sums = [torch.zeros(layer.ffn, dtype=torch.float64) for layer in model.architecture.layers]
        self.sequences = 0

    def watch(self, model: Decoder, current: Current) -> list[Watch]:
        """For ``passes.backward``."""

        def see(layer: int, value: Tensor, gradient: Tensor) -> None:
            owed = (value * gradient).sum(1) / counted(current())[:, None]
            self.sums[layer] += owed.abs().sum(0)
            self.sequences += len(owed) if layer == 0 else 0

        return [Watch(model.linear(f"blk.{number}.ffn_down"), "input", partial(see, number)) for number in range(len(self.sums))]

    def taylor(self) -> Tensor:
        """Mean over sequences."""
        return table(each / max(1, self.sequences) for each in self.sums)


def channel_activation(model: Decoder, mean_square: list[Tensor]) -> Tensor:
    """[L, F]: root mean square of each FFN channel (``mean_square`` by layer) times the norm of the column of ``ffn_down`` it feeds."""
    rows = []
    for number, square in enumerate(mean_square):
        norm = model.linear(f"blk.{number}.ffn_down").weight.detach().norm(dim=0)
        rows.append(square.sqrt() * norm)
    return table(rows)


class HiddenImportance:
    """Dimensions of the residual stream, which every matrix reads or writes: one score for each, over all of them.

    ``taylor``: summed over the places that read the stream (behind each norm) and that write to it (embedding, ``attn_output``,
    ``ffn_down``) of |sum_t x g|, so that what two places owe to a dimension does not cancel out.
    """

    def __init__(self, model: Decoder) -> None:
        self.sums = torch.zeros(model.architecture.width, dtype=torch.float64)
        self.sequences = 0

    def watch(self, model: Decoder, current: Current) -> list[Watch]:
        """For ``passes.backward``; the embedding's part is ``add``'s."""

        def see(value: Tensor, gradient: Tensor) -> None:
            self._add(value, gradient, current())

        places: list[nn.Module] = [model.output_norm]
        for number, layer in enumerate(model.layers):
            places += [layer.get_submodule("attn_norm"), layer.get_submodule("ffn_norm")]
            places += [model.linear(f"blk.{number}.attn_output"), model.linear(f"blk.{number}.ffn_down")]
        return [Watch(place, "output", see) for place in places]

    def add(self, embeddings: Tensor, gradient: Tensor, rows: Rows) -> None:
        """The embedding's part, once for each batch."""
        self._add(embeddings, gradient, rows)
        self.sequences += len(embeddings)

    def _add(self, value: Tensor, gradient: Tensor, rows: Rows) -> None:
        owed = (value * gradient).sum(1) / counted(rows)[:, None]
        self.sums += owed.abs().sum(0)

    def taylor(self) -> Tensor:
        """[D], mean over sequences."""
        return (self.sums / max(1, self.sequences)).float()


class HiddenActivation:
    """The same by size alone: root mean square of what each matrix reads of a dimension, times the norm of the column that reads it.

    Position 0 does not count: massive activations there would decide all.
    """

    def __init__(self, model: Decoder) -> None:
        self.readers = [(f"blk.{i}.{name}", group) for i in range(len(model.layers)) for name, group in _READERS.items()]
        self.squares = {site: torch.zeros(model.architecture.width, dtype=torch.float64) for site, _ in self.readers}
        self.final = torch.zeros(model.architecture.width, dtype=torch.float64)
        self.positions = 0

    def watch(self, model: Decoder, current: Current) -> list[tuple[nn.Module, SeesValue]]:
        """For ``passes.inputs``."""

        def see(site: str, value: Tensor) -> None:
            self.squares[site] += _later(value, current()).square().sum(0, dtype=torch.float64)

        return [(model.linear(site), partial(see, site)) for site, _ in self.readers]

    def add(self, hidden: Tensor, rows: Rows) -> None:
        """What the output matrix reads, once for each batch: [B, T, D] behind the final norm."""
        later = _later(hidden, rows)
        self.final += later.square().sum(0, dtype=torch.float64)
        self.positions += len(later)

    def activation(self, model: Decoder) -> Tensor:
        """[D]: the sum over readers, each reader's scores divided by their mean, so that a large matrix is not all there is."""
        total = torch.zeros_like(self.final)
        for site, group in self.readers:
            number = site.split(".")[1]
            weights = [model.linear(f"blk.{number}.{name}").weight.detach() for name in group]
            total += _scaled(self.squares[site], self.positions, torch.cat(weights).norm(dim=0))
        output = model.head_weight.detach().norm(dim=0)
        return ((total + _scaled(self.final, self.positions, output)) / (len(self.readers) + 1)).float()


_READERS = {"attn_q": ("attn_q", "attn_k", "attn_v"), "ffn_gate": ("ffn_gate", "ffn_up")}
"""Matrices that read the residual stream, by the first of those that share the input."""


def _later(value: Tensor, rows: Rows) -> Tensor:
    """[N, n]: what is no padding, without position 0."""
    real = rows.real.clone()
    real[:, 0] = False
    return value[real]


def _scaled(squares: Tensor, positions: int, norm: Tensor) -> Tensor:
    score = (squares / max(1, positions)).sqrt() * norm
    return score / score.mean().clamp_min(1e-30)
