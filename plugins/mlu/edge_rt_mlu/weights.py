"""The weights of a llama-like model as PyTorch tensors: read from GGUF, dequantised piece by piece, moved to the device.

Matrices are [rows, columns] in the device's type; those with the same input are one (query, key and value; gate and up), so that a
layer is four products. Norms and biases are float32.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from edge_rt.hooks import Hyper, ModelChanged, ModelFileError, UnsupportedModel
from edge_rt_mlu.families import Family

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt.hooks import ModelFile

_PIECE = 16 << 20  # elements that are dequantised at a time: 64 MiB of float32


class Linear(NamedTuple):
    """x W^T + b."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, columns] in the weights' type -> [T, rows] in float32."""
        y = torch.nn.functional.linear(x, self.weight).float()
        return y if self.bias is None else y + self.bias


class Block(NamedTuple):
    """One transformer block. ``query_norm``, ``key_norm``: of each head (qwen3)."""

    attention_norm: torch.Tensor
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    feed_forward_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Weights(NamedTuple):
    """A model. ``head`` shares the embedding's matrix where the file has no other. ``factors``: of rotary frequencies."""

    embedding: torch.Tensor
    blocks: list[Block]
    norm: torch.Tensor
    head: Linear
    factors: npt.NDArray[np.float32] | None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in _tensors(self)}.values())


def _tensors(part: object) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple | list):
        for inner in part:
            yield from _tensors(inner)


def predicted_bytes(file: ModelFile, dtype: torch.dtype) -> int:
    """What the weights of a file take on the device, told from its header."""
    sizes = (math.prod(info.shape) * (4 if len(info.shape) == 1 else dtype.itemsize) for info in file.header.tensors.values())
    return sum(sizes)


class Loader:
    """Reads the tensors of one file, each once, and checks their shapes. ``done`` are told with every piece: bytes of the file."""

    def __init__(self, file: ModelFile, hyper: Hyper, device: torch.device, dtype: torch.dtype, done: Callable[[int], None]) -> None:
        self._file, self._hyper, self._device, self._dtype, self._done = file, hyper, device, dtype, done
        self._unread = set(file.header.tensors)

    def load(self, family: Family) -> Weights:
        """Everything. Raises ModelFileError for what is missing or misshapen, UnsupportedModel for what this model would ignore."""
        h = self._hyper
        factors = self._numbers("rope_freqs.weight", (h.rope.dims // 2,)) if family.factors and self._has("rope_freqs.weight") else None
        embedding = self._matrix((("token_embd.weight", h.n_vocab),), h.n_embd)
        blocks = [self._block(f"blk.{layer}", family) for layer in range(h.n_layer)]
        norm = self._vector("output_norm.weight", h.n_embd)
        bias = self._vector("output.bias", h.n_vocab) if self._has("output.bias") else None
        head = self._matrix((("output.weight", h.n_vocab),), h.n_embd) if self._has("output.weight") else embedding
        if self._unread:
            raise UnsupportedModel(f"the torch engine has no use for the tensor {min(self._unread)}; run it with --engine llama_cpp")
        return Weights(embedding, blocks, norm, Linear(head, bias), factors)

    def _block(self, prefix: str, family: Family) -> Block:
        h = self._hyper
        query, kv = h.n_head * h.head_dim, h.n_head_kv * h.head_dim
        inner = self._rows(f"{prefix}.ffn_gate.weight")
        if self._has(f"{prefix}.attn_qkv.weight"):
            qkv = self._linear(prefix, {"attn_qkv": query + 2 * kv}, h.n_embd)
            if qkv.bias is None:
                qkv = qkv._replace(bias=self._biases(prefix, {"attn_q": query, "attn_k": kv, "attn_v": kv}))
        else:
            qkv = self._linear(prefix, {"attn_q": query, "attn_k": kv, "attn_v": kv}, h.n_embd)
        return Block(
            attention_norm=self._vector(f"{prefix}.attn_norm.weight", h.n_embd),
            qkv=qkv,
            query_norm=self._vector(f"{prefix}.attn_q_norm.weight", h.head_dim) if family.head_norms else None,
            key_norm=self._vector(f"{prefix}.attn_k_norm.weight", h.head_dim) if family.head_norms else None,
            output=self._linear(prefix, {"attn_output": h.n_embd}, query),
            feed_forward_norm=self._vector(f"{prefix}.ffn_norm.weight", h.n_embd),
            gate_up=self._linear(prefix, {"ffn_gate": inner, "ffn_up": inner}, h.n_embd),
            down=self._linear(prefix, {"ffn_down": h.n_embd}, inner),
        )

    def _has(self, name: str) -> bool:
        return name in self._file.header.tensors

    def _rows(self, name: str) -> int:
        """Rows of a matrix as the file has it: pruned models differ from block to block."""
        info = self._file.header.tensors.get(name)
        return info.shape[1] if info is not None and len(info.shape) > 1 else self._hyper.n_ff

    def _linear(self, prefix: str, parts: dict[str, int], columns: int) -> Linear:
        """Layers with the same input as one: names and rows, one below the other."""
        named = tuple((f"{prefix}.{name}.weight", rows) for name, rows in parts.items())
        return Linear(self._matrix(named, columns), self._biases(prefix, parts))

    def _biases(self, prefix: str, parts: dict[str, int]) -> torch.Tensor | None:
        """Biases of layers that are one, zero where only others have one; None if none has."""
        if not any(self._has(f"{prefix}.{name}.bias") for name in parts):
            return None
        each = []
        for name, rows in parts.items():
            bias = f"{prefix}.{name}.bias"
            each.append(self._numbers(bias, (rows,)) if self._has(bias) else np.zeros(rows, np.float32))
        return torch.from_numpy(np.concatenate(each)).to(self._device)

    def _matrix(self, parts: tuple[tuple[str, int], ...], columns: int) -> torch.Tensor:
        """[rows of all parts, columns] in the device's type; one conversion and one transfer."""
        whole = torch.empty((sum(rows for _, rows in parts), columns), dtype=self._dtype)
        start = 0
        for name, rows in parts:
            for piece in self._pieces(name, (columns, rows)):
                end = start + len(piece)
                whole[start:end] = torch.from_numpy(piece)
                if self._dtype is torch.float16 and not whole[start:end].isfinite().all():
                    raise UnsupportedModel(f"the weights of {name} do not fit float16; open the model with torch.dtype = bfloat16")
                start = end
        return whole.to(self._device)

    def _vector(self, name: str, size: int) -> torch.Tensor:
        return torch.from_numpy(self._numbers(name, (size,))).to(self._device)

    def _numbers(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """A vector in float32."""
        (found,) = self._pieces(name, shape)
        return found.reshape(-1)

    def _pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[npt.NDArray[np.float32]]:
        """Rows of a tensor, some at a time: float32 [n, columns]. ``shape``: in ggml's order."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        info = self._file.header.tensors.get(name)
        if info is None:
            raise ModelFileError(f"the model lacks the tensor {name}; the file is incomplete, download it again")
        if tuple(info.shape) != shape and (*info.shape, 1, 1)[:3] != (*shape, 1, 1)[:3]:
            raise ModelFileError(f"the tensor {name} has the shape {info.shape} where {shape} is expected; the file is damaged")
        self._unread.discard(name)
        rows = math.prod(shape) // shape[0]
        row_bytes, step = info.nbytes // rows, max(1, _PIECE // shape[0])
        for row in range(0, rows, step):
            n = min(step, rows - row)
            # Not through the mapping: a file that is cut meanwhile would end the process, not the read.
            data = os.pread(self._file.fd, n * row_bytes, info.offset + row * row_bytes)
            if len(data) < n * row_bytes:
                raise ModelChanged(f"{self._file.path} was changed while it was open; open the model again")
            raw = np.frombuffer(data, np.uint8).reshape(n, row_bytes)
            yield np.array(dequantize(raw, GGMLQuantizationType(info.type)), np.float32)
            self._done(len(data))
