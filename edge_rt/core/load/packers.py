"""Who packs weights: the library, for the CPU it runs on, or NumPy, for any CPU whose layouts are known (interleaving.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.core.load import interleaving
from edge_rt.core.load.gguf_tables import GGML_TYPES
from edge_rt.native import ggml, memory

if TYPE_CHECKING:
    from edge_rt.core.load.header import TensorInfo
    from edge_rt.core.load.packing import Entry

ALIGNMENT = 64
"""Bytes; of each packed tensor."""


class Packer(NamedTuple):
    """Makes packed weights.

    ``kernels``: the layout (a buffer type's name) and packed bytes of each weight that has a packed kernel, by name. ``pack``: the packed
    bytes of an entry from those of its type as a file has them, a readable buffer.
    """

    kernels: Callable[[Mapping[str, TensorInfo]], dict[str, tuple[str, int]]]
    pack: Callable[[Entry, memoryview | bytes], Any]


def library(types: Mapping[str, int]) -> Packer:
    """The library itself, with its packed buffer ``types`` by name, in order of preference."""
    return Packer(lambda sources: _library_kernels(sources, types), lambda entry, data: _library_pack(entry, data, types[entry.layout]))


def interleaver(features: Collection[str]) -> Packer:
    """For a CPU with these features (cpuinfo.py) and no AMX."""

    def kernels(sources: Mapping[str, TensorInfo]) -> dict[str, tuple[str, int]]:
        weights = {name: info for name, info in sources.items() if name.endswith(".weight")}
        packed = {name: info for name, info in weights.items() if interleaving.layout(info.type_name, info.shape, features)}
        return {name: (interleaving.BUFFER_TYPE, info.nbytes) for name, info in packed.items()}

    def pack(entry: Entry, data: memoryview | bytes) -> Any:
        type_ = GGML_TYPES[entry.type][0]
        found = interleaving.layout(type_, entry.shape, features)
        assert found is not None, f"{entry.name} has no layout"
        return interleaving.interleave(data, type_, entry.shape, found).data

    return Packer(kernels, pack)


# ---- the library -----------------------------------------------------------------------------------------------------


def _library_kernels(sources: Mapping[str, TensorInfo], types: Mapping[str, int]) -> dict[str, tuple[str, int]]:
    """Float weights would only be copied: they have none."""
    buffers = {layout: ggml.buffer(type_, 0) for layout, type_ in types.items()}
    found: dict[str, tuple[str, int]] = {}
    try:
        for name, info in sources.items():
            if not name.endswith(".weight") or len(info.shape) not in (2, 3) or not ggml.c.is_quantized(info.type):
                continue
            for layout, buffer in buffers.items():
                if (nbytes := _packed_size(info, types[layout], buffer.address)) is not None:
                    found[name] = layout, nbytes
                    break
    finally:
        for buffer in buffers.values():
            buffer.close()
    return found


def _packed_size(info: TensorInfo, type_: int, buffer: int) -> int | None:
    """Bytes of a weight in a layout, None if there is no kernel for its product: as libllama asks (llama-model-loader.cpp)."""
    with ggml.context(4) as ctx:
        weight = ggml.new_tensor(ctx.address, info.type, info.shape)
        ggml.fields(weight).buffer = buffer
        if len(info.shape) == 2:
            product = ggml.c.mul_mat(ctx.address, weight, ggml.new_tensor(ctx.address, ggml.TYPE_F32, (info.shape[0], 2)))
        else:
            columns = ggml.new_tensor(ctx.address, ggml.TYPE_F32, (info.shape[0], 1, 2))
            chosen = ggml.new_tensor(ctx.address, ggml.TYPE_I32, (1, 2))
            product = ggml.c.mul_mat_id(ctx.address, weight, columns, chosen)
        return int(ggml.c.backend_buft_get_alloc_size(type_, weight)) if ggml.supports(product) else None


def _library_pack(entry: Entry, data: memoryview | bytes, type_: int) -> bytes:
    with ggml.context(1) as ctx, ggml.buffer(type_, entry.nbytes + ALIGNMENT) as scratch:
        place = -(-ggml.c.backend_buffer_get_base(scratch.address) // ALIGNMENT) * ALIGNMENT
        tensor = ggml.new_tensor(ctx.address, entry.type, entry.shape)
        ggml.place(tensor, scratch.address, place)
        ggml.c.backend_tensor_set(tensor, memory.address_of(data), 0, len(data))
        return bytes(ggml.memory_at(place, entry.nbytes))
