"""Writes a decoder and its vocabulary as a GGUF that edge-rt and stock llama.cpp run.

Tensors lie in the order in which a forward pass touches them, each at a multiple of 4096 bytes, so that edge-rt reads a block's weights in
one piece (docs/compiler.md). Layers that share parameters are written out: GGUF has no second name for a tensor.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_rt.hooks import GGML_TYPES, ModelFile, ModelFileError, OptionError, UnsupportedModel, gguf_metadata_spans
from edge_rt_distill import files, metadata
from edge_rt_distill.model.architecture import Architecture
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.load import tensors as named_tensors
from edge_rt_distill.model.tokens import Tokeniser
from edge_rt_distill.portable import family
from edge_rt_distill.progress import Told, quiet
from edge_rt_distill.quantise.matrices import Encoded, encode

ALIGNMENT = 4096
PROVENANCE = "edge_rt.distill."
"""What the keys begin with that say where a student comes from."""
How = str | Encoded
"""A ggml type, or the bytes themselves with their type."""
_NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_HALF = 65520.0
"""What rounds to infinity in float16, and all beyond."""
_KEPT = ("tokenizer.", "general.")
_DROPPED = (
    "general.architecture", "general.name", "general.alignment", "general.file_type", "general.quantization_version", "general.size_label",
)  # fmt: skip
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25}
"""ggml type of most weights -> llama.cpp's number of such a file, which it shows to the user."""


class _Placed(NamedTuple):
    """A tensor of the file: ``shape`` as NumPy has it, ``make`` gives its bytes, ``offset`` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    offset: int
    make: Callable[[], npt.NDArray[Any]]


def export(
    path: str | os.PathLike[str],
    model: Decoder,
    tokeniser: Tokeniser,
    *,
    matrices: str = "F16",
    embedding: str = "F16",
    how: Mapping[str, How] | None = None,
    biases: Mapping[str, Tensor] | None = None,
    name: str = "student",
    provenance: Mapping[str, metadata.Value] | None = None,
    told: Told = quiet,
) -> Path:
    """Write the model; vectors are F32. The file appears under its name when it is whole.

    ``matrices``, ``embedding`` (and head): ggml types; ``how``: by GGUF name ("blk.0.attn_q.weight") where one is to be different, or is
    there as bytes. ``biases``: vectors by GGUF name ("blk.0.ffn_down.bias") that are added behind products, to the model's own where it has
    some; stock llama.cpp knows them of a llama. ``provenance``: what is said of the student's origin, under ``PROVENANCE``. ``told``: bytes
    written, of how many.
    Raises UnsupportedModel for layers of different sizes that the runtimes have no graph for, OptionError for types that do not fit or
    weights that are not finite, ModelFileError for another model's vocabulary, UserError where it cannot be written.
    """
    target, how = Path(path), dict(how or {})
    file = ModelFile.open(tokeniser.source)
    try:
        words = len(file.header.raw_strings("tokenizer.ggml.tokens"))
        architecture = _checked(model, words)
        types = {"matrices": matrices, "embedding": embedding}
        placed = _place(_with_biases(_tensors(model, words), architecture, biases or {}), model, types, how)
        header = _header(file, architecture, placed, words, name, dict(provenance or {}))
    finally:
        file.close()
    try:
        with files.replacing(target) as part:
            _write(part, header, placed, told)
    except OSError as error:
        raise files.write_error(error, target, len(header) + placed[-1].offset + placed[-1].nbytes) from error
    return target


def _checked(model: Decoder, words: int) -> Architecture:
    """The architecture, if a GGUF of it can be run."""
    a = model.architecture
    if not a.same_heads:
        raise UnsupportedModel("the layers have different numbers of heads, which the runtime has no graph for; cut all alike")
    if (wanted := family(model)) != a.family:
        raise UnsupportedModel(f"stock llama.cpp runs no {a.family} of these sizes; make it a {wanted} first (portable)")
    if words > a.vocabulary:
        raise ModelFileError(
            f"the vocabulary has {words} tokens, the model {a.vocabulary}: it belongs to another model; name the right one"
        )
    return a


def _tensors(model: Decoder, words: int) -> dict[str, Tensor]:
    """Every tensor by name in the file's order: that of the forward pass, biases of attention behind its three matrices, read in one go.

    Rows of the embedding that no token has (some makers pad it) are left out: llama.cpp wants as many as there are tokens.
    """
    found = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    names = list(found)
    for name in [name for name in names if name.endswith(".bias")]:
        last = name.rsplit(".", 2)[0] + ".attn_v.weight"
        names.remove(name)
        place = names.index(last) + 1
        while names[place].endswith(".bias"):
            place += 1
        names.insert(place, name)
    ordered = {name: found[name][:words] if name in ("token_embd.weight", "output.weight") else found[name] for name in names}
    if model.architecture.rope_factors:
        ordered["rope_freqs.weight"] = torch.tensor(model.architecture.rope_factors)
    return ordered


def _with_biases(found: dict[str, Tensor], a: Architecture, biases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with biases, each behind its matrix, or added to the one that is there. Raises OptionError, UnsupportedModel."""
    strange = sorted(name for name in biases if f"{name.removesuffix('.bias')}.weight" not in found or not name.endswith(".bias"))
    if strange:
        raise OptionError(f"the model has no matrix for {strange[0]}; name biases as blk.0.ffn_down.bias")
    new = {name for name in biases if name not in found}
    if new and a.family not in ("llama", "deci"):
        raise UnsupportedModel(f"stock llama.cpp reads no {min(new)} of a {a.family}; leave biases in the side file")
    ordered = {}
    for name, tensor in found.items():
        ordered[name] = tensor + biases[name] if name in biases else tensor
        bias = f"{name.removesuffix('.weight')}.bias"
        if bias in new:
            ordered[bias] = biases[bias].detach()
    return ordered


def _place(tensors: Mapping[str, Tensor], model: Decoder, types: Mapping[str, str], how: Mapping[str, How]) -> list[_Placed]:
    """Where each tensor lies, as what. Raises OptionError."""
    unknown = sorted(set(how) - set(tensors))
    if unknown:
        raise OptionError(f"the model has no tensor {unknown[0]}; name one that it has, such as {next(iter(tensors))}")
    placed, offset = [], 0
    for name, tensor in tensors.items():
        one: How = "F32" if tensor.ndim == 1 else types["embedding" if not name.startswith("blk.") else "matrices"]
        one = how.get(name, how.get(_own(model, name), one))
        type_name = one if isinstance(one, str) else one.type
        if type_name not in _NUMBERS:
            raise OptionError(f"there is no type {type_name}; choose one of {', '.join(_NUMBERS)}")
        _, block, size = GGML_TYPES[_NUMBERS[type_name]]
        if tensor.shape[-1] % block:
            raise OptionError(f"{name} has rows of {tensor.shape[-1]}, no multiple of {type_name}'s {block}; choose another type")
        nbytes = tensor.numel() // block * size
        placed.append(_Placed(name, tuple(tensor.shape), type_name, nbytes, offset, partial(_bytes, name, tensor, one)))
        offset = -(-(offset + nbytes) // ALIGNMENT) * ALIGNMENT
    return placed


def _own(model: Decoder, name: str) -> str:
    """The tensor's name in the layer whose parameters it is: bytes are given once for layers that share them."""
    parts = name.split(".")
    return ".".join(["blk", str(model.architecture.owner(int(parts[1]))), *parts[2:]]) if parts[0] == "blk" else name


def _bytes(name: str, tensor: Tensor, how: How) -> npt.NDArray[Any]:
    """A tensor as the file has it. Raises OptionError for weights that the type cannot hold."""
    if isinstance(how, Encoded):
        rows = how.data[: tensor.shape[0]]
        if rows.nbytes != tensor.numel() // GGML_TYPES[_NUMBERS[how.type]][1] * GGML_TYPES[_NUMBERS[how.type]][2]:
            raise OptionError(f"the bytes given for {name} are not {how.type} of shape {tuple(tensor.shape)}; quantise the model again")
        return rows
    values = tensor.float().contiguous()
    if not bool(torch.isfinite(values).all()):
        raise OptionError(f"{name} has weights that are not finite; the training diverged or the model is damaged")
    if how == "F32":
        return values.numpy().astype("<f4", copy=False)
    if how == "F16":
        if float(values.abs().max()) >= _HALF:
            raise OptionError(f"{name} has weights beyond what F16 can hold; choose F32 or BF16")
        return values.numpy().astype("<f2")
    return encode(values if values.ndim == 2 else values.unsqueeze(0), how).data


def _header(
    file: ModelFile, architecture: Architecture, placed: list[_Placed], words: int, name: str, provenance: Mapping[str, metadata.Value]
) -> bytes:
    """Magic to tensor infos, padded: the source's vocabulary and its maker's words, this model's sizes."""
    mine = _metadata(architecture, placed, words, name)
    mine.update({PROVENANCE + key: value for key, value in provenance.items()})
    _, spans = gguf_metadata_spans(file.map)
    entries = [metadata.entry("general.architecture", architecture.family)]
    entries += [bytes(file.map[start:end]) for key, start, end in spans if key.startswith(_KEPT) and key not in _DROPPED]
    entries += [metadata.entry(key, value) for key, value in mine.items()]
    infos = [
        metadata.string(one.name)
        + struct.pack(f"<I{len(one.shape)}QIQ", len(one.shape), *reversed(one.shape), _NUMBERS[one.type], one.offset)
        for one in placed
    ]
    header = metadata.start(len(placed), len(entries)) + b"".join(entries) + b"".join(infos)
    return header + b"\0" * (-len(header) % ALIGNMENT)


def _metadata(a: Architecture, placed: list[_Placed], words: int, name: str) -> dict[str, metadata.Value]:
    """What this model's file says of itself, but for where it comes from."""
    shape = a.layers[0]
    weights = Counter[str]()
    for one in placed:
        weights[one.type] += prod(one.shape) if one.name.startswith("blk.") else 0
    sizes: dict[str, metadata.Value] = {
        "block_count": len(a.layers),
        "context_length": a.context,
        "embedding_length": a.width,
        "feed_forward_length": shape.ffn if a.even else [one.ffn for one in a.layers],
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": a.head,
        "attention.value_length": a.head,
        "attention.layer_norm_rms_epsilon": a.norm_epsilon,
        "rope.dimension_count": a.head,
        "rope.freq_base": a.rope_base,
        "vocab_size": words,
    }
    if a.rope_scale != 1:
        sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": a.rope_scale}
    general: dict[str, metadata.Value] = {"general.name": name, "general.alignment": ALIGNMENT, "general.quantization_version": 2}
    most = weights.most_common(1)[0][0]
    if most in _FILE_TYPES:
        general["general.file_type"] = _FILE_TYPES[most]
    return general | {f"{a.family}.{key}": value for key, value in sizes.items()}


def _write(part: Path, header: bytes, placed: list[_Placed], told: Told) -> None:
    """All of the file."""
    total, done = sum(one.nbytes for one in placed), 0
    with part.open("wb") as out:
        out.write(header)
        for one in placed:
            data = one.make()
            assert data.nbytes == one.nbytes, one.name
            out.write(np.ascontiguousarray(data).tobytes())
            out.write(b"\0" * (-one.nbytes % ALIGNMENT))
            done += one.nbytes
            told(done, total)
