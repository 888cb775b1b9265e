"""Error compensation: a side file that corrects the products of a quantised model, and its tensors in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.gguf.reader import SCALED
from edge_rt.core.weights.units import unit_name
from edge_rt.errors import ModelChanged, ModelFileError, OutOfMemory, UnsupportedModel
from edge_rt.native import devices, ggml, memory

if TYPE_CHECKING:
    from edge_rt.core.gguf.reader import Header, TensorInfo
    from edge_rt.core.weights.gpu_offload import Offloaded

# Error compensation: a side file that corrects the products of a quantised model, ``STEM.compensation.gguf`` beside ``STEM.gguf``.
#
# It is a GGUF with ``general.type`` compensation, made by calibration (tools/distill) for one very model file, which its metadata names by
# fingerprint. For a weight ``blk.N.NAME.weight`` [in, out], a site, it holds any of
#
#     blk.N.NAME.low_a [in, r], .low_b [r, out]                       y += B (A x)
#     blk.N.NAME.centroids [in, K], .offsets [K], .rows [out, K]      y += rows[argmax(centroids x + offsets)]
#     blk.N.NAME.bias [out]                                           y += bias
#
# (shapes in ggml's order; offsets may be absent). It is a separate file, as stock llama.cpp refuses a model with tensors it does not know.
# A side file that is there and cannot be used is an error that says why: results would silently be worse without it.

SUFFIX = ".compensation.gguf"
KIND = "compensation"
VERSION = 1
AUTO, OFF = "auto", "off"
WITHOUT = "or run without it by --compensation off"
_PARTS = ("low_a", "low_b", "centroids", "offsets", "rows", "bias")
_PART = r"(blk\.\d+\.(?:attn_q|attn_k|attn_v|attn_output|ffn_gate|ffn_up|ffn_down))\.(" + "|".join(_PARTS) + ")"
_TYPES = ("F32", "F16", "Q8_0")
"""Of matrices; of vectors the first."""
_SAMPLES, _SAMPLE_BYTES = 32, 1024


class LowRank(NamedTuple):
    """Factors A [in, r] and B [r, out] of what is added: B (A x)."""

    a: TensorInfo
    b: TensorInfo


class Table(NamedTuple):
    """What is added is the one of ``rows`` [out, K] whose centroid [in, K] has the largest product with the input, plus its offset [K]."""

    centroids: TensorInfo
    rows: TensorInfo
    offsets: TensorInfo | None


class Site(NamedTuple):
    """The corrections of one weight's product."""

    weight: str
    low: LowRank | None
    table: Table | None
    bias: TensorInfo | None


class Compensation(NamedTuple):
    """An open side file that fits a model: its corrections by the name of the weight. ``file`` belongs to who opened it."""

    file: ModelFile
    sites: Mapping[str, Site]

    @property
    def key(self) -> str:
        """Identifies its content, as ``ModelFile.key`` does a model's: cells computed with one are of no use with another."""
        return self.file.key()

    @property
    def size(self) -> int:
        """Bytes of the corrections."""
        return sum(info.nbytes for info in self.file.header.tensors.values())

    def facts(self) -> dict[str, object]:
        """What a person may want to know: the file, how many weights it corrects and how, and its bytes."""
        sites = self.sites.values()
        kinds = {"low_rank": 0, "tables": 0, "biases": 0}
        for site in sites:
            for kind, part in zip(kinds, (site.low, site.table, site.bias), strict=True):
                kinds[kind] += part is not None
        return {"path": str(self.file.path), "sites": len(sites), **kinds, "bytes": self.size}


def compensation_fingerprint(file: ModelFile) -> str:
    """Identifies the weights of a model file: names, types and shapes of its tensors, and samples of 32 matrices.

    Neither the file's name and times nor the order of its tensors count: a compiled copy with the same weights has the same. Reads a few
    pages. It tells apart what honest tools write, and is no proof against forgery.
    """
    import hashlib  # not needed to see that there is no side file

    header = file.header
    infos = sorted(header.tensors.values())
    table = [header.architecture, *header.optional(SCALED, list, []), *(f"{one.name} {one.type_name} {one.shape}" for one in infos)]
    digest = hashlib.sha256("\n".join(table).encode())
    matrices = [info for info in infos if len(info.shape) > 1]
    for i in range(min(_SAMPLES, len(matrices))):
        info = matrices[len(matrices) * i // min(_SAMPLES, len(matrices))]
        size = min(_SAMPLE_BYTES, info.nbytes)
        digest.update(os.pread(file.fd, size, info.offset + (info.nbytes - size) // 2))  # in ``map`` a pager may have put other pages
    return digest.hexdigest()[:32]


def is_compensation(header: Header) -> bool:
    """Whether a file is a side file and no model."""
    return bool(header.get("general.type") == KIND)


def compensation_path(model: Path) -> Path:
    """Where a model's side file would be."""
    return model.with_name(model.name.removesuffix(".gguf") + SUFFIX)


def find_compensation(model: Path, asked: str | os.PathLike[str] = AUTO) -> Path | None:
    """The side file to open with a model's file, as ``asked``: a file, ``off``: None, or ``auto``: the one beside it, None without one."""
    if asked == OFF:
        return None
    if asked != AUTO:
        return Path(asked)
    found = compensation_path(model)
    return found if os.path.lexists(found) else None


def open_compensation(path: str | os.PathLike[str], model: ModelFile) -> Compensation:
    """Open the side file of a model; its ``file`` is the caller's to close. Raises ModelFileError, UnsupportedModel."""
    file: ModelFile | None = None
    try:
        file = ModelFile.open(path)
        return read_compensation(file, model)
    except ModelFileError as error:
        if file is not None:
            file.close()
        where = "" if str(error).startswith(f"{path}") else f"{path}: "
        raise type(error)(f"{where}{error}, {WITHOUT}") from None


def read_compensation(file: ModelFile, model: ModelFile) -> Compensation:
    """What an open file holds, if that is the compensation of this model. Raises ModelFileError, UnsupportedModel."""
    header = file.header
    if not is_compensation(header):
        raise ModelFileError("this is no compensation (its general.type is another); give the file that was made beside the model")
    version = header.require("edge_rt.compensation.version", int)
    if version != VERSION:
        raise UnsupportedModel(f"this compensation has version {version}, and this edge-rt reads {VERSION}; update edge-rt")
    if header.architecture != model.header.architecture:
        theirs, ours = header.architecture, model.header.architecture
        raise ModelFileError(f"the compensation is for {theirs} models and this one is {ours}; make its own")
    if header.require("edge_rt.compensation.model", str) != compensation_fingerprint(model):
        raise ModelFileError("the compensation was made for other weights than this model's; make it again for this file")
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in header.tensors.items():
        place = re.fullmatch(_PART, name)
        if place is None or f"{place[1]}.weight" not in model.header.tensors:
            raise ModelFileError(f"the tensor {name} corrects nothing that this model has; make the compensation again for this file")
        found.setdefault(f"{place[1]}.weight", {})[place[2]] = info
    if not found:
        raise ModelFileError("the compensation has no tensors, so it corrects nothing; make it again, or remove it")
    return Compensation(file, {weight: _site(model.header.tensors[weight], parts) for weight, parts in found.items()})


def _site(weight: TensorInfo, parts: Mapping[str, TensorInfo]) -> Site:
    """The corrections of one weight, if they are whole and fit it. Raises ModelFileError, UnsupportedModel."""
    for part, needed in (("low_a", "low_b"), ("low_b", "low_a"), ("centroids", "rows"), ("rows", "centroids"), ("offsets", "centroids")):
        if part in parts and needed not in parts:
            raise ModelFileError(f"{parts[part].name} is there and its {needed} is not: the compensation is incomplete; make it again")
    inner, outer = weight.shape
    rank, count = parts["low_a"].shape[-1] if "low_a" in parts else 0, parts["centroids"].shape[-1] if "centroids" in parts else 0
    shapes = {
        "low_a": (inner, rank), "low_b": (rank, outer), "centroids": (inner, count), "offsets": (count,), "rows": (outer, count),
        "bias": (outer,),
    }  # fmt: skip
    for part, info in parts.items():
        shape = shapes[part]
        if (*info.shape, 1, 1, 1)[:4] != (*shape, 1, 1, 1)[:4]:
            raise ModelFileError(f"{info.name} has the shape {info.shape} where {shape} fits {weight.name}; make the compensation again")
        types = _TYPES if len(shape) > 1 else _TYPES[:1]
        if info.type_name not in types:
            raise UnsupportedModel(f"{info.name} is {info.type_name}; make the compensation in {' or '.join(types)}")
    low = LowRank(parts["low_a"], parts["low_b"]) if rank else None
    table = Table(parts["centroids"], parts["rows"], parts.get("offsets")) if count else None
    return Site(weight.name, low, table, parts.get("bias"))


def read_tensor(file: ModelFile, info: TensorInfo) -> bytes:
    """A tensor's bytes. Raises ModelChanged if the file is no longer as long as it was."""
    data = os.pread(file.fd, info.nbytes, info.offset)
    if len(data) < info.nbytes:
        raise ModelChanged(f"{file.path} was changed while it was open; open the model again")
    return data


# The tensors of a compensation, in memory of their own: as graphs take them, for each product that they make of a block.
#
# They are few bytes and read by every step, so they are copied out of the side file once and stay, whatever limit the weights are held to.
# Where several sites share a product's input, their A and centroids stand one below the other, so that one product is enough for all, and
# their B side by side on a diagonal of a matrix that is zero elsewhere, if not much larger: each operation that a graph does without
# saves 2 to 4 us at two threads.
#
# On the CPU B is turned, and in F32: added up column by column (ggml_out_prod). As a product with rows of few elements it took three times
# as long as all else of a correction, as ggml's kernels for those go element by element (rank 8, AVX-512).

_WORTH = 32 << 10
"""Bytes of zeros that may be read to save two operations, a product and an addition: they take about as long."""
_TENSORS_PER_SITE = 6


class Outer(NamedTuple):
    """B for rows [first, first + rank) of an inner product, whose result is added from row ``row`` of the outputs on: [rank, rows], or
    ``turned`` [rows, rank].
    """

    b: int
    first: int
    rank: int
    row: int
    turned: bool


class Lookup(NamedTuple):
    """Rows [out, n], chosen by rows [first, first + n) of an inner product; added from row ``row`` of the outputs on."""

    rows: int
    first: int
    n: int
    row: int


class Inner(NamedTuple):
    """A matrix [in, height] that inputs are multiplied with, ``offsets`` [height] that are then added (0: none), and what follows."""

    a: int
    offsets: int
    outers: tuple[Outer, ...]
    lookups: tuple[Lookup, ...]


class Correction(NamedTuple):
    """What corrects one product. ``bias`` [out]: 0 if there is none."""

    inners: tuple[Inner, ...]
    bias: int

    @property
    def nodes(self) -> int:
        """Tensors that it adds to a graph at most, for each run of columns."""
        return 2 + sum(3 + 4 * len(inner.outers) + 6 * len(inner.lookups) for inner in self.inners)


class _Piece(NamedTuple):
    """Where a tensor of the file goes in a larger one: from byte ``at`` on, each row ``stride`` behind the last (0: as in the file)."""

    info: TensorInfo
    at: int = 0
    stride: int = 0


class _Filled(NamedTuple):
    """A tensor of ours, and what it is made of; zeros elsewhere."""

    tensor: int
    nbytes: int
    pieces: list[_Piece]


class _Placed(NamedTuple):
    """A weight of a product: its site, if it is one, and its rows."""

    site: Site | None
    rows: range


class _Context:
    """Tensors that are described, allocated and filled together, here or on a device. ``turned``: (from, to) of those that are turned
    once they are filled, which are in a context of their own.
    """

    def __init__(self, sites: int, *, turn: bool) -> None:
        self.handle = ggml.context(_TENSORS_PER_SITE * sites + 1)
        self.passing = ggml.context(sites + 1)
        self.filled: list[_Filled] = []
        self.turn, self.turned = turn, list[tuple[int, int]]()

    def new(self, type_: int, shape: tuple[int, ...], pieces: list[_Piece]) -> int:
        """Describe a tensor."""
        return self._filled(self.handle, type_, shape, pieces)

    def outer(self, type_: int, shape: tuple[int, int], pieces: list[_Piece]) -> int:
        """Describe a B [rank, rows], or what it is turned to."""
        if not self.turn:
            return self.new(type_, shape, pieces)
        turned = ggml.new_tensor(self.handle.address, ggml.TYPE_F32, shape[::-1])
        self.turned.append((self._filled(self.passing, type_, shape, pieces), turned))
        return turned

    def _filled(self, context: ggml.Handle, type_: int, shape: tuple[int, ...], pieces: list[_Piece]) -> int:
        tensor, rows = ggml.new_tensor(context.address, type_, shape), shape[1] if len(shape) > 1 else 1
        self.filled.append(_Filled(tensor, int(ggml.c.row_size(type_, shape[0])) * rows, pieces))
        return tensor


class Corrections:
    """The corrections of an open model's products. ``size``: bytes of the host's memory; ``nodes``: of the block that takes the most."""

    def __init__(
        self, found: Compensation, model: Header, products: Iterable[tuple[str, ...]], offloaded: Offloaded | None = None
    ) -> None:  # fmt: skip
        """``products``: names of the weights of each product that graphs make, one below the other. Reads the side file, which may be
        closed then; what corrects ``offloaded`` units is copied to them.

        Raises UnsupportedModel for a site that is in no product, ModelChanged, OutOfMemory.
        """
        self._offloaded, self._found = offloaded, dict[tuple[str, ...], Correction]()
        names, known, nodes = offloaded.weights.names if offloaded else (), set[str](), dict[str, int]()
        here, there = _Context(len(found.sites), turn=True), _Context(len(found.sites), turn=False)
        for product in products:
            known |= set(product)
            if found.sites.keys() & set(product):
                unit = unit_name(product[0])
                self._found[product] = made = _described(there if unit in names else here, _placed(product, found, model))
                nodes[unit] = nodes.get(unit, 0) + made.nodes
        if strange := next((name for name in found.sites if name not in known), None):
            raise UnsupportedModel(f"no graph here corrects {strange}; {WITHOUT[3:]}")
        self.nodes = max(nodes.values())
        self._contexts = here.handle, here.passing, there.handle, there.passing
        self._here = ggml.allocate_context(here.handle) if here.filled else None
        self._there = offloaded.allocate_context(there.handle) if offloaded and there.filled else None
        self.size = int(ggml.c.backend_buffer_get_size(self._here.address)) if self._here else 0
        with ggml.allocate_context(here.passing) if here.turned else nullcontext():
            for one in (*here.filled, *there.filled):
                _fill(one, found)
            if here.turned:
                _turn(here.turned)
        found.file.check_unchanged()

    def get(self, names: tuple[str, ...]) -> Correction | None:
        """What corrects the product with these weights, one below the other; None if nothing does."""
        return self._found.get(names)

    def close(self) -> None:
        """Give the memory back. No graph over it may run afterwards."""
        if self._here:
            self._here.close()
        if self._there and self._offloaded:
            self._offloaded.give(self._there)
            self._there = None
        for context in self._contexts:
            context.close()


def far_bytes(found: Compensation) -> Mapping[str, int]:
    """Bytes that the corrections of each unit may take on a device: with zeros, and what backends round up."""
    sizes: dict[str, int] = {}
    for weight, site in found.sites.items():
        parts = [*(site.low or ()), *(site.table or ()), site.bias]
        sizes[unit_name(weight)] = sizes.get(unit_name(weight), 0) + sum(one.nbytes + 512 for one in parts if one) + _WORTH
    return sizes


def _placed(product: Sequence[str], found: Compensation, model: Header) -> list[_Placed]:
    """The weights of a product, and where their rows are in it."""
    placed, row = list[_Placed](), 0
    for name in product:
        width = model.tensors[name].shape[1]
        placed.append(_Placed(found.sites.get(name), range(row, row + width)))
        row += width
    return placed


def _described(context: _Context, product: Sequence[_Placed]) -> Correction:
    """Describe what corrects a product."""
    lows = [(site.low, rows) for site, rows in product if site and site.low]
    tables = [(site.table, rows.start) for site, rows in product if site and site.table]
    types = dict.fromkeys([*(low.a.type for low, _ in lows), *(table.centroids.type for table, _ in tables)])
    inners = tuple(
        _inner(context, [one for one in lows if one[0].a.type == type_], [one for one in tables if one[0].centroids.type == type_])
        for type_ in types
    )
    biases = [(site.bias, rows.start) for site, rows in product if site and site.bias]
    pieces = [_Piece(bias, 4 * row) for bias, row in biases]
    return Correction(inners, context.new(ggml.TYPE_F32, (product[-1].rows.stop,), pieces) if pieces else 0)


def _inner(context: _Context, lows: list[tuple[LowRank, range]], tables: list[tuple[Table, int]]) -> Inner:
    """What follows from one product with the inputs: all A of one type, then all centroids."""
    groups = _groups(lows, 4 if context.turn else 0)
    firsts = [low.a for group in groups for low, _ in group] + [table.centroids for table, _ in tables]
    type_, width, height = firsts[0].type, firsts[0].shape[0], sum(info.shape[1] for info in firsts)
    row_bytes, at, pieces, offsets = int(ggml.c.row_size(type_, width)), 0, list[_Piece](), list[_Piece]()
    for info in firsts:
        pieces.append(_Piece(info, at * row_bytes))
        at += info.shape[1]
    outers, lookups, first = list[Outer](), list[Lookup](), 0
    for group in groups:
        rank = sum(low.b.shape[0] for low, _ in group)
        outers.append(Outer(_diagonal(context, group), first, rank, group[0][1].start, context.turn))
        first += rank
    for table, row in tables:
        count = table.centroids.shape[1]
        lookups.append(Lookup(context.new(table.rows.type, table.rows.shape, [_Piece(table.rows)]), first, count, row))
        if table.offsets:
            offsets.append(_Piece(table.offsets, 4 * first))
        first += count
    added = context.new(ggml.TYPE_F32, (height,), offsets) if offsets else 0
    return Inner(context.new(type_, (width, height), pieces), added, tuple(outers), tuple(lookups))


def _groups(lows: list[tuple[LowRank, range]], element: int) -> list[list[tuple[LowRank, range]]]:
    """Factors whose B are one matrix: of one type, and not much larger together than apart; ``element``: bytes of each (0: as they are)."""
    groups: list[list[tuple[LowRank, range]]] = []
    for type_ in dict.fromkeys(low.b.type for low, _ in lows):
        group = [one for one in lows if one[0].b.type == type_]
        more = _bytes(group, element) - sum(_bytes([one], element) for one in group)
        groups += [group] if more <= _WORTH * (len(group) - 1) else [[one] for one in group]
    return groups


def _bytes(group: list[tuple[LowRank, range]], element: int) -> int:
    """Bytes of the matrix of a group."""
    rank, rows = sum(low.b.shape[0] for low, _ in group), group[-1][1].stop - group[0][1].start
    return rows * (element * rank or int(ggml.c.row_size(group[0][0].b.type, rank)))


def _diagonal(context: _Context, group: list[tuple[LowRank, range]]) -> int:
    """All B of a group as one matrix, each in columns of its own."""
    type_, start = group[0][0].b.type, group[0][1].start
    rank = sum(low.b.shape[0] for low, _ in group)
    stride, pieces, column = int(ggml.c.row_size(type_, rank)), list[_Piece](), 0
    for low, rows in group:
        pieces.append(_Piece(low.b, (rows.start - start) * stride + column, stride))
        column += int(ggml.c.row_size(type_, low.b.shape[0]))
    return context.outer(type_, (rank, group[-1][1].stop - start), pieces)


def _fill(one: _Filled, found: Compensation) -> None:
    """Put a tensor's bytes where they belong, here or on a device."""
    data = bytearray(one.nbytes)
    for info, at, stride in one.pieces:
        source, rows = read_tensor(found.file, info), info.shape[1] if len(info.shape) > 1 else 1
        size = len(source) // rows
        if stride in (0, size):
            data[at : at + len(source)] = source
        else:
            _columns(memoryview(data), at, stride, memoryview(source), size)
    devices.write(one.tensor, memory.address_of(data), len(data))


def _turn(pairs: Sequence[tuple[int, int]]) -> None:
    """Write matrices, as single-precision floats, with their dimensions exchanged."""
    c = ggml.c
    with ggml.context(4 * len(pairs), (4 * len(pairs),)) as ctx, ggml.cpu_backend(1) as backend, ggml.allocator() as arena:
        graph = c.new_graph_custom(ctx.address, 4 * len(pairs), False)
        for source, target in pairs:
            fields = ggml.fields(source)
            floats = c.cpy(ctx.address, source, ggml.new_tensor(ctx.address, ggml.TYPE_F32, tuple(fields.ne[:2])))
            c.build_forward_expand(graph, c.cpy(ctx.address, c.transpose(ctx.address, floats), target))
        if not c.gallocr_alloc_graph(arena.address, graph):
            raise OutOfMemory("no memory to take up the compensation; close other programs")
        ggml.compute(backend, graph)


def _columns(data: memoryview, at: int, stride: int, source: memoryview, size: int) -> None:
    """Copy rows of ``size`` bytes to rows of ``stride`` bytes from ``at`` on; column by column, as there are fewer of them than rows."""
    kinds: tuple[tuple[Literal["Q", "I", "H"], int], ...] = (("Q", 8), ("I", 4), ("H", 2))
    kind, unit = next(one for one in kinds if not (size % one[1] or stride % one[1] or at % one[1]))
    wide, narrow, rows = data.cast(kind), source.cast(kind), len(source) // size
    for column in range(size // unit):
        first, step = at // unit + column, stride // unit
        wide[first : first + (rows - 1) * step + 1 : step] = narrow[column :: size // unit]
