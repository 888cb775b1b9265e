"""Probed once per build and CPU, then kept: batch invariance of products, the layout of cached values, sizes of compute buffers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.config import Remembered, cache_dir
from edge_rt.core.graph import layers
from edge_rt.core.graph.builder import (
    FLASH_FROM,
    FULL_SUPPORT,
    TILES_FROM,
    AttentionSupport,
    GraphBuilder,
    Inputs,
    KVView,
    SlotInputs,
    SlotShape,
    Weights,
)
from edge_rt.core.graph.config import ModelConfig
from edge_rt.core.graph.step import StepGraph, description_bytes
from edge_rt.core.kv.cache import KVCache
from edge_rt.core.kv.ops import run_graph_once
from edge_rt.core.weights.lora import AppliedLora
from edge_rt.core.weights.repack import BLOCK, OFFSETS_SUFFIX
from edge_rt.native import ggml

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Which products give the same bits for several columns together as for each alone?
#
# Kernels may add up in another order when they work on several columns. The order does not depend on the data, so one look at each
# kind of weight decides; and it is looked at in the product itself, because the rounding of later steps would hide most differences.

c = ggml.c


def distinct_kinds(tensors: Iterable[int]) -> list[int]:
    """One matrix of every kind: element type, kernel and shape."""
    kinds: dict[tuple[int, int, tuple[int, ...]], int] = {}
    for tensor in tensors:
        fields = ggml.fields(tensor)
        shape = tuple(fields.ne)
        if shape[1] > 1:
            kinds.setdefault((fields.type, fields.extra or 0, shape), tensor)
    return list(kinds.values())


def probe_batch_invariance(matrices: Iterable[int], backend: ggml.Handle, most: int) -> int:
    """The largest n <= ``most`` such that every product with 2 to n columns equals those with one, bit for bit."""
    build = "|".join((c.version().decode(), c.commit().decode(), *ggml.ggml_features()))
    known = Remembered(cache_dir() / "exact-columns.json", build)
    limit = most
    for matrix in matrices:
        fields = ggml.fields(matrix)
        layout = c.backend_buffer_name(fields.buffer).decode() if fields.extra else "offsets" if _are_offsets(matrix) else "plain"
        kind = f"{fields.type} {layout} {list(fields.ne)} {most}"
        found = known.get(kind)
        if found is None:  # a probe takes up to a second
            found = _exact_columns(matrix, backend, most)
            known.put(kind, found)
        limit = min(limit, int(found))
    return limit


def _exact_columns(matrix: int, backend: ggml.Handle, most: int) -> int:
    """The same for one matrix, by trying."""
    import numpy as np

    width = int(ggml.fields(matrix).ne[0]) * (BLOCK if _are_offsets(matrix) else 1)
    data = np.random.default_rng(0).standard_normal((most, width)).astype(np.float32)
    singles = [_product(matrix, column[None], backend)[0] for column in data]
    for n in range(2, most + 1):
        together = _product(matrix, data[:n], backend)
        if any(not np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in zip(together, singles, strict=False)):
            return n - 1
    return most


def _product(matrix: int, columns: npt.NDArray[np.float32], backend: ggml.Handle) -> npt.NDArray[np.float32]:
    """float32 [n, rows] from float32 [n, width]."""
    n, width = columns.shape
    with ggml.context(2) as inputs, ggml.allocator() as arena:
        x = c.new_tensor_2d(inputs.address, ggml.TYPE_F32, width, n)
        with ggml.allocate_context(inputs):
            ggml.view(x, "f4", (n, width))[:] = columns
            shape = (n, int(ggml.fields(matrix).ne[1]))
            multiply = layers.offsets_product if _are_offsets(matrix) else c.mul_mat
            product: npt.NDArray[np.float32] = run_graph_once(lambda ctx: int(multiply(ctx, matrix, x)), shape, backend, arena).copy()
            return product


def _are_offsets(matrix: int) -> bool:
    """Whether a matrix is multiplied with sums, by its name."""
    return bool(ggml.fields(matrix).name.endswith(OFFSETS_SUFFIX.encode()))


# What the largest steps take beside the caches: found by building their graphs, which are thrown away before anything runs.
#
# As llama.cpp reserves its compute buffer (llama_context::graph_reserve), but without keeping it.

MARGIN = 8
"""One part in so many is added to the compute buffer, for shapes between those that are built."""


class ComputeBuffers(NamedTuple):
    """Bytes of the compute buffer, and of one graph with its inputs."""

    arena: int
    graph: int


def estimate_compute_buffer(
    config: ModelConfig,
    weights: Weights,
    split: bool,
    cache: KVView,
    tokens: int,
    batches: int,
    rows: int,
    adapters: Iterable[AppliedLora] = (),
    *,
    traits: AttentionSupport = FULL_SUPPORT,
) -> ComputeBuffers:
    """Of steps with so many ``tokens`` at most in so many ``batches``, each over a cache like this one, that want ``rows`` of logits.

    One long prompt alone, the longest piece of one that goes through attention as matmuls (which hold all scores; those of a stack are
    fewer), one prompt beside others that decode, and prompts that share a step. The largest descriptions are those of short
    batches, whose tokens go through attention one by one. ``adapters``: what sequences may go through. All of it in the host's memory.
    Raises OutOfMemory.
    """
    cells, first = cache.capacity, tokens - batches + 1
    shapes = [[SlotShape(n, cells, min(n, rows))] for n in {tokens, min(tokens, TILES_FROM - 1)}]
    if batches > 1 and first > 0:
        shared = max(1, tokens // batches)
        shapes.append([*[SlotShape(1, cells, 1)] * (batches - 1), SlotShape(first, cells, max(1, min(first, rows - batches + 1)))])
        shapes.append([SlotShape(shared, cells, max(1, min(shared, rows // batches)))] * batches)
    through = [None, *adapters]
    arena = inputs = 0
    for shape in ([one._replace(adapter=adapter, traits=traits) for one in shape] for shape in shapes for adapter in through):
        with ggml.allocator() as allocator:
            built = StepGraph(config, weights, shape, [cache] * len(shape), allocator, split)
            arena = max(arena, int(ggml.c.gallocr_get_buffer_size(allocator.address, 0)))
            inputs = max(inputs, built.input_bytes)
            built.close()
    shapes.append([SlotShape(min(tokens, FLASH_FROM - 1), cells, 1)] * batches)
    shapes += [[one._replace(adapter=through[-1]) for one in shape] for shape in shapes]
    return ComputeBuffers(arena + arena // MARGIN, inputs + max(description_bytes(config, weights, shape, split) for shape in shapes))


# Which layout of cached values decodes faster here: by cell with flash attention, or transposed with matmuls?
#
# It depends on the CPU. On one AVX-512 server flash attention took seven times as long as matmuls for one query over 2,048 cells, on
# another the two are within a fifth of each other. So both are timed once, for the heads of the model at hand, and the answer is kept.
#
# A wrong answer would stay, and the two round differently. So one thread computes, whose own CPU time counts, which neighbours disturb
# little; the two take turns, and what is found is remembered only if both halves of the measurement say the same.

CELLS = 1024
_ROUNDS = 8
"""In each half."""
_WORTH = 0.35
"""Transposed values must be far ahead in attention alone: storing them and three more operations a layer cost a short context 15 %
(135M, AVX-512), and a whole step over 4,000 cells was no faster with them where this ratio was 0.56 to 0.84.
"""


def autotune_v_layout(config: ModelConfig, key_type: int) -> bool:
    """Time decode attention over CELLS cells in both layouts, or recall what an earlier run found. Not, where that is not clear."""
    build = (c.version().decode(), c.commit().decode(), *ggml.ggml_features())
    kind = f"{config.n_head} {config.n_head_kv} {config.head_dim} {key_type}"
    known = Remembered(cache_dir() / "attention.json", "|".join(build))
    ratio = known.get(kind)
    if ratio is None:
        single = config._replace(n_layer=1)
        with (
            ggml.cpu_backend(1) as backend,
            _attention(single, key_type, backend, transposed=False) as by_cell,
            _attention(single, key_type, backend, transposed=True) as transposed,
        ):
            ratio = settled(by_cell, transposed)
        if ratio is None:  # the next run tries again
            return False
        known.put(kind, ratio)
    return ratio < _WORTH


def settled(by_cell: Callable[[], float], transposed: Callable[[], float]) -> float | None:
    """The ratio of the least times of the two, None if those of two halves of the measurement would be decided differently."""
    halves = []
    for _ in range(2):
        times = [(by_cell(), transposed()) for _ in range(_ROUNDS)]
        least, other = map(min, zip(*times, strict=True))
        halves.append(other / least)
    return None if len({ratio < _WORTH for ratio in halves}) > 1 else min(halves)


class NoWeights:
    """Attention alone needs none."""

    centred = False
    corrections = None

    def get(self, name: str) -> int | None:
        """None."""
        return None

    def require(self, name: str) -> int:
        """Never called."""
        raise AssertionError(f"attention asked for the weight {name}")

    def joined(self, names: tuple[str, ...]) -> int | None:
        """None."""
        return None


@contextlib.contextmanager
def _attention(config: ModelConfig, key_type: int, backend: ggml.Handle, *, transposed: bool) -> Iterator[Callable[[], float]]:
    """One layer's attention of one token, ready to be computed: gives the CPU time of this thread that it took, in seconds."""
    with (
        contextlib.closing(KVCache(config, key_type, CELLS, transposed=transposed)) as cache,
        ggml.context(8) as inputs,
        ggml.context(64, (64,)) as work,
        ggml.allocator() as arena,
    ):
        q = ggml.new_tensor(inputs.address, ggml.TYPE_F32, (config.head_dim, config.n_head, 1))
        mask = c.new_tensor_2d(inputs.address, ggml.TYPE_F32 if transposed else ggml.TYPE_F16, CELLS, 1)
        with ggml.allocate_context(inputs):
            ggml.view(q, "f4", (config.n_head * config.head_dim,))[:] = 0.5
            ggml.view(mask, "u1", (CELLS * (4 if transposed else 2),))[:] = 0
            shape, slot = SlotShape(1, CELLS, 0), SlotInputs(0, 0, mask)
            builder = GraphBuilder(work.address, config, NoWeights(), Inputs(0, 0, None, [slot]), [shape], [cache.view], 64)
            builder.begin("attention")
            builder.expand(layers.attend(builder, 0, q))
            graph = builder.segments[0].graph
            c.gallocr_alloc_graph(arena.address, graph)

            def once() -> float:
                start = time.thread_time()
                ggml.compute(backend, graph)
                return time.thread_time() - start

            yield once
