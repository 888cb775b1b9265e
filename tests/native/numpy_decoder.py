"""A llama-like decoder in NumPy, with the corrections of a compensation: what the formulas say, in double precision and plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gguf
import numpy as np

from edge_rt.core.gguf.model_file import ModelFile


def tensors(path: Any) -> dict[str, Any]:
    """All tensors of a file as float64, in NumPy's order of dimensions."""
    with ModelFile.open(path) as file:
        found = {}
        for name, info in file.header.tensors.items():
            kind = gguf.GGMLQuantizationType(info.type)
            raw = np.frombuffer(file.map[info.offset : info.offset + info.nbytes], np.uint8)
            raw = raw.view(np.float32) if info.type_name == "F32" else raw.reshape(info.shape[-1] if len(info.shape) > 1 else 1, -1)
            values = raw if info.type_name == "F32" else gguf.quants.dequantize(raw, kind)
            found[name] = values.reshape(info.shape[::-1]).astype(np.float64)
        return found


class NumpyDecoder:
    """A random model of architecture llama, of the measures that ``write_random_model`` has by default; ``side``: its compensation."""

    def __init__(self, path: Any, side: Any = None, *, n_head: int = 4, n_head_kv: int = 2, n_layer: int = 2) -> None:
        self.model, self.side = tensors(path), tensors(side) if side else {}
        self.n_head, self.n_head_kv, self.n_layer = n_head, n_head_kv, n_layer

    def logits(self, tokens: Sequence[int]) -> Any:
        """After every token: [T, V]."""
        x = self.model["token_embd.weight"][list(tokens)]
        for layer in range(self.n_layer):
            p = f"blk.{layer}"
            normed = self._norm(x, f"{p}.attn_norm.weight")
            q, k, v = (self._linear(normed, f"{p}.attn_{part}") for part in "qkv")
            x = x + self._linear(self._attention(q, k, v), f"{p}.attn_output")
            normed = self._norm(x, f"{p}.ffn_norm.weight")
            gate, up = self._linear(normed, f"{p}.ffn_gate"), self._linear(normed, f"{p}.ffn_up")
            x = x + self._linear(gate / (1 + np.exp(-gate)) * up, f"{p}.ffn_down")
        return self._norm(x, "output_norm.weight") @ self.model["token_embd.weight"].T

    def _norm(self, x: Any, name: str) -> Any:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * self.model[name]

    def _linear(self, x: Any, name: str) -> Any:
        y, side = x @ self.model[f"{name}.weight"].T, self.side
        if f"{name}.low_a" in side:
            y = y + x @ side[f"{name}.low_a"].T @ side[f"{name}.low_b"].T
        if f"{name}.centroids" in side:
            scores = x @ side[f"{name}.centroids"].T + side.get(f"{name}.offsets", 0.0)
            y = y + side[f"{name}.rows"][scores.argmax(axis=-1)]
        return y + self.model.get(f"{name}.bias", 0.0) + side.get(f"{name}.bias", 0.0)

    def _attention(self, q: Any, k: Any, v: Any) -> Any:
        count, size = len(q), q.shape[1] // self.n_head
        q, k, v = (self._by_head(part, size) for part in (q, k, v))
        q, k = self._rotated(q), self._rotated(k)
        out = np.empty((count, self.n_head, size))
        unseen = np.triu(np.full((count, count), -np.inf), 1)
        for head in range(self.n_head):
            own = head // (self.n_head // self.n_head_kv)
            scores = q[:, head] @ k[:, own].T / np.sqrt(size) + unseen
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[:, own]
        return out.reshape(count, -1)

    def _by_head(self, x: Any, size: int) -> Any:
        return x.reshape(len(x), -1, size)

    def _rotated(self, x: Any) -> Any:
        """Pairs of neighbours, by their positions."""
        size = x.shape[-1]
        angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = np.empty_like(x)
        turned[..., 0::2], turned[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
        return turned
