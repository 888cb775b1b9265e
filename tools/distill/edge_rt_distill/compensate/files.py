"""Corrections in files: the side file that edge-rt applies, and the forms that stock llama.cpp knows, a LoRA adapter and biases.

Side file: a GGUF beside the model, ``STEM.compensation.gguf``, with the tensors of `correction.PARTS` named ``blk.N.NAME.PART`` and the
fingerprint of the model it was made for. LoRA: as convert_lora_to_gguf.py writes them; llama.cpp multiplies B (A x) by alpha / rank, and
alpha is one for the file, so B of smaller ranks is scaled to make that 1.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

from edge_rt_distill.compensate.correction import Compensation
from edge_rt_distill.compensate.storage import Storage, encoded, part_type
from edge_rt_distill.files import replacing, write_error

VERSION = 1


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
