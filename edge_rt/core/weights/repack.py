"""Packed weights: the interleaved layouts ggml's CPU kernels want, made once, kept in a file beside the model's hash, mapped in place."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import struct
import zlib
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt import config
from edge_rt.core.gguf.reader import GGML_TYPES, TensorInfo
from edge_rt.core.graph.config import TOGETHER
from edge_rt.core.weights import interleave as interleaving
from edge_rt.core.weights.units import Span, unit_name
from edge_rt.errors import EdgeError
from edge_rt.native import ggml, memory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.core.gguf.model_file import ModelFile
    from edge_rt.core.gguf.reader import Header

# Q4_1 weights as Q4_0 and offsets, where the library has packed kernels for Q4_0 and none for Q4_1.
#
# A block of 32 weights is ``d q + m`` in Q4_1 (q from 0 to 15) and ``d (q - 8)`` in Q4_0. As ``d q + m = d (q - 8) + (m + 8 d)``, a product
# with Q4_1 is one with Q4_0, whose kernels are fast, and one of the offsets ``m + 8 d`` with the sums of 32 inputs each
# (graph/offsets.py), which has a 32nd of the multiplications. Offsets are kept in F16: where a block's m is between -16 d and -4 d, as in
# most, they are exact (Sterbenz's lemma), else rounded by 2**-11 of themselves at most; ggml's kernel rounds each sum of inputs as much.

OFFSETS_SUFFIX = ".offsets"
"""How the names of matrices of offsets end."""
BLOCK = 32
"""Weights of a block."""
_BYTES = 20
"""Of a Q4_1 block: d and m in F16, sixteen bytes of two weights each, as a Q4_0 block has them after its d (ggml-common.h)."""
MULTIPLE = 16
"""The width of the matrix of offsets is one of it: the library's fast kernels for F16 take no other (llamafile/sgemm.cpp)."""


class TooLarge(Exception):
    """An offset is beyond F16, as no trained model has it: such weights stay as they are."""


def offsets_name(weight: str) -> str:
    """What the offsets of a weight are called."""
    return weight.removesuffix(".weight") + OFFSETS_SUFFIX


def weight_name(offsets: str) -> str:
    """Whose offsets they are."""
    return offsets.removesuffix(OFFSETS_SUFFIX) + ".weight"


def offsets_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the F16 matrix of offsets of a weight [in, out]: [in / 32, out], filled up with zeros to a MULTIPLE."""
    return -(-(shape[0] // BLOCK) // MULTIPLE) * MULTIPLE, shape[1]


def quants(data: memoryview) -> npt.NDArray[np.uint8]:
    """The bytes of the Q4_0 weight out of those of a Q4_1 weight."""
    import numpy as np

    blocks = np.frombuffer(data, np.uint8).reshape(-1, _BYTES)
    return np.concatenate((blocks[:, :2], blocks[:, 4:]), axis=1)


def offsets(data: memoryview, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
    """The offsets of a Q4_1 weight [in, out]: float16 [out, padded in / 32]. Raises TooLarge."""
    import numpy as np

    wide, rows = offsets_shape(shape)
    scales = np.frombuffer(data, np.float16).reshape(rows, shape[0] // BLOCK, _BYTES // 2)[:, :, :2].astype(np.float32)
    found = scales[:, :, 1] + 8 * scales[:, :, 0]
    if np.abs(found[np.isfinite(scales).all(axis=2)]).max(initial=0) > np.finfo(np.float16).max:
        raise TooLarge
    padded = np.zeros((rows, wide), np.float16)
    padded[:, : found.shape[1]] = found
    return padded


# Packed weights: the interleaved layouts ggml's CPU kernels want, made once, kept in a file, mapped in place.
#
# llama.cpp repacks at every load into anonymous memory. Here the repacked bytes are written to a page-aligned file whose pages are
# then mapped over the memory of a packed buffer: the same kernels run from page cache, in milliseconds, shared and evictable.
# There may be several layouts, each a buffer type of the library: tiles for AMX (ggml-cpu/amx), interleaved rows (ggml-cpu/repack.cpp).
# The library packs for the CPU it runs on; for another one interleaving.py does (packers.py).
# A file: magic, header length, CRC-32 of the header, JSON header, padding, then one page-aligned run of tensors for each unit.

FORMAT = 4
MAGIC = b"EDGEPACK"
LAYOUTS = ("AMX", "CPU_REPACK")
"""Buffer types whose memory is an ordinary allocation, over which a file may be mapped; a weight takes the first that has a kernel.

The order is libllama's. SmolLM2 in Q4_0 with AMX took half the time interleaved rows took for a prompt, and 0.6 of it for a token.
"""
SMALL = 256 * 1024
"""Unpackable tensors of a packed unit up to this size (norms, biases) are copied along, so that a unit is one sequential read."""
JOINED = tuple(f"{part}.{kind}" for kind in ("weight", "bias") for parts in TOGETHER for part in parts)
"""What shares its input stands side by side at the front of a block, so that graphs can take it as one matrix."""
_PREFIX = struct.Struct("<8sII")
_SAMPLE_WIDTH, _MOST_ROWS = 512, 32
"""Of a sample: two of the longest blocks wide, and as many rows as any layout takes together (AMX: TILE_N * 2)."""


class PackDamaged(EdgeError):
    """A packed file is cut short, altered, or of another key; it is made again."""


class Entry(NamedTuple):
    """A tensor in a packed file: ``offset`` from the start of the data; ``layout`` names a buffer type, "" is as in the GGUF."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    layout: str
    crc32: int = 0


class RepackPlan(NamedTuple):
    """What a packed file for one model holds, its size, and the pages it can be mapped in."""

    entries: tuple[Entry, ...]
    size: int
    page: int


def layouts() -> dict[str, int]:
    """The CPU's packed buffer types whose memory may be mapped from a file, by name, in order of preference."""
    found = ggml.extra_buffer_types()
    return {name: found[name] for name in LAYOUTS if name in found}


def library() -> Packer:
    """The library as a packer: its layouts are those of the CPU it runs on."""
    return library_packer(layouts())


def plan_repack(header: Header, centre: bool = True, packer: Packer | None = None, page: int = memory.PAGE) -> RepackPlan | None:
    """Decide what to pack: every quantised 2-D or expert weight for which the library has a kernel. None if there is nothing.

    ``centre``: what it has none for as Q4_1 lies as Q4_0 and offsets, if it has one for that (repack.py). ``packer``: who packs, the
    library if left out. ``page``: bytes; units begin on pages of that size.
    """
    sources = _sources(header)
    found, apart = forms(sources, centre, packer)
    if not found:
        return None
    units: dict[str, list[str]] = {}
    for name in sources:
        units.setdefault(unit_name(name), []).append(name)
    entries: list[Entry] = []
    position = 0
    for names in units.values():
        position = -(-position // page) * page
        for blank in _unit(sorted(names, key=_rank), sources, found, apart):
            entries.append(blank._replace(offset=position))
            position = -(-(position + blank.nbytes) // ALIGNMENT) * ALIGNMENT
    return RepackPlan(tuple(entries), -(-position // page) * page, page)


def forms(
    sources: Mapping[str, TensorInfo], centre: bool = True, packer: Packer | None = None
) -> tuple[dict[str, tuple[str, int]], Container[str]]:
    """Layout and bytes of each weight that is packed, and which of them lie as Q4_0 and offsets."""
    kernels = (packer or library()).kernels
    found = kernels(sources)
    apart = kernels(_as_q4_0(sources, found)) if centre else {}
    return found | apart, apart


def fingerprints(header: Header, centre: bool = True, packer: Packer | None = None) -> tuple[str, ...]:
    """What packed weights of a model are: for each kind of weight in it a checksum of what the packer makes of a small sample.

    A kind is a type, a number of dimensions, and the power of two by which the rows divide: what layouts go by. Two packers with equal
    fingerprints pack the model alike, on whatever CPUs and in whatever builds of the library they are.
    """
    packer = packer or library()
    samples: dict[str, TensorInfo] = {}
    for name, info in _sources(header).items():
        if name.endswith(".weight") and len(info.shape) in (2, 3) and GGML_TYPES[info.type][1] > 1:
            shape = (_SAMPLE_WIDTH, min(info.shape[1] & -info.shape[1], _MOST_ROWS), 2)[: len(info.shape)]
            kind = f"{info.type_name} {'x'.join(map(str, shape))}.weight"
            samples[kind] = TensorInfo(kind, shape, info.type, info.type_name, 0, _plain_size(info.type, shape))
    found, apart = forms(samples, centre, packer)
    told = []
    for kind, info in sorted(samples.items()):
        layout, nbytes = found.get(kind, ("", 0))
        type_ = ggml.TYPE_Q4_0 if kind in apart else info.type
        if layout:
            data = random.Random(6).randbytes(_plain_size(type_, info.shape))  # the same everywhere
            packed = packer.pack(Entry(kind, type_, info.shape, 0, nbytes, layout), data)
            layout = f"{GGML_TYPES[type_][0]} {layout} {zlib.crc32(packed):08x}"
        told.append(f"{kind.removesuffix('.weight')}: {layout or 'plain'}")
    return tuple(told)


def _plain_size(type_: int, shape: tuple[int, ...]) -> int:
    """Bytes of a weight of whole blocks as files have it."""
    _, elements, nbytes = GGML_TYPES[type_]
    return math.prod(shape) // elements * nbytes


def _as_q4_0(sources: Mapping[str, TensorInfo], kernels: Container[str]) -> dict[str, TensorInfo]:
    """Weights of Q4_1 that have no kernel, as what is asked for instead."""
    lacking = {name: info for name, info in sources.items() if info.type == ggml.TYPE_Q4_1 and name not in kernels}
    return {
        name: info._replace(type=ggml.TYPE_Q4_0, type_name="Q4_0", nbytes=_plain_size(ggml.TYPE_Q4_0, info.shape))
        for name, info in lacking.items()
        if len(info.shape) == 2
    }


def _unit(
    names: Sequence[str], sources: Mapping[str, TensorInfo], kernels: Mapping[str, tuple[str, int]], apart: Container[str]
) -> Iterator[Entry]:
    """What of a unit is packed, in order, without a place: its weights, and behind them the offsets of those that lie ``apart``."""
    for name in names:
        info = sources[name]
        if name in kernels or (info.nbytes <= SMALL and name != "token_embd.weight"):
            layout, nbytes = kernels.get(name, ("", info.nbytes))
            yield Entry(name, ggml.TYPE_Q4_0 if name in apart else info.type, info.shape, 0, nbytes, layout)
    for name in names:
        if name in apart:
            wide, rows = shape = offsets_shape(sources[name].shape)
            yield Entry(offsets_name(name), ggml.TYPE_F16, shape, 0, 2 * wide * rows, "")


def _rank(name: str) -> int:
    """Sorts JOINED to the front of a unit and leaves the rest as it is."""
    part = name.split(".", 2)[-1]
    return JOINED.index(part) if part in JOINED else len(JOINED)


def _sources(header: Header) -> dict[str, TensorInfo]:
    """Tensors a packed file may hold, with a tied head as a tensor of its own, in file order."""
    sources = {name: info for name, info in header.tensors.items() if name != "token_embd.weight" and not name.endswith(OFFSETS_SUFFIX)}
    if "output.weight" not in sources and "token_embd.weight" in header.tensors:
        sources["output.weight"] = header.tensors["token_embd.weight"]
    return sources


def pack_tensors(plan_: RepackPlan, header: Header, base: int, packer: Packer | None = None) -> Iterator[tuple[Entry, Any]]:
    """Entries and their bytes from the mapped model at ``base``, one at a time (memory: the largest one). Raises centred.TooLarge."""
    packer, sources = packer or library(), _sources(header)
    for entry in plan_.entries:
        apart = entry.name.endswith(OFFSETS_SUFFIX)
        source = sources[weight_name(entry.name) if apart else entry.name]
        data = ggml.memory_at(base + source.offset, source.nbytes)
        if apart:
            yield entry, offsets(data, source.shape).tobytes()
        elif not entry.layout:
            yield entry, data
        else:
            yield entry, packer.pack(entry, data if entry.type == source.type else quants(data).reshape(-1).data)


def write_header(entries: Sequence[Entry], size: int, key: str, model: str, data_offset: int) -> bytes:
    """The first pages of a packed file, padded to ``data_offset``."""
    body = _body(entries, size, key, model, data_offset)
    return (_PREFIX.pack(MAGIC, len(body), zlib.crc32(body)) + body).ljust(data_offset, b"\0")


def header_size(plan_: RepackPlan, key: str, model: str) -> int:
    """Bytes to keep free for the header, in whole pages."""
    # Checksums are known only at the end: the room is measured with the widest ones.
    blank = [entry._replace(crc32=0xFFFFFFFF) for entry in plan_.entries]
    return -(-(_PREFIX.size + len(_body(blank, plan_.size, key, model, 1 << 40))) // plan_.page) * plan_.page


def _body(entries: Sequence[Entry], size: int, key: str, model: str, data_offset: int) -> bytes:
    fields = {"format": FORMAT, "key": key, "model": model, "size": size, "data_offset": data_offset}
    return json.dumps({**fields, "entries": entries}).encode()


def made_for(path: Path) -> str | None:
    """Path of the model a packed file of whatever format was made from, None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return str(_read_header(file.fileno())["model"])
    except (OSError, PackDamaged):
        return None


def _read_body(fd: int) -> dict[str, Any]:
    """The JSON header of a whole file of this format. Raises PackDamaged."""
    fields = _read_header(fd)
    if fields["format"] != FORMAT:
        raise PackDamaged("the packed file is of another format")
    if os.fstat(fd).st_size != fields["data_offset"] + fields["size"]:
        raise PackDamaged("the packed file is cut short")
    return fields


def _read_header(fd: int) -> dict[str, Any]:
    """The JSON header, of this or an older format. Raises PackDamaged."""
    prefix = os.pread(fd, _PREFIX.size, 0)
    if len(prefix) < _PREFIX.size:
        raise PackDamaged("the packed file is cut short")
    magic, length, crc = _PREFIX.unpack(prefix)
    if magic != MAGIC or length > os.fstat(fd).st_size:
        raise PackDamaged("the packed file has no header")
    body = os.pread(fd, length, _PREFIX.size)
    if len(body) != length or zlib.crc32(body) != crc:
        raise PackDamaged("the packed file's header is damaged")
    return dict(json.loads(body))


class PackedFile:
    """An open packed file. ``place`` maps it over a packed buffer and puts its tensors there."""

    def __init__(self, path: Path, key: str) -> None:
        """Open and check. Raises PackDamaged, or OSError if the file is not there."""
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._closers: list[ggml.Handle] = []
        self._mapped: list[int] = []
        try:
            fields = _read_body(self.fd)
            if fields["key"] != key:
                raise PackDamaged("the packed file was made from another model, library or CPU")
            if fields["data_offset"] % memory.PAGE or fields["size"] % memory.PAGE:
                raise PackDamaged("the packed file was made for smaller pages")
        except BaseException:
            os.close(self.fd)
            raise
        self.size, self.data_offset = int(fields["size"]), int(fields["data_offset"])
        self.entries = tuple(Entry(e[0], e[1], tuple(e[2]), *e[3:]) for e in fields["entries"])

    def verify(self) -> None:
        """Read everything and compare checksums. Raises PackDamaged."""
        for entry in self.entries:
            if zlib.crc32(os.pread(self.fd, entry.nbytes, self.data_offset + entry.offset)) != entry.crc32:
                raise PackDamaged(f"packed tensor {entry.name} is damaged")

    def place(self, ctx: int) -> dict[str, tuple[int, Span]]:
        """Map the data over a packed buffer of each layout and place every tensor; returns name -> (tensor, span)."""
        buffers: dict[str, tuple[int, int]] = {}
        types = layouts()
        for layout in sorted({entry.layout for entry in self.entries if entry.layout}):
            if layout not in types:
                raise PackDamaged(f"this build has no packed buffer type {layout}")
            room = ggml.buffer(types[layout], self.size + memory.PAGE)  # never touched: the file is mapped over it
            self._closers.insert(0, room)
            base = -(-ggml.c.backend_buffer_get_base(room.address) // memory.PAGE) * memory.PAGE
            memory.map_file(self.fd, self.size, self.data_offset, base)
            self._mapped.append(base)
            buffers[layout] = room.address, base
        plain = ggml.buffer_from_address(self._mapped[0], self.size)  # what has no kernel is read from any of them
        self._closers.insert(0, plain)
        buffers[""] = plain.address, self._mapped[0]
        placed: dict[str, tuple[int, Span]] = {}
        for entry in self.entries:
            tensor = ggml.new_tensor(ctx, entry.type, entry.shape)
            ggml.c.set_name(tensor, entry.name.encode())
            buffer, base = buffers[entry.layout]
            ggml.place(tensor, buffer, base + entry.offset)
            if entry.layout and not ggml.fields(tensor).extra:
                raise PackDamaged(f"the library has no kernel for packed tensor {entry.name}")
            placed[entry.name] = (tensor, Span(base + entry.offset, entry.nbytes, self.fd, self.data_offset + entry.offset))
        return placed

    def close(self) -> None:
        """Unmap and close. The buffers' memory is made ordinary again first: its allocator may hand it to someone else."""
        for address in self._mapped:
            memory.map_anonymous(self.size, address)
        self._mapped = []
        for closer in self._closers:
            closer.close()
        self._closers = []
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


# Who packs weights: the library, for the CPU it runs on, or NumPy, for any CPU whose layouts are known (interleaving.py).

ALIGNMENT = 64
"""Bytes; of each packed tensor."""


class Packer(NamedTuple):
    """Makes packed weights.

    ``kernels``: the layout (a buffer type's name) and packed bytes of each weight that has a packed kernel, by name. ``pack``: the packed
    bytes of an entry from those of its type as a file has them, a readable buffer.
    """

    kernels: Callable[[Mapping[str, TensorInfo]], dict[str, tuple[str, int]]]
    pack: Callable[[Entry, memoryview | bytes], Any]


def library_packer(types: Mapping[str, int]) -> Packer:
    """The library itself, with its packed buffer ``types`` by name, in order of preference."""
    return Packer(lambda sources: _library_kernels(sources, types), lambda entry, data: _library_pack(entry, data, types[entry.layout]))


def interleaver(features: Collection[str]) -> Packer:
    """For a CPU with these features (hardware/topology.py) and no AMX."""

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


# Find, or make once, the packed file of a model; safe when two processes start together, harmless when the disk is full.

Progress = Callable[[str, int, int], None]

ELSEWHERE_PAGE = 16384
"""Bytes of a page in files that are made for another machine: a Pi 5 has such pages under Raspberry Pi OS, others mostly smaller ones."""


def cache_key(file: ModelFile, centre: bool = True) -> str:
    """Identify model content, library build and CPU: a packed file in the cache is good only for all three.

    Of the CPU: features, vector length, and the layouts it may use now, for a system can withhold AMX from a process.
    """
    build = (ggml.c.version().decode(), ggml.c.commit().decode(), *ggml.ggml_features(), str(ggml.ggml_vector_length()))
    form = () if centre else ("as in the file",)
    return "|".join((file.key(), *build, *layouts(), str(FORMAT), *form))


def copied_key(file: ModelFile, centre: bool = True, packer: Packer | None = None) -> str:
    """Identify what is in a packed file that lies beside its model and goes where it goes: the model, and how its weights are packed.

    It is good wherever the library (or ``packer``) packs them just so, which is tried on small samples: below a millisecond.
    """
    return "|".join((file.key(copied=True), str(FORMAT), *fingerprints(file.header, centre, packer)))


def open_packed(file: ModelFile, progress: Progress | None = None, centre: bool = True) -> tuple[PackedFile | None, str | None]:
    """Open the packed weights of a model, making them first if need be. ``centre``: as ``packing.plan`` has it.

    Returns (packed, notice): packed None runs from the GGUF, and the notice says why if that is not simply
    because the model has nothing to pack. Packed weights beside the model come first, if they are as the library packs here.
    """
    beside = Path(file.path).with_suffix(".pack")
    if beside.exists() and (found := _open_sound(beside, copied_key(file, centre))):
        return found, None
    key = cache_key(file, centre)
    path = config.packed_dir() / f"{Path(file.path).stem}-{zlib.crc32(key.encode()):08x}.pack"
    if found := _open_sound(path, key):
        return found, None
    plan = plan_repack(file.header, centre)
    if plan is None:
        return None, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_builder(path):
            if found := _open_sound(path, key):  # the other process made it while we waited
                return found, None
            if not _build(file, plan, path, key, progress, library()):
                return None, None
        return PackedFile(path, key), None
    except OSError as error:
        reason = error.strerror or str(error)
        where = f"cannot write {path.parent} ({reason}); free space or set EDGE_RT_CACHE"
        return None, f"running without packed weights, which is slower: {where}"


def write_beside(file: ModelFile, progress: Progress | None = None, packer: Packer | None = None) -> Path | None:
    """Write the packed weights of a model beside it; None if it has nothing to pack. Raises OSError.

    ``packer``: of the machine where it will run, this one's library if left out.
    """
    page = memory.PAGE if packer is None else max(memory.PAGE, ELSEWHERE_PAGE)
    packer = packer or library()
    plan = plan_repack(file.header, packer=packer, page=page)
    path = Path(file.path).with_suffix(".pack")
    if plan is None or not _build(file, plan, path, copied_key(file, packer=packer), progress, packer):
        return None
    return path


def _open_sound(path: Path, key: str) -> PackedFile | None:
    """Open a packed file if it is there and sound; a damaged or stale one counts as absent and is overwritten."""
    try:
        return PackedFile(path, key)
    except (FileNotFoundError, NotADirectoryError, PackDamaged):
        return None


@contextlib.contextmanager
def _only_builder(path: Path) -> Iterator[None]:
    """Hold a lock file, so that a second process waits for the first instead of packing too."""
    try:
        import fcntl
    except ImportError:  # no flock here: both build, and the atomic rename keeps that correct
        yield
        return
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(file: ModelFile, plan: RepackPlan, path: Path, key: str, progress: Progress | None, packer: Packer) -> bool:
    """Write the packed file; False if there is nothing to pack, as offsets are too large for it. Raises OSError (disk full, read-only)."""
    try:
        _write(file, plan, path, key, progress, packer)
    except TooLarge:
        without = plan_repack(file.header, False, packer, plan.page)
        if without is None:
            return False
        _write(file, without, path, key, progress, packer)
    _forget_stale(path, _named(file, path))
    return True


def _write(file: ModelFile, plan: RepackPlan, path: Path, key: str, progress: Progress | None, packer: Packer) -> None:
    """Write the packed file beside its final name, then rename it into place. Raises OSError, TooLarge."""
    import shutil  # these two cost start-up time, and packing is rare
    import tempfile

    needed = plan.size + 16 * plan.page
    if (free := shutil.disk_usage(path.parent).free) < needed:
        raise OSError(28, f"{needed >> 20} MB needed, {free >> 20} MB free")
    base, model = memory.address_of(file.map), _named(file, path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as out:
            start = header_size(plan, key, model)
            out.truncate(start + plan.size)
            entries, done = [], 0
            for entry, data in pack_tensors(plan, file.header, base, packer):
                out.seek(start + entry.offset)
                out.write(data)
                entries.append(entry._replace(crc32=zlib.crc32(data)))
                done += entry.nbytes
                if progress:
                    progress("packing", done, plan.size)
            out.seek(0)
            out.write(write_header(entries, plan.size, key, model, start))
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _named(file: ModelFile, pack: Path) -> str:
    """What a packed file calls its model: one beside it goes where the model goes, and does not tell where it was made."""
    path = Path(file.path)
    return path.name if pack.parent == path.parent else str(path)


def _forget_stale(path: Path, model: str) -> None:
    """Delete other packed files of the same model path (an older model, library or CPU): nobody will open them again."""
    for other in path.parent.glob("*.pack"):
        if other != path and made_for(other) == model:
            with contextlib.suppress(OSError):
                other.unlink()
