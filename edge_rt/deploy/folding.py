"""Norms whose scale can go into the weights behind them without a bit of any result changing, and how it goes there.

A norm gives w n, with n = x / rms(x), and a weight W behind it W (w n) = (W diag(w)) n. Computed, the two have the same bits if every
rounding cuts the same digits, which only ones and powers of two leave in place, and these only where nothing is rounded to a format with
a small range. What kernels make of their inputs decides (libggml's ``vec_dot_type``, ggml-cpu.c):

- scales that are all one: nothing is to be multiplied, whatever the weights are, and whatever else reads the norm.
- F32 and BF16 take their inputs in a format with eight bits of exponent: any powers of two, one for each input.
- K-quants (and IQ4_XS) take 256 inputs with one F32 scale: one power of two for all inputs, which goes into the weights' own F16 scales.
- F16 takes inputs as F16, and Q4_0, Q8_0 and the like take 32 of them with one F16 scale: below 2**-14 these have fewer digits, so that n
  and 4 n are not rounded alike. Whether that happens depends on the text, so it is not exact.

What is true of the format has to be true of each value: none may overflow, or become subnormal. This holds for CPUs; on cards kernels
convert inputs as they like.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.gguf.reader import GGML_TYPES, SCALED, TensorInfo
from edge_rt.core.graph.config import check_shapes, read_config
from edge_rt.core.graph.decoder import FAMILIES, ggml_unsupported
from edge_rt.deploy.cost import tensor_bytes
from edge_rt.deploy.plan import Plan
from edge_rt.errors import ModelFileError, UnsupportedModel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.core.gguf.model_file import ModelFile

    Exponents = npt.NDArray[np.int32]

FLOATS = ("F32", "BF16")
HALVES: Mapping[str, tuple[int, ...]] = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,),
}  # fmt: skip
"""Where the F16 scales of a block lie, bytes from its start (ggml-common.h), of types whose kernels scale inputs in F32."""
_LARGEST_EXPONENT = 24
"""Of a scale: with it no normalised input but one below 2**-100 becomes subnormal."""
_PIECE = 8 << 20
_BEHIND = {
    "attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "ffn_norm": ("ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps"),
}
"""What multiplies the state that a norm makes, and all that reads it. Behind the last norm are embeddings of texts too, which are
what it makes; queries and keys are compared, not multiplied with weights."""
_NORMS = (*_BEHIND, "attn_q_norm", "attn_k_norm")


class Norm(NamedTuple):
    """A norm of the source: ``ones``: its scales are all one. ``weights``: what they can be multiplied into, if ``lacks`` is empty; else
    that is why they cannot.
    """

    name: str
    ones: bool
    weights: tuple[str, ...] = ()
    lacks: str = ""


class Inexact(Exception):
    """A value would overflow or become subnormal."""


def norms(source: ModelFile) -> tuple[Norm, ...]:
    """Every norm of a model that the ggml engine has a graph for; () for others, whose graphs may use norms otherwise.

    Reads the norms, and the weights behind those whose scales are powers of two. Raises ModelFileError for a damaged file.
    """
    if ggml_unsupported(source):
        return ()
    config, tensors = read_config(source.header), source.header.tensors
    try:
        check_shapes(tensors, config, FAMILIES[config.architecture])
    except UnsupportedModel:
        return ()
    names = [f"blk.{layer}.{part}.weight" for layer in range(config.n_layer) for part in _NORMS]
    return tuple(_looked_at(source, name) for name in (*names, "output_norm.weight") if name in tensors)


def kept_for_compensation(found: Sequence[Norm]) -> tuple[Norm, ...]:
    """The same, but none of them to be multiplied into weights: a compensation was made for inputs with their scales."""
    return tuple(norm if norm.ones or norm.lacks else norm._replace(lacks="a compensation made for inputs with them") for norm in found)


def _looked_at(source: ModelFile, name: str) -> Norm:
    found = exponents(source, name)
    if found is None:
        return Norm(name, ones=False, lacks="scales that are no powers of two")
    if not found.any():
        return Norm(name, ones=True)
    prefix, _, part = name.removesuffix(".weight").rpartition(".")
    weights = tuple(f"{prefix}.{one}.weight" for one in _BEHIND.get(part, ()) if f"{prefix}.{one}.weight" in source.header.tensors)
    return Norm(name, ones=False, weights=weights, lacks=_lacking(source, weights, found))


def _lacking(source: ModelFile, weights: tuple[str, ...], found: Exponents) -> str:
    """Why scales do not go into weights without a change, "" if they do."""
    if not weights:
        return "no weights alone behind them"
    if abs(found).max() > _LARGEST_EXPONENT:
        return "scales too far from one"
    infos = [source.header.tensors[name] for name in weights]
    for info in infos:
        if info.type_name not in (*FLOATS, *HALVES):
            return f"{info.type_name} weights behind them, whose kernels round small inputs more"
        if info.type_name in HALVES and len(set(found.tolist())) > 1:
            return f"{info.type_name} weights behind them, and more than one power of two"
    try:
        for info in infos:
            for _ in scaled_pieces(source, info, found):
                pass
    except Inexact as error:
        return str(error)
    return ""


def exponents(source: ModelFile, name: str) -> Exponents | None:
    """Base-two logarithms of a norm's scales, int32 [width]; None if one is no power of two."""
    import numpy as np

    info = source.header.tensors[name]
    if info.type_name != "F32":
        return None
    scales = np.frombuffer(source.map[info.offset : info.offset + info.nbytes], "<f4")
    parts, found = np.frexp(scales)
    if not (parts == 0.5).all():
        return None
    powers: Exponents = (found - 1).astype(np.int32)
    return powers


def multiplied(source: ModelFile, plan: Plan) -> dict[str, Exponents]:
    """What tensors are multiplied with as norms of a plan are folded, as exponents of two for each input [width]: weights with the
    scales, and norms with their inverse; nothing where all are one. Raises ModelFileError for a norm that cannot be folded: the file was
    changed since the plan was made, or a plugin's pass made it.
    """
    found: dict[str, Exponents] = {}
    known = {norm.name: norm for norm in norms(source)} if plan.folded else {}
    for name in plan.folded:
        norm = known.get(name, Norm(name, ones=False, lacks="no place in this model's graph"))
        lacks = norm.lacks or ("weights behind them that get another type" if set(norm.weights) & set(plan.types) else "")
        if lacks:
            raise ModelFileError(f"the scales of {name} cannot be folded: they have {lacks}; compile the model again")
        if not norm.ones and (powers := exponents(source, name)) is not None:
            found |= {name: -powers, **dict.fromkeys(norm.weights, powers)}
    return found


def without_adapters(source: ModelFile, changed: Mapping[str, Exponents]) -> list[str]:
    """Norms that went into weights, now or when the source was compiled: adapters were trained for weights without them."""
    before = source.header.optional(SCALED, list, [])
    return [*before, *(name for name in changed if name.endswith("_norm.weight") and name not in before)]


def check(written: ModelFile, plan: Plan) -> None:
    """Look whether the norms that a plan folds are ones in the file that was written for it: who compiles does, once, as the directory has
    checksums of the file, and the file itself says which norms these are (``FOLDED``, which the engine asks for). Raises ModelFileError.
    """
    for name in plan.folded:
        if (found := exponents(written, name)) is None or found.any():
            raise ModelFileError(f"the scales of {name} are not ones in {written.path.name}; compile the model again")


def scaled_pieces(source: ModelFile, info: TensorInfo, powers: Exponents) -> Iterator[bytes]:
    """A tensor's bytes with each input multiplied by two to the power of its exponent, some rows at a time. Raises Inexact."""
    row = tensor_bytes(info.shape[:1], info.type_name)
    step = max(1, _PIECE // row) * row
    for start in range(info.offset, info.offset + info.nbytes, step):
        yield scaled(source.map[start : min(start + step, info.offset + info.nbytes)], info.type_name, powers)


def scaled(data: bytes, type_name: str, powers: Exponents) -> bytes:
    """Rows of a type of FLOATS or HALVES, times two to the power of an exponent for each input (one for all of HALVES). Raises Inexact."""
    import numpy as np

    if type_name == "F32":
        values = np.frombuffer(data, "<f4").reshape(-1, len(powers))
        return _exact(values, powers, "F32").tobytes()
    if type_name == "BF16":  # the upper half of an F32
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(-1, len(powers))
        return bytes((_exact(values, powers, "BF16").view(np.uint32) >> 16).astype("<u2"))
    size = next(nbytes for name, _, nbytes in GGML_TYPES.values() if name == type_name)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, size).copy()
    for offset in HALVES[type_name]:
        halves = np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2")
        blocks[:, offset : offset + 2] = _exact(halves, powers[:1], type_name).view(np.uint8)
    return bytes(blocks)


def _exact(values: npt.NDArray[np.floating], powers: Exponents, type_name: str) -> npt.NDArray[np.floating]:
    """values [n, width] times powers of two, in their own format. Raises Inexact for one that is not finite and normal, or zero, then."""
    import numpy as np

    with np.errstate(over="ignore", under="ignore"):
        found: npt.NDArray[np.floating] = np.ldexp(values, powers).astype(values.dtype)
    fine = np.isfinite(found) & ((np.abs(found) >= np.finfo(values.dtype).tiny) | (values == 0))
    if not fine.all():
        raise Inexact(f"{type_name} weights behind them, of which some would overflow or become subnormal")
    return found
