"""Writes a deployable directory: beside its final name first, then renamed, so that there is all of it or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_rt import __version__
from edge_rt.compiler import folding
from edge_rt.compiler.gguf_file import Importance, write_gguf
from edge_rt.compiler.shape import tensor_bytes
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.weights.error_correction import open_compensation
from edge_rt.core.weights.interleave import has_tiles
from edge_rt.deployment import COMPENSATION, MODEL, PACKED, PLAN, Deployed, Plan, read, to_json
from edge_rt.errors import ModelFileError, OptionError

if TYPE_CHECKING:
    from edge_rt.compiler.target import Target
    from edge_rt.core.weights.error_correction import Compensation

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
