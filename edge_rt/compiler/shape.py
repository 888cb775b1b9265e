"""What a model asks of a machine, read from its header: bytes by unit, products, operations and nodes of a step, bytes of a cell.

An operation is a multiplication or an addition. Shapes are in ggml's order: a weight [inputs, outputs].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.gguf.reader import GGML_TYPES
from edge_rt.core.graph.config import TOGETHER, ModelConfig, read_config
from edge_rt.core.weights.units import unit_name

if TYPE_CHECKING:
    from edge_rt.core.gguf.reader import Header, TensorInfo

_BLOCKS = {name: (block, nbytes) for name, block, nbytes in GGML_TYPES.values()}
LEAST = 32
"""Bytes that tensors of a file are aligned to at least."""


class Product(NamedTuple):
    """A matrix that hidden states are multiplied with: [inputs, outputs].

    ``share``: the part of it that one token uses, less than 1 for experts. ``tokens``: whether all tokens of a prompt need it, or only
    those whose logits are wanted (the head, and what follows attention in the last block).
    """

    unit: str
    name: str
    type: str
    inputs: int
    outputs: int
    nbytes: int
    share: float = 1.0
    tokens: bool = True

    @property
    def operations(self) -> float:
        """For each token."""
        return 2.0 * self.inputs * self.outputs * self.share


class ModelShape(NamedTuple):
    """A model as a cost model sees it.

    ``units``: bytes in the order of the forward pass; a tied embedding counts as the head, which reads it whole. ``products``: in that
    order too. ``types``: bytes by ggml type name. ``folded``: norms of hidden states that are not multiplied with.
    """

    hyper: ModelConfig
    units: Mapping[str, int]
    products: tuple[Product, ...]
    types: Mapping[str, int]
    folded: int = 0

    @property
    def weights(self) -> int:
        """Bytes of all units."""
        return sum(self.units.values())

    @property
    def parameters(self) -> int:
        """Elements that a token is multiplied with, experts by their share."""
        return round(sum(product.operations for product in self.products) / 2)

    @property
    def streamed(self) -> float:
        """Bytes of weights that decoding one token reads."""
        return sum(product.nbytes * product.share for product in self.products)

    @property
    def nodes(self) -> int:
        """Nodes of a decoding step's graph that compute something and are no products with weights: norms (2), their factors (2, but for
        those folded), rotation, writing keys and values (2), attention (3), the gate, and adding to the hidden states (2) in each block.
        """
        return self.hyper.n_layer * 13 + 3 - self.folded

    def cell_bytes(self, key_type: str = "f16") -> int:
        """Bytes of one token's keys and values in all layers; values are always f16."""
        block, nbytes = _BLOCKS[key_type.upper()]
        return self.hyper.n_layer * (self.hyper.kv_width * 2 + self.hyper.kv_width // block * nbytes)

    def attention_operations(self, tokens: int, cells: int) -> float:
        """In all layers, of so many tokens that each see so many cells: products with keys, and with values."""
        return 4.0 * tokens * cells * self.hyper.n_head * self.hyper.head_dim * self.hyper.n_layer

    def elements(self, tokens: int) -> float:
        """Elements that norms, rotation, the gate and additions read in all layers."""
        h = self.hyper
        active = h.n_ff * max(1, h.n_expert_used)
        each = h.n_layer * (6 * h.n_embd + 2 * (h.n_head + h.n_head_kv) * h.head_dim + 3 * active)
        return float(tokens * (each - self.folded * h.n_embd))


def read_shape(
    header: Header,
    types: Mapping[str, str] | None = None,
    packed: Collection[str] | None = None,
    *,
    joined: Collection[str] | None = None,
    folded: Collection[str] = (),
) -> ModelShape:
    """The shape of a model, with ``types`` of tensors in place of the file's own, and without the scales of norms that are ``folded``.

    What shares its input is one product if its types are ``packed`` (None: any), or if it lies side by side in the file. With ``joined``,
    names of TOGETHER joined by "|", it is if it is one of these and can be laid side by side. Raises ModelFileError, UnsupportedModel.
    """
    hyper = read_config(header)
    tensors = {name: _typed(info, (types or {}).get(name, info.type_name)) for name, info in header.tensors.items()}
    tied = "output.weight" not in tensors
    units: dict[str, int] = {}
    by_type: dict[str, int] = {}
    order = ["embedding", *(f"blk.{i}" for i in range(hyper.n_layer)), "norm", "head"]
    placed = [("head" if tied and unit_name(name) == "embedding" else unit_name(name), info) for name, info in tensors.items()]
    for unit, info in sorted(placed, key=lambda one: order.index(one[0]) if one[0] in order else len(order)):
        units[unit] = units.get(unit, 0) + info.nbytes
        by_type[info.type_name] = by_type.get(info.type_name, 0) + info.nbytes
    by_type = dict(sorted(by_type.items(), key=lambda one: -one[1]))

    def one(names: Sequence[str], infos: Sequence[TensorInfo]) -> bool:
        if len({info.type_name for info in infos}) > 1 or (joined is not None and "|".join(names) not in joined):
            return False
        if packed is None or infos[0].type_name in packed:
            return True
        if joined is not None:
            return all(info.nbytes % LEAST == 0 for info in infos[:-1])
        return all(a.offset + a.nbytes == b.offset for a, b in pairwise(infos))

    scales = sum(not name.endswith(("attn_q_norm.weight", "attn_k_norm.weight")) for name in folded)
    return ModelShape(hyper, units, tuple(_products(hyper, tensors, one)), by_type, scales)


def tensor_bytes(shape: Sequence[int], type_name: str) -> int:
    """Bytes of a tensor in a type; rows that are no multiple of its block count as if they were filled."""
    block, nbytes = _BLOCKS[type_name]
    return -(-shape[0] // block) * nbytes * prod(shape[1:])


def _typed(info: TensorInfo, type_name: str) -> TensorInfo:
    return info if type_name == info.type_name else info._replace(type_name=type_name, nbytes=tensor_bytes(info.shape, type_name))


_One = Callable[[Sequence[str], "Sequence[TensorInfo]"], bool]
"""Whether products of these names and weights are one."""


def _products(hyper: ModelConfig, tensors: Mapping[str, TensorInfo], one: _One) -> Iterable[Product]:
    for layer in range(hyper.n_layer):
        prefix = f"blk.{layer}."
        own = {
            name.removeprefix(prefix).removesuffix(".weight"): info
            for name, info in tensors.items()
            if name.startswith(prefix) and name.endswith(".weight") and len(info.shape) > 1
        }
        last = layer == hyper.n_layer - 1
        for name, infos in _together(own, one):
            yield _product(hyper, f"blk.{layer}", name, infos, tokens=not (last and name.startswith(("attn_output", "ffn"))))
    head = tensors.get("output.weight") or tensors["token_embd.weight"]
    yield _product(hyper, "head", "output", [head], tokens=False)


def _together(own: Mapping[str, TensorInfo], one: _One) -> Iterable[tuple[str, list[TensorInfo]]]:
    """The products of a block in the order in which they are computed, those that are ``one`` as one."""
    left = {name: [info] for name, info in own.items()}
    for names in TOGETHER:
        found = [own[name] for name in names if name in own]
        if len(found) == len(names) and one(names, found):
            for name in names:
                del left[name]
            left["|".join(names)] = found
    order = ("attn_qkv", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name in sorted(left, key=lambda one: next((i for i, start in enumerate(order) if one.startswith(start)), len(order))):
        yield name, left[name]


def _product(hyper: ModelConfig, unit: str, name: str, infos: Sequence[TensorInfo], *, tokens: bool) -> Product:
    experts = len(infos[0].shape) == 3
    outputs = sum(prod(info.shape[1:]) for info in infos)
    share = hyper.n_expert_used / hyper.n_expert if experts and hyper.n_expert else 1.0
    return Product(unit, name, infos[0].type_name, infos[0].shape[0], outputs, sum(info.nbytes for info in infos), share, tokens)
