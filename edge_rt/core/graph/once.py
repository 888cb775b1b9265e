"""A graph that is built, run and thrown away: for what is asked once, not at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_rt.native import ggml

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

c = ggml.c
_NODES = 16


def computed(build: Callable[[int], int], shape: tuple[int, ...], backend: ggml.Handle, arena: ggml.Handle) -> npt.NDArray[np.float32]:
    """The float32 result of the graph that ``build`` makes in a context, in NumPy's order of dimensions.

    It is in the arena: valid until that is used again or closed. Inputs must have been set.
    """
    with ggml.context(_NODES, (_NODES,)) as work:
        result = build(work.address)
        c.set_output(result)
        graph = c.new_graph_custom(work.address, _NODES, False)
        c.build_forward_expand(graph, result)
        c.gallocr_alloc_graph(arena.address, graph)
        ggml.compute(backend, graph)
        return ggml.view(result, "f4", shape)
