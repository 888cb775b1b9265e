"""Writes a deployable directory: all of it or nothing; the model's GGUF again by a plan, packed weights, checksums."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from edge_rt import __version__
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.gguf.reader import FOLDED, GGML_TYPES, MAGIC, SCALED, TensorInfo, gguf_metadata_spans
from edge_rt.core.weights.error_correction import open_compensation
from edge_rt.core.weights.interleave import has_tiles
from edge_rt.deploy import folding
from edge_rt.deploy.cost import tensor_bytes
from edge_rt.deploy.plan import COMPENSATION, MODEL, PACKED, PLAN, Deployed, Plan, read, to_json
from edge_rt.errors import ModelFileError, OptionError
from edge_rt.native import memory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.core.weights.error_correction import Compensation
    from edge_rt.deploy.target import Target

# Writes a model's GGUF again by a plan: tensors in another order, alignment or type, with the same metadata.
#
# Any reader of GGUF takes the result. Layout as in core/gguf/reader.py; offsets follow each other, padded to the alignment alone, which
# llama.cpp insists on.

_NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_PIECE = 8 << 20
"""Bytes that are copied at once."""
_ROWS = 4 << 20
"""Elements that are converted at once."""
Importance = Mapping[str, "npt.NDArray[np.float32]"]


class _Placed(NamedTuple):
    """A tensor of the new file: where it comes from, its type there, and its offset from the start of the data."""

    source: TensorInfo
    type_name: str
    nbytes: int
    offset: int


def write_gguf(
    source: ModelFile, out: BinaryIO, plan: Plan, importance: Importance | None = None, told: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Write the model as the plan has it. ``told`` is called with bytes done and in all.

    Raises OptionError, OSError, NativeError, ModelFileError if the source is no longer what was planned for.
    """
    placed, changed = _place(source, plan), folding.multiplied(source, plan)
    header = _header(source, plan, placed, folding.without_adapters(source, changed))
    out.write(header + b"\0" * (-len(header) % plan.alignment))
    done, total = 0, sum(one.nbytes for one in placed)
    for one in placed:
        powers, importances = changed.get(one.source.name), importance or {}
        for piece in _data(source, one, importances) if powers is None else folding.scaled_pieces(source, one.source, powers):
            out.write(piece)
            done += len(piece)
            told(done, total)
        out.write(b"\0" * (-one.nbytes % plan.alignment))


def _place(source: ModelFile, plan: Plan) -> list[_Placed]:
    tensors = source.header.tensors
    names = [name for name in plan.order if name in tensors]
    names += [name for name in tensors if name not in plan.order]
    placed, offset = [], 0
    for name in names:
        info = tensors[name]
        type_name = plan.types.get(name, info.type_name)
        if type_name not in _NUMBERS:
            raise OptionError(f"there is no type {type_name}; choose from {', '.join(_NUMBERS)}")
        nbytes = tensor_bytes(info.shape, type_name)
        placed.append(_Placed(info, type_name, nbytes, offset))
        offset = -(-(offset + nbytes) // plan.alignment) * plan.alignment
    return placed


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _strings(key: str, texts: Sequence[str]) -> bytes:
    """A metadata entry that is an array of strings."""
    return _string(key) + struct.pack("<IIQ", _ARRAY, _STRING, len(texts)) + b"".join(map(_string, texts))


def _header(source: ModelFile, plan: Plan, placed: list[_Placed], scaled: Sequence[str]) -> bytes:
    """Magic to tensor infos. The metadata's bytes are the source's, but for the alignment, and for what the plan adds."""
    raw = bytes(source.map[: source.header.data_offset])
    _, spans = gguf_metadata_spans(raw)
    kept = [raw[start:end] for key, start, end in spans if key not in ("general.alignment", "edge_rt.target", FOLDED, SCALED)]
    kept.append(_string("general.alignment") + struct.pack("<II", _UINT32, plan.alignment))
    kept.append(_string("edge_rt.target") + struct.pack("<I", _STRING) + _string(plan.target))
    kept += [_strings(key, texts) for key, texts in ((FOLDED, plan.folded), (SCALED, scaled)) if texts]
    infos = [
        _string(one.source.name)
        + struct.pack(f"<I{len(one.source.shape)}QIQ", len(one.source.shape), *one.source.shape, _NUMBERS[one.type_name], one.offset)
        for one in placed
    ]
    return MAGIC + struct.pack("<IQQ", 3, len(placed), len(kept)) + b"".join(kept) + b"".join(infos)


def _data(source: ModelFile, one: _Placed, importance: Importance) -> Iterator[bytes]:
    """A tensor's bytes, in pieces."""
    info = one.source
    if one.type_name == info.type_name:
        for start in range(0, info.nbytes, _PIECE):
            yield source.map[info.offset + start : info.offset + min(info.nbytes, start + _PIECE)]
        return
    from edge_rt.native.ggml import quantise_rows

    for rows in float_rows(source, info):
        yield quantise_rows(rows, _NUMBERS[one.type_name], importance.get(info.name))


def float_rows(source: ModelFile, info: TensorInfo, most: int | None = None) -> Iterator[npt.NDArray[np.float32]]:
    """A tensor's rows [n, width] as float32, ``most`` at a time; of three dimensions those of the first matrix first."""
    from edge_rt.core.kv.ops import token_embeddings
    from edge_rt.native import ggml

    width, count = info.shape[0], prod(info.shape[1:])
    with ggml.context(1) as ctx, ggml.cpu_backend(1) as backend:
        base = memory.address_of(source.map)
        with ggml.buffer_from_address(base, len(source.map)) as buffer:
            tensor = ggml.new_tensor(ctx.address, info.type, (width, count))
            ggml.place(tensor, buffer.address, base + info.offset)
            step = most or max(1, _ROWS // width)
            for first in range(0, count, step):
                yield token_embeddings(tensor, range(first, min(count, first + step)), backend)


# Writes a deployable directory: beside its final name first, then renamed, so that there is all of it or nothing.

Progress = Callable[[str, int, int], None]


def write(
    source: ModelFile, target: Target, plan: Plan, folder: Path, *, here: bool, importance: Importance | None = None,
    progress: Progress = lambda *_: None, compensation: Compensation | None = None,
) -> Deployed:  # fmt: skip
    """Write the model as the plan has it to a directory that does not exist, or that an earlier compilation made.

    ``here``: the target has this machine's library and CPU, which then packs the weights. For other CPUs they are packed in the layouts
    that the library takes there (core/weights/interleave.py). Tiles of AMX are made when the model is first opened there.
    ``compensation``: the source's, which is copied; the plan must leave its weights as they are.
    Raises OptionError, ModelFileError, NativeError.
    """
    if folder.exists() and not (folder / PLAN).is_file():
        raise OptionError(f"{folder} is there already and was not made by edge-rt compile; choose another directory with --output")
    copies = 2 if _packs(target, plan, here) else 1
    needed = copies * sum(tensor_bytes(t.shape, plan.types.get(t.name, t.type_name)) for t in source.header.tensors.values())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder.parent).free) < needed:
            raise OptionError(f"{folder} needs {needed >> 20}M and {free >> 20}M are free there; free space or choose another --output")
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise OptionError(f"cannot write {folder}: {(error.strerror or str(error)).lower()}; choose another --output") from error
    try:
        _fill(part, source, target, plan, here, importance, progress, compensation)
        _replace(part, folder)
    except OSError as error:
        raise OptionError(f"cannot write {folder}: {(error.strerror or str(error)).lower()}; choose another --output") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # empty, or gone, unless something failed
    return read(folder)


def _fill(
    part: Path, source: ModelFile, target: Target, plan: Plan, here: bool, importance: Importance | None, progress: Progress,
    compensation: Compensation | None,
) -> None:  # fmt: skip
    with open(part / MODEL, "wb") as out:
        write_gguf(source, out, plan, importance, lambda done, total: progress("writing", done, total))
        out.flush()
        os.fsync(out.fileno())
    with ModelFile.open(part / MODEL) as written:
        folding.check(written, plan)
        if compensation is not None:
            (part / COMPENSATION).write_bytes(compensation.file.map)
            open_compensation(part / COMPENSATION, written).file.close()  # or it does not fit
        if _packs(target, plan, here):
            from edge_rt.core.weights.repack import interleaver, write_beside

            write_beside(written, progress, None if here else interleaver(target.features))
    files = {name: sha256(part / name) for name in (MODEL, PACKED, COMPENSATION) if (part / name).exists()}
    provenance: dict[str, Any] = {
        "edge_rt": __version__,
        "source": source.path.name,
        "source_bytes": source.identity.size,
        "source_sha256": sha256(source.path),
        "target": target.name,
        "target_basis": "measured" if target.measured else "projected",
    }
    (part / PLAN).write_text(to_json(plan, files, provenance), encoding="utf-8")
    os.chmod(part, 0o755)


def _packs(target: Target, plan: Plan, here: bool) -> bool:
    """Whether packed weights are written."""
    return plan.pack and (here or (target.profile.kind == "cpu" and not has_tiles(target.features)))


def _replace(part: Path, folder: Path) -> None:
    """Put the new directory in the place of an old one."""
    if not folder.exists():
        os.rename(part, folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    os.rename(folder, old / folder.name)
    try:
        os.rename(part, folder)
    except OSError:
        os.rename(old / folder.name, folder)
        raise
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(old)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def verify(deployed: Deployed) -> None:
    """Compare a directory's files with the checksums of its plan. Raises ModelFileError."""
    expected: Mapping[str, str] = deployed.files
    for name, digest in expected.items():
        path = deployed.folder / name
        if not path.is_file():
            raise ModelFileError(f"{path} is missing; compile the model again")
        if sha256(path) != digest:
            raise ModelFileError(f"{path} is not what was compiled: its SHA-256 differs; copy it again, or compile the model again")
