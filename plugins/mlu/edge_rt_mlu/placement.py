"""What of a model lies on a device when a budget limits its weights there; told from the file's header, without PyTorch.

The first blocks stay on the device, as many as fit. Each of the others stays in the host's memory and is copied over when its turn comes,
in every step, into room that one of them takes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.hooks import OptionError

if TYPE_CHECKING:
    from edge_rt.hooks import ModelFile

ROUTER = ".ffn_gate_inp.weight"
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes of an element, by the type's name."""


class Placement(NamedTuple):
    """``blocks``: so many, the first ones, stay on the device. ``nbytes``: what all weights take there at most; ``kept``: what the other
    blocks take in the host's memory.
    """

    blocks: int
    nbytes: int
    kept: int = 0


def place(file: ModelFile, size: int, budget: int | None, *, whole: bool = False) -> Placement:
    """Where the weights of a model go, with ``size`` bytes an element of its matrices. ``whole``: the device has no memory of its own, so
    that nothing would be won by keeping blocks elsewhere.

    Raises OptionError for a budget that is too small.
    """
    blocks, rest = weight_bytes(file, size)
    total = rest + sum(blocks)
    if budget is None or total <= budget:
        return Placement(len(blocks), total)
    if whole:
        raise OptionError(
            f"the weights take {_mb(total)} MB as PyTorch computes with them, more than --memory allows; raise it, or choose --engine ggml,"
            " which streams them"
        )
    for first in range(len(blocks) - 1, -1, -1):
        there = rest + sum(blocks[:first]) + max(blocks[first:])
        if there <= budget:
            return Placement(first, there, sum(blocks[first:]))
    least = rest + max(blocks)
    raise OptionError(f"--memory is less than the {_mb(least)} MB that embedding, head and the largest block take; raise it")


def weight_bytes(file: ModelFile, size: int) -> tuple[list[int], int]:
    """Bytes of each block on a device, and of all beside the blocks. Vectors and routers are float32."""
    blocks: dict[str, int] = {}
    rest = 0
    for name, info in file.header.tensors.items():
        nbytes = math.prod(info.shape) * (4 if len(info.shape) == 1 or name.endswith(ROUTER) else size)
        if name.startswith("blk."):
            block = ".".join(name.split(".", 2)[:2])
            blocks[block] = blocks.get(block, 0) + nbytes
        else:
            rest += nbytes
    return [blocks[name] for name in sorted(blocks, key=lambda name: int(name[4:]))], rest


def _mb(nbytes: int) -> int:
    """Megabytes, rounded up: what is said to be enough is."""
    return -(-nbytes // 1_000_000)
