"""libggml's quantisation of rows of weights. Prototypes as in ggml.py."""

from __future__ import annotations

import ctypes as C
from typing import TYPE_CHECKING

from edge_rt.errors import NativeError
from edge_rt.native import ggml
from edge_rt.native.libs import Bindings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

c = Bindings("ggml_")
# size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row,
#     const float * imatrix);
c.declare("quantize_chunk", C.c_size_t, C.c_int, C.c_void_p, C.c_void_p, C.c_int64, C.c_int64, C.c_int64, C.c_void_p)
# bool ggml_quantize_requires_imatrix(enum ggml_type type);
c.declare("quantize_requires_imatrix", C.c_bool, C.c_int)


def quantise(rows: npt.NDArray[np.float32], type_: int, importance: npt.NDArray[np.float32] | None = None) -> bytes:
    """Rows [n, width] in a ggml type. ``importance`` [width]: weights of squared errors by column, None: all alike.

    Raises NativeError for rows that are no multiple of the type's block, or if the type cannot be made without ``importance``.
    """
    import numpy as np

    n, width = rows.shape
    if width % ggml.c.blck_size(type_):
        raise NativeError(f"rows of {width} cannot be quantised in blocks of {ggml.c.blck_size(type_)}")
    if importance is None and c.quantize_requires_imatrix(type_):
        raise NativeError("this type needs to know which columns matter")
    source = np.ascontiguousarray(rows, dtype=np.float32)
    size = int(ggml.c.row_size(type_, width)) * n
    out = np.empty(size, np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    written = c.quantize_chunk(type_, source.ctypes.data, out.ctypes.data, 0, n, width, None if weights is None else weights.ctypes.data)
    if written != size:
        raise NativeError(f"libggml wrote {written} bytes of weights where {size} were expected")
    return out.tobytes()
