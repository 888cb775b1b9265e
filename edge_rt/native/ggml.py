"""libggml: the C functions edge-rt builds and runs graphs with. Prototypes are those of ggml 0.25.3 (llama-cpp-python 0.3.36).

Contexts, tensors, graphs, buffers and backends are opaque addresses (``int``); ``Handle`` frees one exactly once.
Tensor shapes are in ggml's order: ne0 is the fastest dimension."""

from __future__ import annotations

import ctypes as C
import struct
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from edge_rt.errors import NativeError, OutOfMemory
from edge_rt.native.libs import Bindings, function
from edge_rt.native.memory import Affinity

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

P, I32, I64, SIZE, F32, BOOL, STR = C.c_void_p, C.c_int, C.c_int64, C.c_size_t, C.c_float, C.c_bool, C.c_char_p

TYPE_F32, TYPE_F16, TYPE_Q4_0, TYPE_Q4_1, TYPE_Q8_0, TYPE_I32, TYPE_I64 = 0, 1, 2, 3, 8, 26, 27
ROPE_NORMAL, ROPE_NEOX = 0, 2
PRECISION_F32 = 10
STATUS_SUCCESS, STATUS_ALLOC_FAILED = 0, -2
MAX_DIMS, MAX_SOURCES, MAX_NAME = 4, 10, 64


class InitParams(C.Structure):
    """struct ggml_init_params, passed by value."""

    _fields_ = (("mem_size", SIZE), ("mem_buffer", P), ("no_alloc", BOOL))


class TensorStruct(C.Structure):
    """struct ggml_tensor; abi.py checks the offsets against a tensor the library made."""

    _fields_ = (
        ("type", I32), ("buffer", P), ("ne", I64 * MAX_DIMS), ("nb", SIZE * MAX_DIMS), ("op", I32),
        ("op_params", C.c_int32 * 16), ("flags", C.c_int32), ("src", P * MAX_SOURCES), ("view_src", P), ("view_offs", SIZE),
        ("data", P), ("name", C.c_char * MAX_NAME), ("extra", P), ("padding", C.c_char * 8),
    )  # fmt: skip


c = Bindings("ggml_")

# const char * ggml_version(void);
c.declare("version", STR)
# const char * ggml_commit(void);
c.declare("commit", STR)
# size_t ggml_tensor_overhead(void);
c.declare("tensor_overhead", SIZE)
# size_t ggml_graph_overhead_custom(size_t size, bool grads);
c.declare("graph_overhead_custom", SIZE, SIZE, BOOL)
# bool ggml_is_quantized(enum ggml_type type);
c.declare("is_quantized", BOOL, I32)
# int64_t ggml_blck_size(enum ggml_type type);
c.declare("blck_size", I64, I32)
# size_t ggml_row_size(enum ggml_type type, int64_t ne);
c.declare("row_size", SIZE, I32, I64)

# struct ggml_context * ggml_init(struct ggml_init_params params);
c.declare("init", P, InitParams)
# void ggml_free(struct ggml_context * ctx);
c.declare("free", None, P)
# struct ggml_tensor * ggml_new_tensor_1d(struct ggml_context * ctx, enum ggml_type type, int64_t ne0);
c.declare("new_tensor_1d", P, P, I32, I64)
# struct ggml_tensor * ggml_new_tensor_2d(..., int64_t ne0, int64_t ne1);
c.declare("new_tensor_2d", P, P, I32, I64, I64)
# struct ggml_tensor * ggml_new_tensor(struct ggml_context * ctx, enum ggml_type type, int n_dims, const int64_t * ne);
c.declare("new_tensor", P, P, I32, I32, C.POINTER(I64))
# struct ggml_tensor * ggml_set_name(struct ggml_tensor * tensor, const char * name);
c.declare("set_name", P, P, STR)
# void ggml_set_output(struct ggml_tensor * tensor);
c.declare("set_output", None, P)

# struct ggml_tensor * ggml_get_rows(ctx, struct ggml_tensor * a /* data */, struct ggml_tensor * b /* row indices */);
c.declare("get_rows", P, P, P, P)
# struct ggml_tensor * ggml_set_rows(ctx, a /* destination */, b /* source */, c /* row indices */);
c.declare("set_rows", P, P, P, P, P)
# struct ggml_tensor * ggml_rms_norm(ctx, a, float eps);
c.declare("rms_norm", P, P, P, F32)
# struct ggml_tensor * ggml_mul(ctx, a, b);
c.declare("mul", P, P, P, P)
# struct ggml_tensor * ggml_add(ctx, a, b);
c.declare("add", P, P, P, P)
# struct ggml_tensor * ggml_acc_inplace(ctx, a, b, size_t nb1, size_t nb2, size_t nb3, size_t offset);
c.declare("acc_inplace", P, P, P, P, SIZE, SIZE, SIZE, SIZE)
# struct ggml_tensor * ggml_scale(ctx, a, float s);
c.declare("scale", P, P, P, F32)
# struct ggml_tensor * ggml_div(ctx, a, b);
c.declare("div", P, P, P, P)
# struct ggml_tensor * ggml_clamp(ctx, a, float min, float max);
c.declare("clamp", P, P, P, F32, F32)
# struct ggml_tensor * ggml_sum_rows(ctx, a);
c.declare("sum_rows", P, P, P)
# struct ggml_tensor * ggml_pad(ctx, a, int p0, int p1, int p2, int p3);
c.declare("pad", P, P, P, C.c_int, C.c_int, C.c_int, C.c_int)
# struct ggml_tensor * ggml_mul_mat(ctx, a, b);
c.declare("mul_mat", P, P, P, P)
# struct ggml_tensor * ggml_out_prod(ctx, a, b);
c.declare("out_prod", P, P, P, P)
# struct ggml_tensor * ggml_mul_mat_id(ctx, as, b, ids);
c.declare("mul_mat_id", P, P, P, P, P)
# struct ggml_tensor * ggml_concat(ctx, a, b, int dim);
c.declare("concat", P, P, P, P, I32)
# struct ggml_tensor * ggml_swiglu(ctx, a);
c.declare("swiglu", P, P, P)
# struct ggml_tensor * ggml_swiglu_split(ctx, a, b);
c.declare("swiglu_split", P, P, P, P)
# struct ggml_tensor * ggml_argmax(ctx, a);
c.declare("argmax", P, P, P)
# struct ggml_tensor * ggml_argsort_top_k(ctx, a, int k);
c.declare("argsort_top_k", P, P, P, I32)
# struct ggml_tensor * ggml_soft_max(ctx, a);
c.declare("soft_max", P, P, P)
# struct ggml_tensor * ggml_soft_max_ext(ctx, a, mask, float scale, float max_bias);
c.declare("soft_max_ext", P, P, P, P, F32, F32)
# struct ggml_tensor * ggml_flash_attn_ext(ctx, q, k, v, mask, float scale, float max_bias, float logit_softcap);
c.declare("flash_attn_ext", P, P, P, P, P, P, F32, F32, F32)
# bool ggml_prec_set_acc(struct ggml_tensor * a, enum ggml_prec prec);
c.declare("prec_set_acc", BOOL, P, I32)
# struct ggml_tensor * ggml_rope_ext(ctx, a, b /* positions */, c /* frequency factors */, int n_dims, int mode, int n_ctx_orig,
#     float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow);
c.declare("rope_ext", P, P, P, P, P, I32, I32, I32, F32, F32, F32, F32, F32, F32)
# struct ggml_tensor * ggml_cpy(ctx, a, b);
c.declare("cpy", P, P, P, P)
# struct ggml_tensor * ggml_cont(ctx, a);
c.declare("cont", P, P, P)
# struct ggml_tensor * ggml_cont_2d(ctx, a, int64_t ne0, int64_t ne1);
c.declare("cont_2d", P, P, P, I64, I64)
# struct ggml_tensor * ggml_transpose(ctx, a);
c.declare("transpose", P, P, P)
# struct ggml_tensor * ggml_permute(ctx, a, int axis0, int axis1, int axis2, int axis3);
c.declare("permute", P, P, P, I32, I32, I32, I32)
# struct ggml_tensor * ggml_reshape_2d(ctx, a, int64_t ne0, int64_t ne1);
c.declare("reshape_2d", P, P, P, I64, I64)
# struct ggml_tensor * ggml_reshape_3d(ctx, a, int64_t ne0, int64_t ne1, int64_t ne2);
c.declare("reshape_3d", P, P, P, I64, I64, I64)
# struct ggml_tensor * ggml_view_2d(ctx, a, int64_t ne0, int64_t ne1, size_t nb1, size_t offset);
c.declare("view_2d", P, P, P, I64, I64, SIZE, SIZE)
# struct ggml_tensor * ggml_view_3d(ctx, a, int64_t ne0, int64_t ne1, int64_t ne2, size_t nb1, size_t nb2, size_t offset);
c.declare("view_3d", P, P, P, I64, I64, I64, SIZE, SIZE, SIZE)
# ... ggml_view_4d(ctx, a, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3, size_t nb1, size_t nb2, size_t nb3, size_t offset);
c.declare("view_4d", P, P, P, I64, I64, I64, I64, SIZE, SIZE, SIZE, SIZE)
# struct ggml_tensor * ggml_repeat_4d(ctx, a, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3);
c.declare("repeat_4d", P, P, P, I64, I64, I64, I64)

# struct ggml_cgraph * ggml_new_graph_custom(ctx, size_t size, bool grads);
c.declare("new_graph_custom", P, P, SIZE, BOOL)
# void ggml_build_forward_expand(struct ggml_cgraph * cgraph, struct ggml_tensor * tensor);
c.declare("build_forward_expand", None, P, P)
# ggml_gallocr_t ggml_gallocr_new(ggml_backend_buffer_type_t buft);
c.declare("gallocr_new", P, P)
# void ggml_gallocr_free(ggml_gallocr_t galloc);
c.declare("gallocr_free", None, P)
# bool ggml_gallocr_reserve(ggml_gallocr_t galloc, struct ggml_cgraph * graph);
c.declare("gallocr_reserve", BOOL, P, P)
# bool ggml_gallocr_alloc_graph(ggml_gallocr_t galloc, struct ggml_cgraph * graph);
c.declare("gallocr_alloc_graph", BOOL, P, P)
# size_t ggml_gallocr_get_buffer_size(ggml_gallocr_t galloc, int buffer_id);
c.declare("gallocr_get_buffer_size", SIZE, P, I32)

# ggml_backend_buffer_type_t ggml_backend_cpu_buffer_type(void);
c.declare("backend_cpu_buffer_type", P)
# ggml_backend_buffer_t ggml_backend_cpu_buffer_from_ptr(void * ptr, size_t size);
c.declare("backend_cpu_buffer_from_ptr", P, P, SIZE)
# ggml_backend_reg_t ggml_backend_cpu_reg(void);
c.declare("backend_cpu_reg", P)
# void * ggml_backend_reg_get_proc_address(ggml_backend_reg_t reg, const char * name);
c.declare("backend_reg_get_proc_address", P, P, STR)
# ggml_backend_dev_t ggml_backend_reg_dev_get(ggml_backend_reg_t reg, size_t index);
c.declare("backend_reg_dev_get", P, P, SIZE)
# bool ggml_backend_dev_supports_op(ggml_backend_dev_t device, const struct ggml_tensor * op);
c.declare("backend_dev_supports_op", BOOL, P, P)
# const char * ggml_backend_buft_name(ggml_backend_buffer_type_t buft);
c.declare("backend_buft_name", STR, P)
# size_t ggml_backend_buft_get_alloc_size(ggml_backend_buffer_type_t buft, const struct ggml_tensor * tensor);
c.declare("backend_buft_get_alloc_size", SIZE, P, P)
# ggml_backend_buffer_t ggml_backend_buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size);
c.declare("backend_buft_alloc_buffer", P, P, SIZE)
# ggml_backend_buffer_t ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_buffer_type_t buft);
c.declare("backend_alloc_ctx_tensors_from_buft", P, P, P)
# void * ggml_backend_buffer_get_base(ggml_backend_buffer_t buffer);
c.declare("backend_buffer_get_base", P, P)
# const char * ggml_backend_buffer_name(ggml_backend_buffer_t buffer);
c.declare("backend_buffer_name", STR, P)
# size_t ggml_backend_buffer_get_size(ggml_backend_buffer_t buffer);
c.declare("backend_buffer_get_size", SIZE, P)
# void ggml_backend_buffer_free(ggml_backend_buffer_t buffer);
c.declare("backend_buffer_free", None, P)
# enum ggml_status ggml_backend_tensor_alloc(ggml_backend_buffer_t buffer, struct ggml_tensor * tensor, void * addr);
c.declare("backend_tensor_alloc", I32, P, P, P)
# void ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
c.declare("backend_tensor_set", None, P, P, SIZE, SIZE)
# ggml_backend_t ggml_backend_cpu_init(void);
c.declare("backend_cpu_init", P)
# void ggml_backend_free(ggml_backend_t backend);
c.declare("backend_free", None, P)
# void ggml_backend_cpu_set_n_threads(ggml_backend_t backend_cpu, int n_threads);
c.declare("backend_cpu_set_n_threads", None, P, I32)
# void ggml_backend_cpu_set_abort_callback(ggml_backend_t backend_cpu, ggml_abort_callback abort_callback, void * abort_callback_data);
c.declare("backend_cpu_set_abort_callback", None, P, P, P)
# enum ggml_status ggml_backend_graph_compute(ggml_backend_t backend, struct ggml_cgraph * cgraph);
c.declare("backend_graph_compute", I32, P, P)

_CPU_FEATURES = (
    "avx", "avx_vnni", "avx2", "bmi2", "f16c", "fma", "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_int8",
    "neon", "arm_fma", "fp16_va", "dotprod", "matmul_int8", "sve", "sme", "riscv_v", "vsx", "vxe", "wasm_simd", "llamafile",
)  # fmt: skip


class Handle:
    """Owns one native object and frees it once: on ``close`` or when collected, whichever comes first."""

    __slots__ = ("__weakref__", "_finalizer", "address")

    def __init__(self, address: int | None, free: Callable[[int], Any], what: str) -> None:
        if not address:
            raise OutOfMemory(f"libggml could not create {what}; close other models or lower --ctx")
        self.address = address
        self._finalizer = weakref.finalize(self, free, address)

    def close(self) -> None:
        """Free it now; later calls do nothing."""
        self._finalizer()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def context(n_tensors: int, graph_sizes: tuple[int, ...] = ()) -> Handle:
    """A context for tensor descriptions (no data): room for ``n_tensors`` and for graphs of the given node counts."""
    return Handle(c.init(InitParams(context_bytes(n_tensors, graph_sizes), None, True)), c.free, "a tensor context")


def context_bytes(n_tensors: int, graph_sizes: tuple[int, ...] = ()) -> int:
    """Bytes that such a context takes at most."""
    return int(c.tensor_overhead() * n_tensors + sum(c.graph_overhead_custom(n, False) for n in graph_sizes))


_ANYWHERE = nullcontext()


class CpuBackend(Handle):
    """A CPU backend; ``kept`` holds what computes on it on some CPUs."""

    __slots__ = ("kept",)

    def __init__(self, cpus: Collection[int]) -> None:
        super().__init__(c.backend_cpu_init(), c.backend_free, "the CPU backend")
        self.kept = Affinity(cpus)


def cpu_backend(threads: int, cpus: Collection[int] = ()) -> CpuBackend:
    """A CPU backend that computes with ``threads`` threads. ``cpus``: on these alone, () on any."""
    backend = CpuBackend(cpus)
    c.backend_cpu_set_n_threads(backend.address, threads)
    return backend


def buffer(buffer_type: int, size: int) -> Handle:
    """Allocate ``size`` bytes of a buffer type. Raises OutOfMemory."""
    return Handle(c.backend_buft_alloc_buffer(buffer_type, size), c.backend_buffer_free, f"a buffer of {size} bytes")


def buffer_from_address(address: int, size: int) -> Handle:
    """A CPU buffer over memory owned by someone else."""
    return Handle(c.backend_cpu_buffer_from_ptr(address, size), c.backend_buffer_free, "a buffer over mapped memory")


def allocate_context(ctx: Handle) -> Handle:
    """Allocate every tensor of a context in one zeroed CPU buffer. Raises OutOfMemory."""
    allocated = Handle(
        c.backend_alloc_ctx_tensors_from_buft(ctx.address, c.backend_cpu_buffer_type()), c.backend_buffer_free, "a tensor buffer"
    )
    return allocated


def allocator() -> Handle:
    """A graph allocator for the CPU."""
    return Handle(c.gallocr_new(c.backend_cpu_buffer_type()), c.gallocr_free, "a graph allocator")


def new_tensor(ctx: int, type_: int, shape: tuple[int, ...]) -> int:
    """A tensor description of up to four dimensions."""
    return int(c.new_tensor(ctx, type_, len(shape), (I64 * len(shape))(*shape)))


def place(tensor: int, buffer_: int, address: int) -> None:
    """Put a tensor at an address inside a buffer. Raises NativeError."""
    if status := c.backend_tensor_alloc(buffer_, tensor, address):
        raise NativeError(f"libggml could not place a tensor (status {status})")


def fields(tensor: int) -> TensorStruct:
    """The struct behind a tensor's address."""
    return TensorStruct.from_address(tensor)


_WRITABLE = 0x200  # PyBUF_WRITE
_memory_view = C.PYFUNCTYPE(C.py_object, C.c_void_p, C.c_ssize_t, C.c_int)(("PyMemoryView_FromMemory", C.pythonapi))


def data_address(tensor: int) -> int:
    """Address of a tensor's data."""
    return TensorStruct.from_address(tensor).data or 0


def view(tensor: int, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A NumPy array over a contiguous tensor's data; valid while the tensor's buffer lives."""
    import numpy as np

    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    array: npt.NDArray[Any] = np.frombuffer(memory_at(data_address(tensor), size), dtype=dtype).reshape(shape)
    return array


def memory_at(address: int, size: int) -> memoryview:
    """Writable bytes at an address. Not by an array of ctypes: each size is a type of its own, a cycle that only the collector frees."""
    view: memoryview = _memory_view(address, size, _WRITABLE)
    return view


def after_node(moved: Callable[[], None]) -> Any:
    """``moved`` as what ``compute`` calls; it lives as long as it is kept."""

    def callback(_: int | None) -> bool:
        moved()
        return False  # and go on

    return C.CFUNCTYPE(BOOL, P)(callback)  # typedef bool (*ggml_abort_callback)(void * data);


def compute(backend: Handle, graph: int, after: Any = None) -> None:
    """Run a graph; ``after``: made by ``after_node``, called after each node, at some 20 us (caches are cold). Raises NativeError."""
    if after is not None:
        c.backend_cpu_set_abort_callback(backend.address, after, None)
    with backend.kept if isinstance(backend, CpuBackend) else _ANYWHERE:
        status = c.backend_graph_compute(backend.address, graph)
    if after is not None:
        c.backend_cpu_set_abort_callback(backend.address, None, None)
    if status != STATUS_SUCCESS:
        raise _failed(status, "the CPU")


def run(backend: int, graph: int, device: str) -> None:
    """Run a graph on any backend, and wait for it. Raises NativeError, OutOfMemory."""
    if (status := c.backend_graph_compute(backend, graph)) != STATUS_SUCCESS:
        raise _failed(status, device)


def _failed(status: int, device: str) -> OutOfMemory | NativeError:
    if status == STATUS_ALLOC_FAILED:
        return OutOfMemory(f"libggml ran out of memory while computing on {device}; lower --ctx or close other programs")
    return NativeError(f"libggml failed to compute a graph on {device} (status {status}); see `edge-rt doctor`")


def supports(operation: int) -> bool:
    """Has the CPU a kernel for a graph's operation, given the buffers its operands are in?"""
    return bool(c.backend_dev_supports_op(c.backend_reg_dev_get(c.backend_cpu_reg(), 0), operation))


def extra_buffer_types() -> dict[str, int]:
    """The CPU's extra buffer types (packed weight layouts) by name, in the library's order of preference."""
    registry = c.backend_cpu_reg()
    address = c.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return {}
    # ggml_backend_buffer_type_t * ggml_backend_dev_get_extra_bufts(ggml_backend_dev_t device);
    listing = C.CFUNCTYPE(C.POINTER(P), P)(address)(c.backend_reg_dev_get(registry, 0))
    found: dict[str, int] = {}
    index = 0
    while listing and listing[index]:
        found[c.backend_buft_name(listing[index]).decode()] = listing[index]
        index += 1
    return found


def ggml_features() -> tuple[str, ...]:
    """Instruction sets the library was built for and the CPU has, in ggml's names."""
    return tuple(name for name in _CPU_FEATURES if function(f"ggml_cpu_has_{name}", I32)())


def ggml_vector_length() -> int:
    """Bytes of a vector where the CPU decides, not its instruction set (SVE, RISC-V): packed layouts depend on it. Else 0."""
    c.backend_cpu_reg()  # the library asks the CPU when it is first used: before, it says 0
    return max(int(function(f"ggml_cpu_get_{name}", I32)()) for name in ("sve_cnt", "rvv_vlen"))


# libggml's quantisation of rows of weights. Prototypes as in ggml.py.

# size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row,
#     const float * imatrix);
c.declare("quantize_chunk", C.c_size_t, C.c_int, C.c_void_p, C.c_void_p, C.c_int64, C.c_int64, C.c_int64, C.c_void_p)
# bool ggml_quantize_requires_imatrix(enum ggml_type type);
c.declare("quantize_requires_imatrix", C.c_bool, C.c_int)


def quantise_rows(rows: npt.NDArray[np.float32], type_: int, importance: npt.NDArray[np.float32] | None = None) -> bytes:
    """Rows [n, width] in a ggml type. ``importance`` [width]: weights of squared errors by column, None: all alike.

    Raises NativeError for rows that are no multiple of the type's block, or if the type cannot be made without ``importance``.
    """
    import numpy as np

    n, width = rows.shape
    if width % c.blck_size(type_):
        raise NativeError(f"rows of {width} cannot be quantised in blocks of {c.blck_size(type_)}")
    if importance is None and c.quantize_requires_imatrix(type_):
        raise NativeError("this type needs to know which columns matter")
    source = np.ascontiguousarray(rows, dtype=np.float32)
    size = int(c.row_size(type_, width)) * n
    out = np.empty(size, np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    written = c.quantize_chunk(type_, source.ctypes.data, out.ctypes.data, 0, n, width, None if weights is None else weights.ctypes.data)
    if written != size:
        raise NativeError(f"libggml wrote {written} bytes of weights where {size} were expected")
    return out.tobytes()


# Memory of tensors without NumPy, which takes longer to import than a small model takes for its first token.

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Kind = Literal["H", "i", "q", "f"]


def elements(tensor: int, kind: Kind, count: int) -> memoryview[Any]:
    """The first elements of a tensor's data, ``kind`` in struct's letters; valid while the tensor's buffer lives."""
    return memory_at(data_address(tensor), count * struct.calcsize(kind)).cast(kind)


class Rows:
    """A float32 matrix [rows, width]: a row is a memoryview, and ``np.asarray`` makes an array of the whole without a copy."""

    __slots__ = ("_memory", "_width")

    def __init__(self, memory: memoryview[float], width: int) -> None:
        """``memory``: the rows one after the other, a contiguous view of kind ``f``."""
        self._memory, self._width = memory, width

    @classmethod
    def of(cls, tensor: int, count: int, width: int) -> Rows:
        """Over a contiguous tensor; valid while its buffer lives."""
        return cls(elements(tensor, "f", count * width), width)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Copies of all rows of several matrices of one width."""
        return cls(memoryview(b"".join(part._memory for part in parts)).cast("f"), parts[0]._width)

    def __len__(self) -> int:
        return len(self._memory) // self._width

    def __getitem__(self, index: int) -> memoryview[float]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"row {index} of {count}")
        first = index % count * self._width
        return self._memory[first : first + self._width]

    def part(self, first: int, count: int) -> Rows:
        """Some of the rows, in place."""
        return Rows(self._memory[first * self._width : (first + count) * self._width], self._width)

    def copy(self, into: Rows | None = None) -> Rows:
        """The same in memory of its own: that of ``into``, an earlier copy, if it is as large. New memory takes longer than copying."""
        if into is None or len(into._memory) != len(self._memory):
            return Rows(memoryview(bytearray(self._memory)).cast("f"), self._width)
        into._memory[:] = self._memory
        return into

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.float32]:
        import numpy as np

        array: npt.NDArray[np.float32] = np.asarray(self._memory).reshape(len(self), self._width)
        return array if dtype is None and not copy else np.array(array, dtype=dtype, copy=copy)
