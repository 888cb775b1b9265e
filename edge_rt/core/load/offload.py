"""Which units of a model go to an accelerator: the head and the last blocks before it, as many as its memory holds.

The last ones, because then a step crosses over once: hidden states go there and logits come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A device of another ggml backend, and how many bytes of its memory the engine may take: weights, caches and compute buffers.

    ``backend``: the name of its registry in ggml: ``CUDA``, ``CANN``, ``Vulkan``. ``index``: its number there. ``id``: how the backend
    names it for good, for PCI devices by address (``0000:c1:00.0``); where given it decides, as numbers differ from tool to tool.
    """

    backend: str
    memory: int
    index: int = 0
    id: str = ""


class Placement(NamedTuple):
    """Blocks from ``first`` on and the head go to the device, where they take ``size`` bytes with their caches and compute buffers."""

    first: int
    size: int


class Sizes(NamedTuple):
    """Bytes that a model takes on a device: weights of each block; ``head``: those behind the blocks; ``cache``: of one block's
    keys and values; ``compute``: the compute buffer with inputs, however many blocks there are.
    """

    blocks: Sequence[int]
    head: int
    cache: int
    compute: int


def place(sizes: Sizes, memory: int) -> Placement | None:
    """As many of the last blocks as fit ``memory`` bytes behind the head; None where not even the head does."""
    total = sizes.head + sizes.compute
    if total > memory:
        return None
    first = len(sizes.blocks)
    while first and total + sizes.blocks[first - 1] + sizes.cache <= memory:
        first -= 1
        total += sizes.blocks[first] + sizes.cache
    return Placement(first, total)
