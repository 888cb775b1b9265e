"""Packed weights: the interleaved layouts ggml's CPU kernels want, made once, kept in a file, mapped in place.

llama.cpp repacks at every load into anonymous memory. Here the repacked bytes are written to a page-aligned file whose pages are
then mapped over the memory of a packed buffer: the same kernels run from page cache, in milliseconds, shared and evictable.
There may be several layouts, each a buffer type of the library: tiles for AMX (ggml-cpu/amx), interleaved rows (ggml-cpu/repack.cpp).
The library packs for the CPU it runs on; for another one interleaving.py does (packers.py).
A file: magic, header length, CRC-32 of the header, JSON header, padding, then one page-aligned run of tensors for each unit.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
import zlib
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.core.graph.hyper import TOGETHER
from edge_rt.core.load import centred, packers
from edge_rt.core.load.gguf_tables import GGML_TYPES
from edge_rt.core.load.header import TensorInfo
from edge_rt.core.load.packers import ALIGNMENT, Packer
from edge_rt.core.load.units import Span, unit_name
from edge_rt.errors import EdgeError
from edge_rt.native import ggml, memory

if TYPE_CHECKING:
    from edge_rt.core.load.header import Header

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


class Plan(NamedTuple):
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
    return packers.library(layouts())


def plan(header: Header, centre: bool = True, packer: Packer | None = None, page: int = memory.PAGE) -> Plan | None:
    """Decide what to pack: every quantised 2-D or expert weight for which the library has a kernel. None if there is nothing.

    ``centre``: what it has none for as Q4_1 lies as Q4_0 and offsets, if it has one for that (centred.py). ``packer``: who packs, the
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
    return Plan(tuple(entries), -(-position // page) * page, page)


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
            wide, rows = shape = centred.offsets_shape(sources[name].shape)
            yield Entry(centred.offsets_name(name), ggml.TYPE_F16, shape, 0, 2 * wide * rows, "")


def _rank(name: str) -> int:
    """Sorts JOINED to the front of a unit and leaves the rest as it is."""
    part = name.split(".", 2)[-1]
    return JOINED.index(part) if part in JOINED else len(JOINED)


def _sources(header: Header) -> dict[str, TensorInfo]:
    """Tensors a packed file may hold, with a tied head as a tensor of its own, in file order."""
    sources = {
        name: info for name, info in header.tensors.items() if name != "token_embd.weight" and not name.endswith(centred.OFFSETS)
    }
    if "output.weight" not in sources and "token_embd.weight" in header.tensors:
        sources["output.weight"] = header.tensors["token_embd.weight"]
    return sources


def pack_tensors(plan_: Plan, header: Header, base: int, packer: Packer | None = None) -> Iterator[tuple[Entry, Any]]:
    """Entries and their bytes from the mapped model at ``base``, one at a time (memory: the largest one). Raises centred.TooLarge."""
    packer, sources = packer or library(), _sources(header)
    for entry in plan_.entries:
        apart = entry.name.endswith(centred.OFFSETS)
        source = sources[centred.weight_name(entry.name) if apart else entry.name]
        data = ggml.memory_at(base + source.offset, source.nbytes)
        if apart:
            yield entry, centred.offsets(data, source.shape).tobytes()
        elif not entry.layout:
            yield entry, data
        else:
            yield entry, packer.pack(entry, data if entry.type == source.type else centred.quants(data).reshape(-1).data)


def write_header(entries: Sequence[Entry], size: int, key: str, model: str, data_offset: int) -> bytes:
    """The first pages of a packed file, padded to ``data_offset``."""
    body = _body(entries, size, key, model, data_offset)
    return (_PREFIX.pack(MAGIC, len(body), zlib.crc32(body)) + body).ljust(data_offset, b"\0")


def header_size(plan_: Plan, key: str, model: str) -> int:
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
