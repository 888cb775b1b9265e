"""Which models the engine runs: llama-like decoders, and what differs between them. Told from a header, without PyTorch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.hooks import ModelConfig, UnsupportedModel, read_config

if TYPE_CHECKING:
    from edge_rt.hooks import ModelFile


class Family(NamedTuple):
    """``neighbours``: rotary pairs are neighbours, else the halves of a head. ``head_norms``: queries and keys are normalised head by head.
    ``factors``: the file may have factors for rotary frequencies.
    """

    neighbours: bool = False
    head_norms: bool = False
    factors: bool = False


FAMILIES = {
    "llama": Family(neighbours=True, factors=True),  # Mistral, Mixtral, SmolLM and TinyLlama too
    "qwen2": Family(),
    "qwen3": Family(head_norms=True),
    "qwen3moe": Family(head_norms=True),
}

TYPES = frozenset(
    {
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
        "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
    }
)  # fmt: skip
"""Element types that gguf can dequantise."""

_BESIDE = r"token_embd\.weight|output_norm\.weight|output\.(weight|bias)|rope_freqs\.weight"
_ATTENTION = r"(attn|ffn)_norm\.weight|attn_(q|k|v|qkv|output)\.(weight|bias)"
_DENSE, _EXPERTS = r"ffn_(gate|up|down)\.(weight|bias)", r"ffn_gate_inp\.weight|ffn_(gate|up|down)_exps\.weight"
_HEAD_NORMS = r"attn_(q|k)_norm\.weight"


def unsupported(file: ModelFile) -> str | None:
    """Why the engine cannot run a model, None if it can. Raises ModelFileError for a damaged header."""
    header = file.header
    if header.architecture not in FAMILIES:
        return f"the torch engine runs {', '.join(FAMILIES)} and not {header.architecture!r}"
    try:
        config = read_config(header)
    except UnsupportedModel as error:
        return str(error)
    if unused := next((name for name in header.tensors if not _used(name, config, FAMILIES[header.architecture])), None):
        return f"the torch engine has no use for the tensor {unused}"
    strange = next((info for info in header.tensors.values() if info.type_name not in TYPES), None)
    return f"the torch engine cannot read the {strange.type_name} weights of {strange.name}" if strange else None


def _used(name: str, config: ModelConfig, family: Family) -> bool:
    """Whether the engine computes with a tensor of that name: what it would leave out made the model another one."""
    in_block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if in_block is None:
        return bool(re.fullmatch(_BESIDE, name)) and (family.factors or not name.startswith("rope_freqs"))
    parts = (_ATTENTION, _EXPERTS if config.n_expert else _DENSE, *((_HEAD_NORMS,) if family.head_norms else ()))
    return int(in_block[1]) < config.n_layer and any(re.fullmatch(part, in_block[2]) for part in parts)


def read(file: ModelFile) -> tuple[ModelConfig, Family]:
    """Measures and family of a model that is supported. Raises UnsupportedModel, ModelFileError."""
    if reason := unsupported(file):
        raise UnsupportedModel(f"{reason}; run it with --engine llama_cpp")
    return read_config(file.header), FAMILIES[file.header.architecture]
