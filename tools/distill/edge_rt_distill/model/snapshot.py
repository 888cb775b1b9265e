"""Parameter snapshots: a folder in Hugging Face's layout, which transformers reads, with the vocabulary as a GGUF beside it.

``config.json``, ``model.safetensors`` (or shards with an index), ``vocabulary.gguf``; ``edge_rt.json`` holds what the first cannot say.
Of a model whose layers differ in channels, ``config.json`` lists them, which transformers has no model for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge_rt.hooks import ModelFileError, UnsupportedModel
from edge_rt_distill import files
from edge_rt_distill.model.architecture import FAMILIES, Architecture, LayerShape
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.tokens import Tokeniser, write_vocabulary

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_VOCABULARY, _OURS = "vocabulary.gguf", "edge_rt.json"
_TYPES: Mapping[str, str] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Hugging Face's model_type -> GGUF's architecture."""
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def save(folder: Path, model: Decoder, tokeniser: Tokeniser, dtype: torch.dtype = torch.float32) -> None:
    """Write a snapshot into a folder (made if it is not there), each file at once. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: _unrotated(model, name, tensor).to(dtype).contiguous() for name, tensor in _named(model).items()}
    with files.replacing(folder / _WEIGHTS) as part:
        save_file(weights, part, metadata={"format": "pt"})
    files.write_file(folder / _CONFIG, json.dumps(_config(model.architecture, tokeniser.end, dtype), indent=1))
    files.write_file(folder / _OURS, json.dumps(model.architecture.to_json(), indent=1))
    write_vocabulary(tokeniser.source, folder / _VOCABULARY)


def read(folder: Path, vocabulary: Path | None = None) -> tuple[Decoder, Tokeniser]:
    """The model and tokeniser in a folder. Raises ModelFileError, UnsupportedModel."""
    from edge_rt_distill.model.load import empty

    architecture = read_architecture(folder)
    source = folder / _VOCABULARY if vocabulary is None else vocabulary
    if not source.is_file():
        raise ModelFileError(f"{folder} has no {_VOCABULARY}; name a GGUF of the same tokeniser with `vocabulary`")
    tokeniser = Tokeniser(source)
    if tokeniser.size > architecture.vocabulary:
        raise ModelFileError(
            f"{source} has {tokeniser.size} tokens and the model {architecture.vocabulary}: another tokeniser; name the right one"
        )
    model, found = empty(architecture), _weights(folder)
    with torch.no_grad():
        for name, target in _named(model).items():
            if name not in found:
                raise ModelFileError(f"{folder} has no tensor {name}; copy the folder again")
            values = _rotated(model, name, found[name].float())
            if values.shape != target.shape:
                raise ModelFileError(f"{folder}: {name} has shape {tuple(values.shape)} where {tuple(target.shape)} is expected")
            target.copy_(values)
    return model, tokeniser


def digest(folder: Path) -> str:
    """SHA-256 over a folder's weights and sizes."""
    found = hashlib.sha256()
    for path in sorted([folder / _CONFIG, *folder.glob("*.safetensors")]):
        found.update(path.name.encode())
        for piece in files.pieces(path):
            found.update(piece)
    return found.hexdigest()


def read_architecture(folder: Path) -> Architecture:
    """The sizes of the model in a folder. Raises ModelFileError, UnsupportedModel."""
    if (folder / _OURS).is_file():
        return Architecture.from_json(_json(folder / _OURS))
    config = _json(folder / _CONFIG)
    kind = str(config.get("model_type"))
    if kind not in _TYPES:
        raise UnsupportedModel(f"{folder}: models of type {kind} cannot be taught here; choose one of {', '.join(_TYPES)}")
    family = _TYPES[kind]
    try:
        heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
        shape = LayerShape(heads, int(config.get("num_key_value_heads") or heads), int(config["intermediate_size"]))
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        return Architecture(
            family=family, vocabulary=int(config["vocab_size"]), width=width, head=int(config.get("head_dim") or width // heads),
            layers=(shape,) * int(config["num_hidden_layers"]), tied=bool(config.get("tie_word_embeddings", family != "llama")),
            norm_epsilon=float(config["rms_norm_eps"]), rope_base=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope=FAMILIES[family], context=int(config["max_position_embeddings"]),
            qkv_bias=family == "qwen2" or bool(config.get("attention_bias")), qk_norm=family == "qwen3", rope_scale=_scale(folder, rope),
        )  # fmt: skip
    except KeyError as error:
        raise ModelFileError(f"{folder / _CONFIG} does not say {error}; copy the folder again") from None


def _scale(folder: Path, rope: Mapping[str, Any]) -> float:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear"):
        raise UnsupportedModel(f"{folder}: positions scaled by {kind} cannot be read from here; convert it to GGUF and teach from that")
    return float(rope.get("factor", 1.0)) if kind == "linear" else 1.0


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist; a model is a .gguf file, or a folder with {_CONFIG} and {_WEIGHTS}") from None
    except (ValueError, OSError) as error:
        raise ModelFileError(f"{path} cannot be read ({error}); copy the folder again") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{path} is no JSON object; copy the folder again")
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    index = folder / _INDEX
    files = sorted(set(_json(index)["weight_map"].values())) if index.is_file() else [_WEIGHTS]
    found: dict[str, Tensor] = {}
    for name in files:
        try:
            found.update(load_file(folder / name))
        except (OSError, SafetensorError) as error:
            raise ModelFileError(f"{folder / name} cannot be read ({error}); copy the folder again") from None
    return found


def _named(model: Decoder) -> dict[str, Tensor]:
    """Every tensor by its Hugging Face name; shared layers stand once for each."""
    from edge_rt_distill.model.load import tensors

    found = {}
    for name, tensor in tensors(model).items():
        parts = name.split(".")
        if parts[0] == "blk":
            found[f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{parts[3]}"] = tensor
        else:
            found[{"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[parts[0]] + ".weight"] = tensor
    return found


def _turns(model: Decoder, name: str) -> bool:
    return model.architecture.rope == "interleaved" and any(part in name for part in ("q_proj", "k_proj"))


def _rotated(model: Decoder, name: str, values: Tensor) -> Tensor:
    """Rows of queries and keys from Hugging Face's order, in which halves rotate together, to ours."""
    if not _turns(model, name):
        return values
    head = model.architecture.head
    return values.reshape(-1, 2, head // 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def _unrotated(model: Decoder, name: str, values: Tensor) -> Tensor:
    if not _turns(model, name):
        return values
    head = model.architecture.head
    return values.detach().reshape(-1, head // 2, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def _config(a: Architecture, end: int, dtype: torch.dtype) -> dict[str, Any]:
    if not a.same_heads:
        raise UnsupportedModel("a snapshot needs as many heads in every layer; cut heads alike everywhere")
    shape = a.layers[0]
    if a.rope_factors:
        raise UnsupportedModel("a snapshot cannot say this model's factors of rotation; keep its GGUF")
    scaling = {"rope_type": "linear", "factor": a.rope_scale} if a.rope_scale != 1 else None
    channels = shape.ffn if a.even else [one.ffn for one in a.layers]
    classes = [_CLASSES[a.family]] if a.family in _CLASSES else []
    return {
        "architectures": classes, "model_type": a.family, "vocab_size": a.vocabulary, "hidden_size": a.width,
        "intermediate_size": channels, "num_hidden_layers": len(a.layers), "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": a.head, "hidden_act": "silu", "max_position_embeddings": a.context,
        "rms_norm_eps": a.norm_epsilon, "rope_theta": a.rope_base, "rope_scaling": scaling, "tie_word_embeddings": a.tied,
        "attention_bias": a.qkv_bias and a.family == "llama", "eos_token_id": end, "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
