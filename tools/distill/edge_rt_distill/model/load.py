"""Reads a teacher: a GGUF of any type, or a folder in Hugging Face's layout (our snapshots are such folders)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edge_rt.hooks import ModelConfig, ModelFile, ModelFileError, UnsupportedModel, read_config
from edge_rt_distill.model.architecture import FAMILIES, Architecture, LayerShape
from edge_rt_distill.model.decoder import LINEARS, Decoder
from edge_rt_distill.model.tokens import Tokeniser


class Teacher(NamedTuple):
    """A model that is looked at and not changed: float32, no gradients. ``digest``: SHA-256 of what it was read from."""

    model: Decoder
    tokeniser: Tokeniser
    origin: Path
    digest: str


def load(path: str | os.PathLike[str], vocabulary: str | os.PathLike[str] | None = None) -> Teacher:
    """Read a model. ``vocabulary``: a GGUF of the same tokeniser, for folders that bring none.

    Raises ModelFileError, or UnsupportedModel for architectures that cannot be taught here.
    """
    where = Path(path)
    if where.is_dir():
        from edge_rt_distill.model import snapshot

        model, tokeniser = snapshot.read(where, None if vocabulary is None else Path(vocabulary))
        return Teacher(frozen(model), tokeniser, where, snapshot.digest(where))
    model = read_gguf(where)
    with where.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file.read())
    return Teacher(frozen(model), Tokeniser(where), where, digest)


def _digest(data: bytes) -> str:  # Python 3.10
    return hashlib.sha256(data).hexdigest()


def frozen(model: Decoder) -> Decoder:
    """The model, as something that is only looked at."""
    return model.eval().requires_grad_(False)


def read_gguf(path: Path) -> Decoder:
    """The model in a GGUF file, dequantised to float32. Raises ModelFileError, UnsupportedModel."""
    file = ModelFile.open(path)
    try:
        architecture = read_architecture(file)
        model = empty(architecture)
        for name, target in tensors(model).items():
            if name not in file.header.tensors:
                raise ModelFileError(f"{path}: the tensor {name} is missing; the file is damaged, or of a kind that cannot be taught here")
            _fill(target, name, read_tensor(file, name))
        unknown = sorted(set(file.header.tensors) - set(tensors(model)) - {"rope_freqs.weight"})
        if unknown:
            raise UnsupportedModel(f"{path}: the tensor {unknown[0]} has no place in what is taught here; choose another teacher")
    finally:
        file.close()
    return model


def empty(architecture: Architecture) -> Decoder:
    """A decoder whose weights are not set yet (making random ones takes seconds)."""
    with torch.device("meta"):
        model = Decoder(architecture)
    return model.to_empty(device="cpu")


def tensors(model: Decoder) -> dict[str, Tensor]:
    """Every tensor by its GGUF name, in the order in which a forward pass touches them. Those of shared layers stand once for each."""
    found: dict[str, Tensor] = {"token_embd.weight": model.token_embd.weight}
    for i, layer in enumerate(model.layers):
        for name in ("attn_norm", *LINEARS[:3], "attn_q_norm", "attn_k_norm", "attn_output", "ffn_norm", *LINEARS[4:]):
            module = getattr(layer, name)
            if module is not None:
                found[f"blk.{i}.{name}.weight"] = module.weight
                if getattr(module, "bias", None) is not None:
                    found[f"blk.{i}.{name}.bias"] = module.bias
    found["output_norm.weight"] = model.output_norm.weight
    if model.output is not None:
        found["output.weight"] = model.output.weight
    return found


def _fill(target: Tensor, name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    if tuple(values.shape) != tuple(target.shape):
        expected = tuple(target.shape)
        raise ModelFileError(f"the tensor {name} has shape {tuple(values.shape)} where {expected} is expected; the file is damaged")
    with torch.no_grad():
        target.copy_(torch.from_numpy(values))


def read_tensor(file: ModelFile, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A tensor as float32, in NumPy's order of dimensions."""
    import gguf

    info = file.header.tensors[name]
    raw = np.frombuffer(file.map, np.uint8, info.nbytes, info.offset)
    shape = info.shape[::-1]
    kind = gguf.GGMLQuantizationType(info.type)
    if kind == gguf.GGMLQuantizationType.F32:
        plain: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = raw.view(np.float32).reshape(shape).copy()
        return plain
    rows = raw.reshape(-1, info.nbytes // max(1, int(np.prod(shape[:-1]))))
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = gguf.quants.dequantize(rows, kind).astype(np.float32, copy=False)
    return np.ascontiguousarray(values.reshape(shape))


def read_architecture(file: ModelFile) -> Architecture:
    """The sizes of the model in a GGUF file. Raises ModelFileError, UnsupportedModel."""
    header = file.header
    if header.architecture not in FAMILIES:
        raise UnsupportedModel(f"{file.path}: models of architecture {header.architecture} cannot be taught here; {_known()}")
    config = read_config(header)
    _check(file, config)
    widths = (header.tensors.get(f"blk.{i}.ffn_gate.weight") for i in range(config.n_layer))
    layers = tuple(LayerShape(config.n_head, config.n_head_kv, one.shape[-1] if one else config.n_ff) for one in widths)
    factors = read_tensor(file, "rope_freqs.weight") if "rope_freqs.weight" in header.tensors else np.empty(0)
    return Architecture(
        family=header.architecture, vocabulary=config.n_vocab, width=config.n_embd, head=config.head_dim, layers=layers,
        tied="output.weight" not in header.tensors, norm_epsilon=config.eps, rope_base=config.rope.base,
        rope=FAMILIES[header.architecture], context=config.train_context, qkv_bias="blk.0.attn_q.bias" in header.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in header.tensors, rope_factors=tuple(map(float, factors)), rope_scale=1 / config.rope.scale,
    )  # fmt: skip


def _known() -> str:
    return f"choose one of {', '.join(FAMILIES)} (Mistral and SmolLM are llama)"


def _check(file: ModelFile, config: ModelConfig) -> None:
    """Raise UnsupportedModel for what the decoder here would compute differently."""
    rope = config.rope
    reasons = (
        (config.n_expert > 0, "mixtures of experts"),
        (rope.dims != config.head_dim, "heads of which only a part rotates"),
        (rope.ext_factor != 0 or rope.attn_factor != 1, "YaRN's scaling of positions"),
        (abs(config.attention_scale * config.head_dim**0.5 - 1) > 1e-6, "a scale of attention of their own"),
        ("blk.0.attn_qkv.weight" in file.header.tensors, "queries, keys and values in one matrix"),
    )
    for applies, what in reasons:
        if applies:
            raise UnsupportedModel(f"{file.path}: models with {what} cannot be taught here; choose another teacher")
