"""Opening the part of a model that an accelerator takes: what it can do, what a step needs there, and what then fits."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from edge_rt.core.context.capacity import padded
from edge_rt.core.context.kv import KvCache, cell_bytes
from edge_rt.core.graph.crossing import attention_traits
from edge_rt.core.graph.largest import largest
from edge_rt.core.load.offloaded import Offloaded
from edge_rt.core.load.weights import WeightStore

if TYPE_CHECKING:
    from edge_rt.core.graph.attention import Traits
    from edge_rt.core.graph.hyper import Hyper
    from edge_rt.core.load.compensation import Compensation
    from edge_rt.core.load.model_file import ModelFile
    from edge_rt.core.load.offload import Accelerator

PLANNED_CELLS = 4096
"""Cells that room is kept for on the device where no context was asked for: what a model was trained with is often far more than it
gets, and would leave no room for weights. Sequences may use what is left beyond.
"""
PLANNED_PARTS, PLANNED_ROWS = 4, 16
"""Sequences in a step, and rows of logits, that the compute buffer is planned for."""


def offload(
    accelerator: Accelerator, file: ModelFile, hyper: Hyper, key_type: int, context: int | None, chunk: int,
    compensation: Compensation | None = None,
) -> tuple[Offloaded, Traits]:  # fmt: skip
    """Open the device and place the last blocks there, beside one sequence of ``context`` cells, which needs twice its memory when it
    grows by moving; and what attention may ask of it.

    Raises OptionError if there is no such device or it cannot hold the head, OutOfMemory.
    """
    offloaded = Offloaded.open(accelerator, file, hyper)
    try:
        traits = attention_traits(offloaded.device, hyper, key_type)
        cells = padded(context or min(hyper.train_context, PLANNED_CELLS))
        with (
            closing(WeightStore(file, hyper)) as weights,
            closing(KvCache(hyper, key_type, cells, transposed=not traits.flash)) as cache,
        ):
            found = largest(hyper, weights, False, cache.view, chunk, PLANNED_PARTS, PLANNED_ROWS, traits=traits)
        if compensation:
            from edge_rt.core.load.corrections import far_bytes

            offloaded.weights.add(far_bytes(compensation))
        offloaded.place(2 * cells * cell_bytes(hyper, key_type) // hyper.n_layer, found.arena + found.graph)
    except BaseException:
        offloaded.close()
        raise
    return offloaded, traits
