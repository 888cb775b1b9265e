"""LoRA adapters (Hu and others, 2021) as llama.cpp's convert_lora_to_gguf.py writes them: what a file holds, checked against its model.

An adapter changes the product of a weight W [in, out] with x to W x + scale * B (A x); A [in, rank] and B [rank, out] are the tensors
``NAME.lora_a`` and ``NAME.lora_b``. Of the token embedding [E, V], whose rows are looked up, A is [rank, V] and B [rank, E].
Each check stands for one in llama.cpp (src/llama-adapter.cpp, ggml 0.25.3), or for an assertion in ggml that a damaged file could reach.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.gguf.reader import SCALED
from edge_rt.errors import ModelFileError, UnsupportedModel

if TYPE_CHECKING:
    import os

    from edge_rt.core.gguf.reader import Header, TensorInfo

EMBEDDING = "token_embd.weight"
_TYPES = ("F32", "F16", "BF16", "Q8_0")
"""What the converter writes; all have kernels for both products."""
_GGML_ALIGNMENT = 32
_LARGEST = 1e6


class Pair(NamedTuple):
    """The two factors of the change of one weight, ``base``."""

    base: str
    a: TensorInfo
    b: TensorInfo

    @property
    def rank(self) -> int:
        """Their common dimension."""
        return self.b.shape[0]


class LoraFile(NamedTuple):
    """An open adapter that fits a model. ``alpha`` 0: the scale is the user's alone. ``norms``: tensors that nothing applies."""

    file: ModelFile
    alpha: float
    pairs: tuple[Pair, ...]
    norms: tuple[str, ...] = ()

    def scale(self, pair: Pair, wanted: float) -> float:
        """What B (A x) is multiplied with, for a user who wants the adapter ``wanted`` times; in llama.cpp's float32 arithmetic."""
        return _float32(_float32(_float32(wanted) * self.alpha) / pair.rank) if self.alpha else _float32(wanted)


def is_adapter(header: Header) -> bool:
    """Whether a file is an adapter and no model."""
    return bool(header.get("general.type") == "adapter")


def open_lora(path: str | os.PathLike[str], model: Header) -> LoraFile:
    """Open an adapter for a model with this header; its ``file`` is the caller's to close. Raises ModelFileError, UnsupportedModel."""
    file = ModelFile.open(path)
    try:
        return read_lora(file, model)
    except BaseException as error:
        file.close()
        if isinstance(error, ModelFileError):
            raise type(error)(f"{path}: {error}") from None
        raise


def read_lora(file: ModelFile, model: Header) -> LoraFile:
    """What an open file holds, if that is an adapter for a model with this header. Raises ModelFileError, UnsupportedModel."""
    header = file.header
    if not is_adapter(header):
        raise ModelFileError("this is no adapter (its general.type is not adapter); give a file that convert_lora_to_gguf.py wrote")
    kind = header.require("adapter.type", str)
    if kind != "lora":
        raise UnsupportedModel(f"this is an adapter of the type {kind!r:.40}; only lora can be used")
    if header.architecture != model.architecture:
        raise ModelFileError(f"the adapter is for {header.architecture} models and this one is {model.architecture}; use that model")
    if SCALED in model:
        raise UnsupportedModel("this model's norms were folded into its weights, which no adapter was trained for; use the model's source")
    if "adapter.alora.invocation_tokens" in header:
        raise UnsupportedModel("this is an activated LoRA, which begins in the middle of a prompt; use an ordinary one")
    alpha = header.optional("adapter.lora.alpha", float, 0.0)
    if header.type_of("adapter.lora.alpha") not in (None, "f32") or not abs(alpha) <= _LARGEST:
        raise ModelFileError(f"adapter.lora.alpha is {alpha} ({header.type_of('adapter.lora.alpha')}); the file is damaged")
    factors, norms = _factors(header)
    pairs = tuple(_pair(base, found, model) for base, found in factors.items())
    if not pairs:
        raise ModelFileError("the adapter changes nothing: it has no tensors; convert it again")
    return LoraFile(file, alpha, pairs, norms)


def _factors(header: Header) -> tuple[dict[str, dict[str, TensorInfo]], tuple[str, ...]]:
    """Factors by the weight they are of, and the names of norms, which llama.cpp leaves out too. Raises ModelFileError."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    norms: list[str] = []
    for name, info in header.tensors.items():
        base, _, factor = name.rpartition(".")
        if factor in ("lora_a", "lora_b"):
            factors.setdefault(base, {})[factor[-1]] = info
        elif name.endswith("_norm.weight"):
            norms.append(name)
        else:
            raise ModelFileError(f"{name} is neither a .lora_a nor a .lora_b; the file is no LoRA adapter, or damaged")
    return factors, tuple(norms)


def _pair(base: str, found: dict[str, TensorInfo], model: Header) -> Pair:
    """The factors of one weight, if they fit it. Raises ModelFileError, UnsupportedModel."""
    if len(found) < 2:
        raise ModelFileError(f"the adapter has only {base}.lora_{next(iter(found))} of a pair; it is incomplete, convert it again")
    weight = model.tensors.get(base)
    if weight is None or len(weight.shape) < 2:
        raise ModelFileError(f"the adapter changes {base}, which is none of the model's matrices; use the model that it was trained for")
    if base == EMBEDDING and "output.weight" not in model.tensors:
        raise UnsupportedModel("the adapter changes the token embedding, which is the head of this model too; train one without it")
    a, b = _shape(found["a"]), _shape(found["b"])
    inner, outer, *more = _shape(weight)
    rank = b[0]
    wanted = ((rank, outer, *more), (rank, inner, *more)) if base == EMBEDDING else ((inner, rank, *more), (rank, outer, *more))
    if (a, b) != wanted:
        raise ModelFileError(
            f"the adapter's factors of {base} have the shapes {found['a'].shape} and {found['b'].shape}, which do not fit its"
            f" {weight.shape}; use the model that it was trained for"
        )
    for info in found.values():
        if info.type_name not in _TYPES:
            raise UnsupportedModel(f"{info.name} is {info.type_name}; convert the adapter to one of {', '.join(_TYPES)}")
        if info.offset % _GGML_ALIGNMENT:
            raise ModelFileError(f"the tensor {info.name} does not start on a multiple of {_GGML_ALIGNMENT} bytes; convert it again")
    return Pair(base, found["a"], found["b"])


def _shape(info: TensorInfo) -> tuple[int, ...]:
    """Four dimensions, as ggml has them."""
    return (*info.shape, 1, 1, 1)[:4]


def _float32(value: float) -> float:
    """The nearest number of single precision."""
    return float(struct.unpack("f", struct.pack("f", value))[0]) if math.isfinite(value) else value
