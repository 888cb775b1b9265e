"""What a model takes: parameters, bytes of the exported file, time to decode a token. Projected from sizes, never measured here.

Decoding one token at a time is bound by memory: every weight is read once, and each layer has its fixed work (Williams, Waterman and
Patterson 2009, "Roofline"). So a time is counted in bytes, and fixed work as the bytes that could be read meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_rt.hooks import OptionError
from edge_rt_distill.model.architecture import Architecture, LayerShape
from edge_rt_distill.surgery.cut import Cost


@dataclass(frozen=True)
class CostModel:
    """How weights are stored, and what takes time beside reading them.

    ``linear_bits``: of a layer's matrices, 4.5 is Q4_0 (18 bytes for 32). ``embedding_bits``: of the token embedding and the output
    matrix, ``norm_bits``: of norms and biases. ``layer_overhead``: bytes that could be read while a layer does its fixed work; 150 kB
    is 15 microseconds at 10 GB/s, and is an assumption. ``context``: cells that each token attends to, of ``cell_bits`` a number.
    """

    linear_bits: float = 4.5
    embedding_bits: float = 16.0
    norm_bits: float = 32.0
    layer_overhead: float = 150e3
    context: int = 256
    cell_bits: float = 16.0

    def __post_init__(self) -> None:
        for name in ("linear_bits", "embedding_bits", "norm_bits", "cell_bits"):
            if not 0 < getattr(self, name) <= 64:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 64")
        if self.layer_overhead < 0 or self.context < 0:
            raise OptionError("layer_overhead and context cannot be below 0; leave them out for the usual ones")


def cost_of(architecture: Architecture, model: CostModel = CostModel()) -> Cost:
    """The cost of a model. Layers that share parameters stand in a GGUF once each, and are read once each: only parameters shrink."""
    a = architecture
    layers = range(len(a.layers))
    parts = [layer_cost(a, a.layers[a.owner(i)], model) for i in layers]
    outer = outer_cost(a, model)
    return Cost(
        a.parameters(), round(outer.bytes + sum(part.bytes for part in parts)), outer.time + sum(part.time for part in parts)
    )  # fmt: skip


def layer_cost(architecture: Architecture, shape: LayerShape, model: CostModel, width: int | None = None) -> Cost:
    """The cost of one layer of a shape, with the model's width or another."""
    a, width = architecture, width or architecture.width
    q, kv = shape.heads * a.head, shape.kv_heads * a.head
    linear = width * (2 * q + 2 * kv + 3 * shape.ffn)
    small = 2 * width + (q + 2 * kv if a.qkv_bias else 0) + (2 * a.head if a.qk_norm else 0)
    read = (linear * model.linear_bits + small * model.norm_bits) / 8
    cells = 2 * kv * model.context * model.cell_bits / 8
    return Cost(linear + small, round(read), read + cells + model.layer_overhead)


def outer_cost(architecture: Architecture, model: CostModel, width: int | None = None) -> Cost:
    """The cost of everything but the layers. A token reads one row of the embedding, and all of the matrix that makes logits."""
    a, width = architecture, width or architecture.width
    table = a.vocabulary * width * model.embedding_bits / 8
    norm = width * model.norm_bits / 8
    row = width * model.embedding_bits / 8
    tables = 1 if a.tied else 2
    return Cost(tables * a.vocabulary * width + width, round(tables * table + norm), table + norm + row)
