"""ggml's other backends: devices with memory of their own, which the host cannot touch.

A device is found by the name of its registry (``CUDA``, ``CANN``, ``Vulkan``) and its number there. Prototypes as in ggml.py.
"""

from __future__ import annotations

import contextlib
import ctypes as C
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from edge_rt.errors import NativeError, OptionError, OutOfMemory
from edge_rt.native import ggml
from edge_rt.native.ggml import BOOL, I32, SIZE, STR, Handle, P
from edge_rt.native.libs import Bindings

c = Bindings("ggml_")

# size_t ggml_backend_reg_count(void);
c.declare("backend_reg_count", SIZE)
# ggml_backend_reg_t ggml_backend_reg_get(size_t index);
c.declare("backend_reg_get", P, SIZE)
# const char * ggml_backend_reg_name(ggml_backend_reg_t reg);
c.declare("backend_reg_name", STR, P)
# size_t ggml_backend_reg_dev_count(ggml_backend_reg_t reg);
c.declare("backend_reg_dev_count", SIZE, P)
# ggml_backend_dev_t ggml_backend_reg_dev_get(ggml_backend_reg_t reg, size_t index);
c.declare("backend_reg_dev_get", P, P, SIZE)
# ggml_backend_reg_t ggml_backend_load(const char * path);
c.declare("backend_load", P, STR)
# void ggml_backend_unload(ggml_backend_reg_t reg);
c.declare("backend_unload", None, P)
# const char * ggml_backend_dev_name(ggml_backend_dev_t device);
c.declare("backend_dev_name", STR, P)
# const char * ggml_backend_dev_description(ggml_backend_dev_t device);
c.declare("backend_dev_description", STR, P)
# void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total);
c.declare("backend_dev_memory", None, P, C.POINTER(SIZE), C.POINTER(SIZE))
# ggml_backend_t ggml_backend_dev_init(ggml_backend_dev_t device, const char * params);
c.declare("backend_dev_init", P, P, STR)
# void ggml_backend_dev_get_props(ggml_backend_dev_t device, struct ggml_backend_dev_props * props);
c.declare("backend_dev_get_props", None, P, P)
# ggml_backend_buffer_type_t ggml_backend_dev_buffer_type(ggml_backend_dev_t device);
c.declare("backend_dev_buffer_type", P, P)
# bool ggml_backend_dev_supports_op(ggml_backend_dev_t device, const struct ggml_tensor * op);
c.declare("backend_dev_supports_op", BOOL, P, P)
# size_t ggml_backend_buft_get_alignment(ggml_backend_buffer_type_t buft);
c.declare("backend_buft_get_alignment", SIZE, P)
# size_t ggml_backend_alloc_ctx_tensors_from_buft_size(struct ggml_context * ctx, ggml_backend_buffer_type_t buft);
c.declare("backend_alloc_ctx_tensors_from_buft_size", SIZE, P, P)
# void ggml_backend_buffer_clear(ggml_backend_buffer_t buffer, uint8_t value);
c.declare("backend_buffer_clear", None, P, C.c_uint8)
# void ggml_backend_buffer_set_usage(ggml_backend_buffer_t buffer, enum ggml_backend_buffer_usage usage);
c.declare("backend_buffer_set_usage", None, P, I32)
# void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
c.declare("backend_tensor_get", None, P, P, SIZE, SIZE)
# void ggml_gallocr_reserve_n_size(galloc, graph, const int * node_buffer_ids, const int * leaf_buffer_ids, size_t * sizes);
c.declare("gallocr_reserve_n_size", None, P, P, P, P, C.POINTER(SIZE))
# int ggml_graph_n_nodes(struct ggml_cgraph * cgraph);
c.declare("graph_n_nodes", I32, P)
# struct ggml_tensor * ggml_graph_node(struct ggml_cgraph * cgraph, int i);
c.declare("graph_node", P, P, I32)
# const char * ggml_op_desc(const struct ggml_tensor * t);
c.declare("op_desc", STR, P)
# const char * ggml_type_name(enum ggml_type type);
c.declare("type_name", STR, I32)
# const char * ggml_get_name(const struct ggml_tensor * tensor);
c.declare("get_name", STR, P)

_USAGE_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS


class _Properties(C.Structure):
    """struct ggml_backend_dev_props."""

    _fields_ = (
        ("name", STR), ("description", STR), ("memory_free", SIZE), ("memory_total", SIZE), ("type", I32), ("device_id", STR),
        ("capabilities", BOOL * 5),
    )  # fmt: skip


class Memory(NamedTuple):
    """Bytes of a device as its backend counts them; 0 where it does not."""

    free: int
    total: int


def registered() -> dict[str, int]:
    """The backends in this process, by name, with their registries' addresses."""
    found = (c.backend_reg_get(i) for i in range(c.backend_reg_count()))
    return {c.backend_reg_name(address).decode(): address for address in found}


def load(path: str) -> str:
    """Load a backend from a dynamic library; its name. Raises NativeError."""
    address = c.backend_load(path.encode())
    if not address:
        raise NativeError(f"libggml could not load the backend {path}; it must be built for this version of libggml")
    return str(c.backend_reg_name(address).decode())


def unload(name: str) -> None:
    """Forget a backend that was loaded; nothing of it may be open. Else libllama, too, would put weights on its devices from now on."""
    c.backend_unload(registered()[name])


class Device:
    """An open device: its backend computes, its buffer type allocates. All calls but ``write`` come from one thread at a time."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.name, self.description = c.backend_dev_name(address).decode(), c.backend_dev_description(address).decode()
        self._backend = Handle(c.backend_dev_init(address, None), ggml.c.backend_free, f"a backend for {self.name}")
        self._type: int = c.backend_dev_buffer_type(address)
        self.alignment: int = c.backend_buft_get_alignment(self._type)

    def memory(self) -> Memory:
        """What the backend says is free, and there is."""
        free, total = SIZE(), SIZE()
        c.backend_dev_memory(self.address, C.byref(free), C.byref(total))
        return Memory(free.value, total.value)

    def supports(self, operation: int) -> bool:
        """Whether the device has a kernel for an operation of a graph."""
        return bool(c.backend_dev_supports_op(self.address, operation))

    def unsupported(self, graph: int) -> str | None:
        """The first operation of a graph that the device has no kernel for, in words. A backend ends the process when it meets one."""
        for i in range(c.graph_n_nodes(graph)):
            node = c.graph_node(graph, i)
            if not self.supports(node):
                return self.described(node)
        return None

    def described(self, operation: int) -> str:
        """An operation, the element type and the name of what it goes over."""
        source = ggml.fields(operation).src[0]
        if not source:
            return str(c.op_desc(operation).decode())
        kind, name = c.type_name(ggml.fields(source).type).decode(), c.get_name(source).decode()
        return f"{c.op_desc(operation).decode()} of {kind}" + (f" ({name})" if name else "")

    def compute(self, graph: int) -> None:
        """Run a graph whose tensors all lie on the device, and wait for it. Raises NativeError, OutOfMemory."""
        ggml.run(self._backend.address, graph, self.name)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def buffer(self, size: int) -> Handle:
        """A zeroed buffer. Raises OutOfMemory."""
        found = self._handle(ggml.c.backend_buft_alloc_buffer(self._type, size), size)
        c.backend_buffer_clear(found.address, 0)
        return found

    def context_size(self, ctx: Handle) -> int:
        """Bytes that the tensors of a context would take."""
        return int(c.backend_alloc_ctx_tensors_from_buft_size(ctx.address, self._type))

    def allocate_context(self, ctx: Handle, *, weights: bool = False) -> Handle:
        """Allocate every tensor of a context. Raises OutOfMemory."""
        address = ggml.c.backend_alloc_ctx_tensors_from_buft(ctx.address, self._type)
        found = self._handle(address, 0 if address else self.context_size(ctx))
        if weights:
            c.backend_buffer_set_usage(found.address, _USAGE_WEIGHTS)
        return found

    def _handle(self, address: int | None, size: int) -> Handle:
        if not address:
            raise OutOfMemory(f"{self.name} has no {-(-size // (1 << 20))} MB left; close sessions or other programs, or lower --ctx")
        return Handle(address, ggml.c.backend_buffer_free, "a device buffer")

    def aligned(self, size: int) -> int:
        """``size`` rounded up to what addresses of tensors are multiples of."""
        return -(-size // self.alignment) * self.alignment

    def allocator(self) -> Handle:
        """A graph allocator for the device's memory."""
        return Handle(ggml.c.gallocr_new(self._type), ggml.c.gallocr_free, "a graph allocator")

    def graph_size(self, graph: int) -> int:
        """Bytes that the nodes of a graph that is not allocated yet will take."""
        with self.allocator() as measuring:
            size = SIZE()
            c.gallocr_reserve_n_size(measuring.address, graph, None, None, C.byref(size))
            return size.value

    def close(self) -> None:
        """Give the backend back. Its buffers must be closed."""
        self._backend.close()


def open_device(backend: str, index: int, id_: str = "") -> Device:
    """The device of that number of a backend, or of that id. Raises OptionError if there is none, OutOfMemory if it cannot be opened."""
    found = registered()
    if backend not in found:
        raise OptionError(f"this libggml has no backend {backend}, only {', '.join(found)}; install one that was built with it")
    count = c.backend_reg_dev_count(found[backend])
    if id_:
        ids = [_id(c.backend_reg_dev_get(found[backend], i)) for i in range(count)]
        index = ids.index(id_) if id_ in ids else -1
    if not 0 <= index < count:
        wanted = f"at {id_}" if id_ else str(index)
        raise OptionError(f"{backend} has no device {wanted} (it sees {count}); choose another, or make it visible to this process")
    return Device(c.backend_reg_dev_get(found[backend], index))


def _id(device: int) -> str:
    """How a backend names a device for good; empty if it does not."""
    properties = _Properties()
    c.backend_dev_get_props(device, C.byref(properties))
    return (properties.device_id or b"").decode()


def write(tensor: int, address: int, size: int, offset: int = 0) -> None:
    """Copy ``size`` bytes at an address of the host to a tensor, from a byte of it on. Returns when they have been read."""
    ggml.c.backend_tensor_set(tensor, address, offset, size)


def read(tensor: int, address: int, size: int) -> None:
    """Copy the first ``size`` bytes of a tensor to an address of the host."""
    c.backend_tensor_get(tensor, address, 0, size)


@contextlib.contextmanager
def copied(tensors: Sequence[int], *, back: bool = False) -> Iterator[tuple[int, ...]]:
    """Contiguous tensors of a device as tensors in the host's memory; what these hold at the end goes ``back`` if asked."""
    fields = [ggml.fields(tensor) for tensor in tensors]
    with ggml.context(len(tensors)) as ctx:
        copies = tuple(ggml.new_tensor(ctx.address, one.type, tuple(one.ne)) for one in fields)
        with ggml.allocate_context(ctx):
            for tensor, copy in zip(tensors, copies, strict=True):
                read(tensor, ggml.data_address(copy), nbytes(copy))
            yield copies
            for tensor, copy in zip(tensors, copies, strict=True) if back else ():
                write(tensor, ggml.data_address(copy), nbytes(copy))


def nbytes(tensor: int) -> int:
    """Bytes of a contiguous tensor."""
    fields = ggml.fields(tensor)
    return int(fields.nb[3] * fields.ne[3])
