"""Which layout of cached values decodes faster here: by cell with flash attention, or transposed with matmuls?

It depends on the CPU. On one AVX-512 server flash attention took seven times as long as matmuls for one query over 2,048 cells, on
another the two are within a fifth of each other. So both are timed once, for the heads of the model at hand, and the answer is remembered.

A wrong answer would stay, and the two round differently. So one thread computes, whose own CPU time counts, which neighbours disturb
little; the two take turns, and what is found is remembered only if both halves of the measurement say the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from edge_rt import config
from edge_rt.core.context.kv import KvCache
from edge_rt.core.graph.common import Builder, Inputs, SlotInputs, SlotShape
from edge_rt.core.graph.hyper import Hyper
from edge_rt.core.remember import Remembered
from edge_rt.native import ggml

c = ggml.c
CELLS = 1024
_ROUNDS = 8
"""In each half."""
_WORTH = 0.35
"""Transposed values must be far ahead in attention alone: storing them and three more operations a layer cost a short context 15 %
(135M, AVX-512), and a whole step over 4,000 cells was no faster with them where this ratio was 0.56 to 0.84.
"""


def transposed_decodes_faster(hyper: Hyper, key_type: int) -> bool:
    """Time decode attention over CELLS cells in both layouts, or recall what an earlier run found. Not, where that is not clear."""
    build = (c.version().decode(), c.commit().decode(), *ggml.cpu_features())
    kind = f"{hyper.n_head} {hyper.n_head_kv} {hyper.head_dim} {key_type}"
    known = Remembered(config.cache_dir() / "attention.json", "|".join(build))
    ratio = known.get(kind)
    if ratio is None:
        single = hyper._replace(n_layer=1)
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
def _attention(hyper: Hyper, key_type: int, backend: ggml.Handle, *, transposed: bool) -> Iterator[Callable[[], float]]:
    """One layer's attention of one token, ready to be computed: gives the CPU time of this thread that it took, in seconds."""
    with (
        contextlib.closing(KvCache(hyper, key_type, CELLS, transposed=transposed)) as cache,
        ggml.context(8) as inputs,
        ggml.context(64, (64,)) as work,
        ggml.allocator() as arena,
    ):
        q = ggml.new_tensor(inputs.address, ggml.TYPE_F32, (hyper.head_dim, hyper.n_head, 1))
        mask = c.new_tensor_2d(inputs.address, ggml.TYPE_F32 if transposed else ggml.TYPE_F16, CELLS, 1)
        with ggml.allocate_context(inputs):
            ggml.view(q, "f4", (hyper.n_head * hyper.head_dim,))[:] = 0.5
            ggml.view(mask, "u1", (CELLS * (4 if transposed else 2),))[:] = 0
            shape, slot = SlotShape(1, CELLS, 0), SlotInputs(0, 0, mask)
            builder = Builder(work.address, hyper, NoWeights(), Inputs(0, 0, None, [slot]), [shape], [cache.view], 64)
            builder.begin("attention")
            builder.expand(builder.attend(0, q))
            graph = builder.segments[0].graph
            c.gallocr_alloc_graph(arena.address, graph)

            def once() -> float:
                start = time.thread_time()
                ggml.compute(backend, graph)
                return time.thread_time() - start

            yield once
