"""The decoder in torch, named as GGUF names its tensors. In one piece of memory per tensor, so that hooks and parametrisations find them.

The same function as edge_rt/core/graph/decoder.py, for training: no cache, float32, gradients.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_rt_distill.model.architecture import Architecture, LayerShape

LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""A layer's matrices. ``blk.{i}.{name}`` is a site: where statistics are taken and corrections are applied."""
GROUPS = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
"""Matrices that share their input, in the order in which they are computed."""


class Output(NamedTuple):
    """What a forward pass gives. ``hidden`` [B, T, D]: behind the final norm, logits are made of it by ``Decoder.logits``.

    ``states``: by layer the residual stream [B, T, D] at its entry; under L (the number of layers) what leaves the last.
    ``attention``: by layer the probabilities [B, H, T, T].
    """

    hidden: Tensor
    states: dict[int, Tensor]
    attention: dict[int, Tensor]


class Turn(NamedTuple):
    """Rotary embedding: cosines and sines, [T, head/2] or [B, 1, T, head/2]."""

    cos: Tensor
    sin: Tensor


class Cache(NamedTuple):
    """Keys and values [B, KV, capacity, head] of one layer; the first ``length`` cells are filled."""

    keys: Tensor
    values: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(size)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x [.., size] normed over its last dimension."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)


class Layer(nn.Module):
    """One block: attention and SwiGLU feed-forward, each behind a norm."""

    def __init__(self, architecture: Architecture, shape: LayerShape) -> None:
        super().__init__()
        a, q, kv = architecture, shape.heads * architecture.head, shape.kv_heads * architecture.head
        self.shape, self.head, self.rotation = shape, a.head, a.rope
        self.attn_norm, self.ffn_norm = RMSNorm(a.width, a.norm_epsilon), RMSNorm(a.width, a.norm_epsilon)
        self.attn_q = nn.Linear(a.width, q, bias=a.qkv_bias)
        self.attn_k = nn.Linear(a.width, kv, bias=a.qkv_bias)
        self.attn_v = nn.Linear(a.width, kv, bias=a.qkv_bias)
        self.attn_output = nn.Linear(q, a.width, bias=False)
        self.ffn_gate, self.ffn_up = nn.Linear(a.width, shape.ffn, bias=False), nn.Linear(a.width, shape.ffn, bias=False)
        self.ffn_down = nn.Linear(shape.ffn, a.width, bias=False)
        self.attn_q_norm = RMSNorm(a.head, a.norm_epsilon) if a.qk_norm else None
        self.attn_k_norm = RMSNorm(a.head, a.norm_epsilon) if a.qk_norm else None

    def forward(
        self, x: Tensor, turn: Turn, *, mask: Tensor | None = None, head_mask: Tensor | None = None, maps: bool = False,
        cache: Cache | None = None, past: int = 0,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """x [B, T, D] one block further, and the attention [B, H, T, T] if ``maps``.

        ``mask`` [B, 1, T, cells], True where attention may go; None: causal. ``head_mask`` [H] multiplies each head's output.
        ``cache``: keys and values are appended behind ``past`` cells, and all are attended to.
        """
        attended, found = self.attend(self.attn_norm(x), turn, mask=mask, head_mask=head_mask, maps=maps, cache=cache, past=past)
        x = x + self.attn_output(attended)
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h)), found

    def attend(
        self, h: Tensor, turn: Turn, *, mask: Tensor | None, head_mask: Tensor | None, maps: bool, cache: Cache | None, past: int
    ) -> tuple[Tensor, Tensor | None]:
        """What attention gives of normed inputs [B, T, D], before ``attn_output``: [B, T, heads * head]; and the maps if asked for."""
        batch, length, _ = h.shape
        q, k, v = (self._heads(linear(h)) for linear in (self.attn_q, self.attn_k, self.attn_v))
        if self.attn_q_norm is not None and self.attn_k_norm is not None:
            q, k = self.attn_q_norm(q), self.attn_k_norm(k)
        q, k = self._rotate(q, turn), self._rotate(k, turn)
        if cache is not None:
            cache.keys[:, :, past : past + length], cache.values[:, :, past : past + length] = k, v
            k, v = cache.keys[:, :, : past + length], cache.values[:, :, : past + length]
        times = self.shape.heads // self.shape.kv_heads
        if length == 1 and not maps:  # the heads of a group are rows that attend to the same: nothing is copied
            q = q.reshape(batch, -1, times, self.head)
        else:
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        found = None
        if maps:
            found = self._probabilities(q, k, mask)
            out = found.to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and length > 1)
            out = out.reshape(batch, -1, length, self.head)
        if head_mask is not None:
            out = out * head_mask.view(1, -1, 1, 1)
        return out.transpose(1, 2).reshape(batch, length, -1), found

    def _probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        scores: Tensor = (q @ k.transpose(-1, -2)).float() / self.head**0.5
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(scores.shape[-1] - scores.shape[-2])
        return scores.masked_fill(~mask, float("-inf")).softmax(-1)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, n * head] as [B, n, T, head]."""
        return x.view(*x.shape[:-1], -1, self.head).transpose(1, 2)

    def _rotate(self, x: Tensor, turn: Turn) -> Tensor:
        """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of [B, n, T, head]."""
        if self.rotation == "interleaved":
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * turn.cos - b * turn.sin, a * turn.sin + b * turn.cos), -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat((a * turn.cos - b * turn.sin, a * turn.sin + b * turn.cos), -1)


class Decoder(nn.Module):
    """A whole model. Layers that share parameters are one module at several places of ``layers``."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        self.token_embd = nn.Embedding(a.vocabulary, a.width)
        own = {i: Layer(a, a.layers[i]) for i in sorted({a.owner(i) for i in range(len(a.layers))})}
        self.layers = nn.ModuleList(own[a.owner(i)] for i in range(len(a.layers)))
        self.output_norm = RMSNorm(a.width, a.norm_epsilon)
        self.output = None if a.tied else nn.Linear(a.width, a.vocabulary, bias=False)

    def forward(
        self, tokens: Tensor, *, states: Collection[int] = (), attention: Collection[int] = (), head_mask: Tensor | None = None,
        skip: Collection[int] = (),
    ) -> Output:  # fmt: skip
        """Run tokens [B, T] (int64). ``states``, ``attention``: of which layers they are wanted. ``head_mask`` [L, H] multiplies heads.

        ``skip``: layers that are left out.
        """
        return self.run(self.token_embd(tokens), states=states, attention=attention, head_mask=head_mask, skip=skip)

    def run(
        self, x: Tensor, *, states: Collection[int] = (), attention: Collection[int] = (), head_mask: Tensor | None = None,
        skip: Collection[int] = (),
    ) -> Output:  # fmt: skip
        """``forward`` from embeddings [B, T, D] on."""
        turn = self.turn(torch.arange(x.shape[1], device=x.device))
        kept, maps = {}, {}
        for i, layer in enumerate(self.layers):
            if i in states:
                kept[i] = x
            if i in skip:
                continue
            x, found = layer(x, turn, head_mask=None if head_mask is None else head_mask[i], maps=i in attention)
            if found is not None:
                maps[i] = found
        if len(self.layers) in states:
            kept[len(self.layers)] = x
        return Output(self.output_norm(x), kept, maps)

    def turn(self, positions: Tensor) -> Turn:
        """Rotations at some positions [..], as [.., head/2]."""
        a = self.architecture
        frequencies = a.rope_base ** -(torch.arange(0, a.head, 2, device=positions.device, dtype=torch.float32) / a.head)
        if a.rope_factors:
            frequencies = frequencies / torch.tensor(a.rope_factors, device=positions.device)
        angles = positions.float()[..., None] / a.rope_scale * frequencies
        return Turn(angles.cos(), angles.sin())

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: what logits are made with, the embedding where it is tied."""
        return self.token_embd.weight if self.output is None else self.output.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [.., V] of hidden states [.., D] behind the final norm."""
        return F.linear(hidden, self.head_weight)

    def linear(self, site: str) -> nn.Linear:
        """The matrix at a site, ``blk.3.ffn_down``."""
        _, layer, name = site.split(".")
        found = getattr(self.layers[int(layer)], name)
        assert isinstance(found, nn.Linear)
        return found

    def sites(self) -> list[str]:
        """All sites in the order in which they are computed, those of shared layers once."""
        a = self.architecture
        return [f"blk.{i}.{name}" for i in range(len(a.layers)) if a.owner(i) == i for name in LINEARS]
