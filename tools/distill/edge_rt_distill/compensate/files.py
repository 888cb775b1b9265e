"""Corrections in files: the side file that edge-rt applies, and the forms that stock llama.cpp knows, a LoRA adapter and biases.

Side file: a GGUF beside the model, ``STEM.compensation.gguf``, with the tensors of `correction.PARTS` named ``blk.N.NAME.PART`` and the
fingerprint of the model it was made for. LoRA: as convert_lora_to_gguf.py writes them; llama.cpp multiplies B (A x) by alpha / rank, and
alpha is one for the file, so B of smaller ranks is scaled to make that 1.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch

from edge_rt.hooks import ModelFileError
from edge_rt_distill.compensate.correction import PARTS, Compensation, Correction
from edge_rt_distill.compensate.storage import Storage, encoded, part_type
from edge_rt_distill.files import replacing, write_error

VERSION = 1


class SideFile(NamedTuple):
    """What a side file holds. ``model``: fingerprint of the model file that it belongs to."""

    architecture: str
    model: str
    compensation: Compensation


def side_path(model: Path) -> Path:
    """Where the side file of a model is looked for."""
    return model.with_name(f"{model.stem}.compensation.gguf")


def write_side_file(path: Path, compensation: Compensation, *, architecture: str, model: str, storage: Storage) -> None:
    """Write corrections for the model with the fingerprint ``model``. Raises UserError; a file that was there is then whole still."""
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type("compensation")
    writer.add_uint32("edge_rt.compensation.version", VERSION)
    writer.add_string("edge_rt.compensation.model", model)
    for site, correction in compensation.items():
        for name, part in correction.parts():
            _add(writer, f"{site}.{name}", part, part_type(name, part.shape[-1], storage))
    _write(writer, path)


def write_lora(path: Path, compensation: Compensation, *, architecture: str, storage: Storage) -> bool:
    """Write the low rank parts as an adapter to be applied once; False, and no file, if there are none. Raises UserError."""
    pairs = {site: (one.low_a, one.low_b) for site, one in compensation.items() if one.low_a is not None and one.low_b is not None}
    if not pairs:
        return False
    alpha = max(a.shape[0] for a, _ in pairs.values())
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    for site, (a, b) in pairs.items():
        _add(writer, f"{site}.weight.lora_a", a, part_type("low_a", a.shape[1], storage))
        _add(writer, f"{site}.weight.lora_b", b * (a.shape[0] / alpha), part_type("low_b", b.shape[1], storage))
    _write(writer, path)
    return True


def bias_tensors(compensation: Compensation) -> dict[str, torch.Tensor]:
    """Biases as tensors of the model file itself, by name; the side file is then to be written `without_biases`."""
    return {f"{site}.bias": one.bias for site, one in compensation.items() if one.bias is not None}


def without_biases(compensation: Compensation) -> Compensation:
    """The rest of the corrections."""
    rest = {site: one._replace(bias=None) for site, one in compensation.items()}
    return {site: one for site, one in rest.items() if any(True for _ in one.parts())}


def read_side_file(path: str | os.PathLike[str]) -> SideFile:
    """Read a side file back, float32. Raises ModelFileError for what is none."""
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelFileError(f"{path} cannot be read as GGUF ({error}); write the side file again") from error
    if _text(reader, "general.type") != "compensation":
        raise ModelFileError(f"{path} is no side file of compensation (its general.type says so); give the one written with the model")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for tensor in reader.tensors:
        site, _, part = tensor.name.rpartition(".")
        if part not in PARTS:
            raise ModelFileError(f"{path}: the tensor {tensor.name} is no part of a correction; write the side file again")
        values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        found.setdefault(site, {})[part] = torch.from_numpy(values.reshape(tuple(int(n) for n in reversed(tensor.shape))))
    compensation = {site: Correction(**parts) for site, parts in found.items()}
    return SideFile(_text(reader, "general.architecture"), _text(reader, "edge_rt.compensation.model"), compensation)


def _text(reader: gguf.GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def _add(writer: gguf.GGUFWriter, name: str, part: torch.Tensor, type_: Storage) -> None:
    data = encoded(part, type_)
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type_])


def _write(writer: gguf.GGUFWriter, path: Path) -> None:
    try:
        with replacing(path) as part:
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise write_error(error, path) from error
