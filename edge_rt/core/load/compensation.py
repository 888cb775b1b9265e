"""Error compensation: a side file that corrects the products of a quantised model, ``STEM.compensation.gguf`` beside ``STEM.gguf``.

It is a GGUF with ``general.type`` compensation, made by calibration (tools/distill) for one very model file, which its metadata names by
fingerprint. For a weight ``blk.N.NAME.weight`` [in, out], a site, it holds any of

    blk.N.NAME.low_a [in, r], .low_b [r, out]                       y += B (A x)
    blk.N.NAME.centroids [in, K], .offsets [K], .rows [out, K]      y += rows[argmax(centroids x + offsets)]
    blk.N.NAME.bias [out]                                           y += bias

(shapes in ggml's order; offsets may be absent). It is a file of its own, as stock llama.cpp refuses a model with tensors it does not know.
A side file that is there and cannot be used is an error that says why: results would silently be worse without it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.load.header import SCALED
from edge_rt.core.load.model_file import ModelFile
from edge_rt.errors import ModelChanged, ModelFileError, UnsupportedModel

if TYPE_CHECKING:
    from edge_rt.core.load.header import Header, TensorInfo

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


def beside(model: Path) -> Path:
    """Where a model's side file would be."""
    return model.with_name(model.name.removesuffix(".gguf") + SUFFIX)


def find(model: Path, asked: str | os.PathLike[str] = AUTO) -> Path | None:
    """The side file to open with a model's file, as ``asked``: a file, ``off``: None, or ``auto``: the one beside it, None without one."""
    if asked == OFF:
        return None
    if asked != AUTO:
        return Path(asked)
    found = beside(model)
    return found if os.path.lexists(found) else None


def open_compensation(path: str | os.PathLike[str], model: ModelFile) -> Compensation:
    """Open the side file of a model; its ``file`` is the caller's to close. Raises ModelFileError, UnsupportedModel."""
    file: ModelFile | None = None
    try:
        file = ModelFile.open(path)
        return read(file, model)
    except ModelFileError as error:
        if file is not None:
            file.close()
        where = "" if str(error).startswith(f"{path}") else f"{path}: "
        raise type(error)(f"{where}{error}, {WITHOUT}") from None


def read(file: ModelFile, model: ModelFile) -> Compensation:
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
