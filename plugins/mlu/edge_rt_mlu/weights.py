"""The weights of a llama-like model as PyTorch tensors: read from GGUF, dequantised piece by piece, moved to the device.

Matrices are [rows, columns] in the device's type; those with the same input are one (query, key and value; gate and up), so that a
layer is four products. Norms, biases and the routers of experts are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch

from edge_rt.hooks import ModelConfig, UnsupportedModel
from edge_rt_mlu.experts import Experts
from edge_rt_mlu.families import Family
from edge_rt_mlu.lora import EMBEDDING, Run, add_terms
from edge_rt_mlu.tensors import Reader

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt.hooks import ModelFile

T = TypeVar("T")


class Linear(NamedTuple):
    """x W^T + b. ``parts``: names of the weights that are one below the other in it, and the first row of each."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    parts: tuple[tuple[str, int], ...]

    def __call__(self, x: torch.Tensor, runs: Sequence[Run] = ()) -> torch.Tensor:
        """x [T, columns] in the weights' type -> [T, rows] in float32, with what adapters add to the rows of ``runs``."""
        y = torch.nn.functional.linear(x, self.weight).float()
        if self.bias is not None:
            y += self.bias
        add_terms(y, x, runs, self.parts)
        return y


class Dense(NamedTuple):
    """A feed-forward network: down(silu(gate x) * up x)."""

    gate_up: Linear
    down: Linear

    @property
    def inner(self) -> int:
        """Its width."""
        return int(self.down.weight.shape[1])


class Block(NamedTuple):
    """One transformer block. ``query_norm``, ``key_norm``: of each head (qwen3)."""

    attention_norm: torch.Tensor
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    feed_forward_norm: torch.Tensor
    feed_forward: Dense | Experts


class Weights(NamedTuple):
    """A model. ``head`` shares the embedding's matrix where the file has no other. ``factors``: of rotary frequencies.

    Of ``blocks`` the first ``there`` are on the device, the others in the host's memory.
    """

    embedding: torch.Tensor
    blocks: list[Block]
    norm: torch.Tensor
    head: Linear
    factors: npt.NDArray[np.float32] | None
    there: int

    @property
    def nbytes(self) -> int:
        """Bytes on the device, with the room that a block takes while it is there for its turn."""
        return _nbytes(self._replace(blocks=self.blocks[: self.there])) + max(map(_nbytes, self.blocks[self.there :]), default=0)

    @property
    def kept(self) -> int:
        """Bytes of the blocks in the host's memory."""
        return _nbytes(self.blocks[self.there :])

    @property
    def inner(self) -> int:
        """The largest width of a feed-forward network."""
        return max(block.feed_forward.inner for block in self.blocks)

    def changeable(self) -> set[str]:
        """Names of the weights that an adapter can change."""
        linears = [self.head, *(linear for block in self.blocks for linear in (block.qkv, block.output))]
        for block in self.blocks:
            if isinstance(block.feed_forward, Dense):
                linears += block.feed_forward
        return {EMBEDDING, *(name for linear in linears for name, _ in linear.parts)}

    def block(self, number: int) -> Block:
        """A block on the device: of one in the host's memory a copy, which is gone when the caller lets go of it."""
        stored = self.blocks[number]
        return stored if number < self.there else copied(stored, self.embedding.device)


def copied(part: T, device: torch.device) -> T:
    """A copy of all tensors in named tuples and tuples on a device."""
    if isinstance(part, torch.Tensor):
        return cast(T, part.to(device, copy=True))
    if isinstance(part, tuple):
        values, kind = [copied(inner, device) for inner in part], cast(Any, type(part))
        return cast(T, kind(*values) if hasattr(part, "_fields") else kind(values))
    return part


def _nbytes(part: object) -> int:
    """Bytes of all tensors, each counted once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in _tensors(part)}.values())


def _tensors(part: object) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple | list):
        for inner in part:
            yield from _tensors(inner)


class Loader:
    """Reads the tensors of one file, each once, and checks their shapes. ``done`` is told with every piece: bytes of the file."""

    def __init__(self, file: ModelFile, config: ModelConfig, device: torch.device, dtype: torch.dtype, done: Callable[[int], None]) -> None:
        self._config, self._device, self._dtype = config, device, dtype
        self._reader = Reader(file, done)

    def load(self, family: Family, there: int) -> Weights:
        """Everything, the first ``there`` blocks onto the device.

        Raises ModelFileError for what is missing or misshapen, UnsupportedModel for what this model would ignore.
        """
        h, has = self._config, self._reader.has
        factors = None
        if family.factors and has("rope_freqs.weight"):
            factors = self._reader.numbers("rope_freqs.weight", (h.rope.dims // 2,))
        embedding = self._matrix({EMBEDDING: h.n_vocab}, h.n_embd)
        device, blocks = self._device, []
        for layer in range(h.n_layer):
            self._device = device if layer < there else torch.device("cpu")
            blocks.append(self._block(f"blk.{layer}", family))
        self._device = device
        norm = self._vector("output_norm.weight", h.n_embd)
        bias = self._vector("output.bias", h.n_vocab) if has("output.bias") else None
        own = has("output.weight")
        head = self._matrix({"output.weight": h.n_vocab}, h.n_embd) if own else embedding
        if unread := self._reader.unread:
            raise UnsupportedModel(f"the torch engine has no use for the tensor {min(unread)}; run it with --engine llama_cpp")
        return Weights(embedding, blocks, norm, Linear(head, bias, (("output.weight", 0),) if own else ()), factors, there)

    def _block(self, prefix: str, family: Family) -> Block:
        h = self._config
        query, kv = h.n_head * h.head_dim, h.n_head_kv * h.head_dim
        if self._reader.has(f"{prefix}.attn_qkv.weight"):
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
            feed_forward=self._experts(prefix) if h.n_expert else self._dense(prefix),
        )

    def _dense(self, prefix: str) -> Dense:
        h = self._config
        inner = self._reader.rows(f"{prefix}.ffn_gate.weight", h.n_ff)
        gate_up = self._linear(prefix, {"ffn_gate": inner, "ffn_up": inner}, h.n_embd)
        return Dense(gate_up, self._linear(prefix, {"ffn_down": h.n_embd}, inner))

    def _experts(self, prefix: str) -> Experts:
        h, n = self._config, self._config.n_expert
        inner = self._reader.rows(f"{prefix}.ffn_gate_exps.weight", h.n_ff)
        router = torch.empty((n, h.n_embd))
        self._reader.fill(router, f"{prefix}.ffn_gate_inp.weight", (h.n_embd, n))
        gate_up = torch.empty((n, 2 * inner, h.n_embd), dtype=self._dtype)
        down = torch.empty((n, h.n_embd, inner), dtype=self._dtype)
        for i in range(n):
            self._reader.fill(gate_up[i, :inner], f"{prefix}.ffn_gate_exps.weight", (h.n_embd, inner, n), i * inner)
            self._reader.fill(gate_up[i, inner:], f"{prefix}.ffn_up_exps.weight", (h.n_embd, inner, n), i * inner)
            self._reader.fill(down[i], f"{prefix}.ffn_down_exps.weight", (inner, h.n_embd, n), i * h.n_embd)
        return Experts(router.to(self._device), gate_up.to(self._device), down.to(self._device), h.n_expert_used)

    def _linear(self, prefix: str, parts: dict[str, int], columns: int) -> Linear:
        """Layers with the same input as one: names and rows, one below the other."""
        named = {f"{prefix}.{name}.weight": rows for name, rows in parts.items()}
        starts = np.cumsum([0, *named.values()]).tolist()
        return Linear(self._matrix(named, columns), self._biases(prefix, parts), tuple(zip(named, starts, strict=False)))

    def _biases(self, prefix: str, parts: dict[str, int]) -> torch.Tensor | None:
        """Biases of layers that are one, zero where only others have one; None if none has."""
        names = {f"{prefix}.{name}.bias": rows for name, rows in parts.items()}
        if not any(map(self._reader.has, names)):
            return None
        each = [self._reader.numbers(name, (n,)) if self._reader.has(name) else np.zeros(n, np.float32) for name, n in names.items()]
        return torch.from_numpy(np.concatenate(each)).to(self._device)

    def _matrix(self, parts: dict[str, int], columns: int) -> torch.Tensor:
        """[rows of all parts, columns] in the device's type, one below the other; one transfer."""
        whole = torch.empty((sum(parts.values()), columns), dtype=self._dtype)
        start = 0
        for name, rows in parts.items():
            self._reader.fill(whole[start : start + rows], name, (columns, rows))
            start += rows
        return whole.to(self._device)

    def _vector(self, name: str, size: int) -> torch.Tensor:
        return torch.from_numpy(self._reader.numbers(name, (size,))).to(self._device)
