"""What the ggml engine has graphs and caches for; told from a model's header, before anything is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from edge_rt.core.graph.decoder import FAMILIES
from edge_rt.core.graph.hyper import Hyper, read_hyper
from edge_rt.errors import OptionError, UnsupportedModel
from edge_rt.native import ggml

if TYPE_CHECKING:
    from edge_rt.core.load.model_file import ModelFile

_KEY_TYPES = {"f16": ggml.TYPE_F16, "q8_0": ggml.TYPE_Q8_0}


def unsupported(file: ModelFile) -> str | None:
    """Why this engine has no graph for a model, None if it has one. Reads the header only."""
    if file.header.architecture not in FAMILIES:
        return f"no graph for architecture {file.header.architecture!r}"
    try:
        hyper = read_hyper(file.header)
    except UnsupportedModel as error:
        return str(error)
    if hyper.n_expert and "blk.0.ffn_gate_exps.weight" not in file.header.tensors:
        return "experts in separate tensors (an old Mixtral conversion)"
    strange = next((name for name in file.header.tensors if name.endswith(".scale") or "_shexp" in name or "lora" in name), None)
    return f"no graph for the tensor {strange}" if strange else None


def key_type(name: Literal["f16", "q8_0"], hyper: Hyper) -> int:
    """Element type of cached keys. Raises OptionError where heads do not divide into its blocks."""
    if name not in _KEY_TYPES:
        raise OptionError(f"--key-type {name} is unknown; choose f16 or q8_0")
    if hyper.head_dim % ggml.c.blck_size(_KEY_TYPES[name]):
        raise OptionError(f"heads of {hyper.head_dim} do not divide into {name} blocks; use --key-type f16")
    return _KEY_TYPES[name]
