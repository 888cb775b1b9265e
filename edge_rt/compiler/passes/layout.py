"""Where weights lie: in the order in which a step touches them, aligned, and packed where the target has kernels for that."""

from __future__ import annotations

from collections.abc import Collection

from edge_rt.compiler.plan import Situation, gained
from edge_rt.compiler.shape import LEAST
from edge_rt.core.weights.units import unit_name
from edge_rt.deployment import Pass, Plan

PAGE = 4096
_BLOCK = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_norm", "attn_k_norm", "attn_output", "ffn_norm", "ffn_gate_inp",
    "ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_up_exps", "ffn_down", "ffn_down_exps",
)  # fmt: skip
"""Parts of a block as the graph touches them: what shares its input side by side."""


def first_touch(names: Collection[str]) -> tuple[str, ...]:
    """Tensors in the order in which a forward pass touches them: embedding, blocks, norm, head; weights before their biases."""

    def key(name: str) -> tuple[int, int, bool, int, str]:
        unit, _, part = unit_name(name), *name.rpartition(".")[::2]
        where = {"embedding": 0, "norm": 2, "head": 3}.get(unit, 1)
        number = int(unit.removeprefix("blk.")) if where == 1 and unit.removeprefix("blk.").isdecimal() else 0
        kind = name.split(".")[2] if where == 1 and name.count(".") >= 3 else ""
        # A norm between weights that are one product would part them: biases and norms of a block's parts come behind its weights.
        return where, number, part == "bias", _BLOCK.index(kind) if kind in _BLOCK else len(_BLOCK), name

    return tuple(sorted(names, key=key))


def apply(plan: Plan, situation: Situation) -> Plan:
    """Order and alignment of the file, and whether there are packed weights.

    Packed weights lie in a file of their own. Each tensor of the GGUF begins a page, unless that would part what is to be one product.
    """
    shape = situation.shape(plan)
    packed = [name for name in shape.types if name in situation.target.packed]
    beside = any("|" in product.name and product.type not in situation.target.packed for product in shape.products)
    after = plan._replace(order=first_touch(situation.header.tensors), alignment=LEAST if beside else PAGE, pack=bool(packed))
    what = f"{len(after.order)} tensors in the order of first touch, "
    what += f"packed: {', '.join(packed)}" if packed else "none packed, as the target has no kernels for these types"
    return gained(plan, after, situation, "layout", what)


PASS = Pass("layout", "order by first touch, alignment, packed weights", apply)
