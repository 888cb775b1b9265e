"""Which products give the same bits for several columns together as for each alone?

Kernels may add up in another order when they work on several columns. The order does not depend on the data, so one look at each
kind of weight decides; and it is looked at in the product itself, because the rounding of later steps would hide most differences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from edge_rt import config
from edge_rt.core.graph import offsets
from edge_rt.core.graph.once import computed
from edge_rt.core.load.centred import BLOCK, OFFSETS
from edge_rt.core.remember import Remembered
from edge_rt.native import ggml

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

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


def exact_columns(matrices: Iterable[int], backend: ggml.Handle, most: int) -> int:
    """The largest n <= ``most`` such that every product with 2 to n columns equals those with one, bit for bit."""
    build = "|".join((c.version().decode(), c.commit().decode(), *ggml.cpu_features()))
    known = Remembered(config.cache_dir() / "exact-columns.json", build)
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
            multiply = offsets.product if _are_offsets(matrix) else c.mul_mat
            product: npt.NDArray[np.float32] = computed(lambda ctx: int(multiply(ctx, matrix, x)), shape, backend, arena).copy()
            return product


def _are_offsets(matrix: int) -> bool:
    """Whether a matrix is multiplied with sums, by its name."""
    return bool(ggml.fields(matrix).name.endswith(OFFSETS.encode()))
