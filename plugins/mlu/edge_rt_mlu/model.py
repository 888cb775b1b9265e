"""The forward pass of a llama-like decoder in PyTorch: x += attention(norm(x)); x += feed_forward(norm(x)) for each block, then the head.

Matrices multiply in the device's type; hidden states, norms, rotation and softmax are float32, because large models have activations that
half precision cannot hold. Tokens of all sequences go through the linear layers together, and through attention sequence by sequence.

Shapes: T tokens of all sequences, t of one, N cells, H heads, G key-value heads, D head size, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from edge_rt_mlu.experts import Experts
from edge_rt_mlu.lora import Run, add_embeddings, runs
from edge_rt_mlu.rope import Rope, Turn
from edge_rt_mlu.weights import Block, Dense, Weights

if TYPE_CHECKING:
    from edge_rt.hooks import ModelConfig
    from edge_rt_mlu.cells import Cells

SCORES = 1 << 24
"""Scores that attention holds at a time, about: 64 MiB of float32. Longer prompts are divided by their queries."""

Output = Literal["logits", "hidden"]


class Slot(NamedTuple):
    """One sequence's share of a step: ``tokens`` of them go into its cells from ``start`` on, and ``rows`` of them give results."""

    cells: Cells
    start: int
    tokens: int
    rows: int


class _Step(NamedTuple):
    """What all blocks need to know of a step. ``rows`` [R]: the tokens that give results, None: none does. ``adapted``, ``adapted_rows``:
    which tokens, and which of those that give results, go through adapters.
    """

    turn: Turn
    slots: Sequence[Slot]
    rows: torch.Tensor | None
    adapted: Sequence[Run]
    adapted_rows: Sequence[Run]


class Decoder:
    """The weights and how to go through them."""

    def __init__(self, config: ModelConfig, weights: Weights, rope: Rope, dtype: torch.dtype) -> None:
        self.config, self.weights, self.rope, self._dtype = config, weights, rope, dtype

    def run(
        self, tokens: torch.Tensor, turn: Turn, slots: Sequence[Slot], rows: torch.Tensor | None, output: Output, moved: Callable[[], None]
    ) -> torch.Tensor | None:
        """Feed tokens [T], turned to their positions; fill the slots' cells. ``moved`` is called after each block.

        Returns for ``rows`` [R] of the tokens, rising, logits [R, V] or normalised hidden states [R, E] in float32; None if there are
        none: the last block then only stores its keys and values, which is all that a later step needs of it.
        """
        weights, counts = self.weights, [(slot.cells.applied, slot.tokens, slot.rows) for slot in slots]
        step = _Step(
            Turn(turn.cos[:, None], turn.sin[:, None]),  # the same for all heads
            slots,
            rows,
            runs((applied, n) for applied, n, _ in counts),
            runs((applied, n) for applied, _, n in counts),
        )
        x = weights.embedding[tokens].float()
        add_embeddings(x, tokens, step.adapted)
        for number in range(self.config.n_layer):
            behind = self._through(number, x, step)
            if behind is None:
                return None
            x = behind
            moved()
        normed = self._rms(x, weights.norm)
        return normed if output == "hidden" else weights.head(normed.to(self._dtype), step.adapted_rows)

    def _through(self, number: int, x: torch.Tensor, step: _Step) -> torch.Tensor | None:
        """Hidden states [T, E] behind a block; behind the last one those of the wanted rows [R, E], None if there are none."""
        block, last, adapted = self.weights.block(number), number == self.config.n_layer - 1, step.adapted
        attended = self._attention(number, block, x, step, stored_only=last and step.rows is None)
        if attended is None:
            return None
        if last:
            attended, x, adapted = attended[step.rows], x[step.rows], step.adapted_rows
        x = x + block.output(attended, adapted)
        return x + self._feed_forward(block.feed_forward, self._rms(x, block.feed_forward_norm), adapted)

    def _feed_forward(self, through: Dense | Experts, x: torch.Tensor, adapted: Sequence[Run]) -> torch.Tensor:
        """What normalised hidden states [T, E] become."""
        if isinstance(through, Experts):
            return through(x)
        gate, up = through.gate_up(x.to(self._dtype), adapted).chunk(2, dim=-1)
        return through.down((torch.nn.functional.silu(gate) * up).to(self._dtype), adapted)

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x / rms(x) * w over the last dimension, in float32."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.eps) * weight

    def _attention(self, number: int, block: Block, x: torch.Tensor, step: _Step, *, stored_only: bool) -> torch.Tensor | None:
        """Attention of all tokens [T, H * D], each sequence's over its own cells; their keys and values are stored first."""
        h, turn = self.config, step.turn
        qkv = block.qkv(self._rms(x, block.attention_norm).to(self._dtype), step.adapted).view(len(x), -1, h.head_dim)
        q, k, v = qkv[:, : h.n_head], qkv[:, h.n_head : h.n_head + h.n_head_kv], qkv[:, h.n_head + h.n_head_kv :]
        if block.query_norm is not None and block.key_norm is not None:
            q, k = self._rms(q, block.query_norm), self._rms(k, block.key_norm)
        q, k = self.rope.turn(q, turn) * h.attention_scale, self.rope.turn(k, turn)
        first, outputs = 0, []
        for slot in step.slots:
            end = first + slot.tokens
            own = q[first:end]
            slot.cells.put(number, slot.start, k[first:end], v[first:end])
            if slot.cells.ring:
                slot.cells.ring.keep(number, own)
            if not stored_only:
                outputs.append(self._attend(own.to(self._dtype), slot.cells.layers[number], slot.start))
            first = end
        return torch.cat(outputs) if outputs else None

    def _attend(self, q: torch.Tensor, layer: torch.Tensor, start: int) -> torch.Tensor:
        """Queries [t, H, D], scaled, of the tokens in cells from ``start`` on, over the cells up to their own: [t, H * D]."""
        t, (_, heads, _, size) = len(q), layer.shape
        keys, values = layer[:, :, : start + t].to(self._dtype)  # [G, N, D]
        q = q.view(t, heads, -1, size).transpose(0, 1)  # [G, t, H/G, D]
        step = max(1, SCORES // (self.config.n_head * (start + t)))
        parts = [self._some(q[:, a : a + step], keys, values, start + a) for a in range(0, t, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _some(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
        """Queries [G, t, H/G, D], the first of which sees ``start`` cells and its own: [t, H * D]."""
        heads, t, group, size = q.shape
        n = start + t
        scores = (q.reshape(heads, t * group, size) @ keys[:, :n].transpose(1, 2)).float()
        if t > 1:
            hidden = torch.arange(n, device=q.device) > torch.arange(start, n, device=q.device)[:, None]
            scores = scores.view(heads, t, group, n).masked_fill(hidden[:, None], -torch.inf).view(heads, t * group, n)
        attended = scores.softmax(-1).to(self._dtype) @ values[:, :n]
        return attended.view(heads, t, group * size).transpose(0, 1).reshape(t, heads * group * size)
