"""What the largest steps take beside the caches: found by building their graphs, which are thrown away before anything runs.

As llama.cpp reserves its compute buffer (llama_context::graph_reserve), but without keeping it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from edge_rt.core.graph.attention import ALL, FLASH_FROM, TILES_FROM, Traits
from edge_rt.core.graph.common import KvView, SlotShape, Weights
from edge_rt.core.graph.hyper import Hyper
from edge_rt.core.graph.lora import Applied
from edge_rt.core.graph.step import StepGraph, description_bytes
from edge_rt.native import ggml

MARGIN = 8
"""One part in so many is added to the compute buffer, for shapes between those that are built."""


class Largest(NamedTuple):
    """Bytes of the compute buffer, and of one graph with its inputs."""

    arena: int
    graph: int


def largest(
    hyper: Hyper, weights: Weights, split: bool, cache: KvView, tokens: int, parts: int, rows: int, adapters: Iterable[Applied] = (),
    *, traits: Traits = ALL,
) -> Largest:
    """Of steps with so many ``tokens`` at most in so many ``parts``, each over a cache like this one, that want ``rows`` of logits.

    One long prompt alone, the longest piece of one that goes through attention as matmuls (which hold all scores; those of a stack are
    fewer), one prompt beside others that decode, and prompts that share a step. The largest descriptions are those of short
    parts, whose tokens go through attention one by one. ``adapters``: what sequences may go through. All of it in the host's memory.
    Raises OutOfMemory.
    """
    cells, first = cache.capacity, tokens - parts + 1
    shapes = [[SlotShape(n, cells, min(n, rows))] for n in {tokens, min(tokens, TILES_FROM - 1)}]
    if parts > 1 and first > 0:
        shared = max(1, tokens // parts)
        shapes.append([*[SlotShape(1, cells, 1)] * (parts - 1), SlotShape(first, cells, max(1, min(first, rows - parts + 1)))])
        shapes.append([SlotShape(shared, cells, max(1, min(shared, rows // parts)))] * parts)
    through = [None, *adapters]
    arena = inputs = 0
    for shape in ([one._replace(adapter=adapter, traits=traits) for one in shape] for shape in shapes for adapter in through):
        with ggml.allocator() as allocator:
            built = StepGraph(hyper, weights, shape, [cache] * len(shape), allocator, split)
            arena = max(arena, int(ggml.c.gallocr_get_buffer_size(allocator.address, 0)))
            inputs = max(inputs, built.input_bytes)
            built.close()
    shapes.append([SlotShape(min(tokens, FLASH_FROM - 1), cells, 1)] * parts)
    shapes += [[one._replace(adapter=through[-1]) for one in shape] for shape in shapes]
    return Largest(arena + arena // MARGIN, inputs + max(description_bytes(hyper, weights, shape, split) for shape in shapes))
