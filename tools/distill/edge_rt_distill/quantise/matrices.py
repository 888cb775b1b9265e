"""Quantises a decoder's matrices, layer by layer with the inputs of the model as quantised so far, into the bytes that export writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_rt.hooks import GGML_TYPES, NativeError, OptionError, quantise_rows
from edge_rt_distill.model.decoder import GROUPS, Decoder
from edge_rt_distill.model.load import empty, frozen
from edge_rt_distill.model.load import tensors as named_tensors
from edge_rt_distill.progress import Told, quiet
from edge_rt_distill.quantise.formats import FORMATS
from edge_rt_distill.quantise.gptq import DEFAULTS as GPTQ_DEFAULTS
from edge_rt_distill.quantise.gptq import GptqOptions, damped, gptq
from edge_rt_distill.quantise.statistics import First, Moments, counted, layers
from edge_rt_distill.quantise.walk import BATCH_TOKENS, Step, Stream, side_by_side, walk

Method = Literal["plain", "importance", "gptq"]
"""ggml's quantiser without and with the mean squares of the inputs; GPTQ, which for types that are not of blocks of 32 is the second."""
Aim = Literal["weights", "outputs", "residual"]
"""What GPTQ's matrices are to give on their (already disturbed) inputs: what the float weights would give on them; what the float model has
there; or, where a matrix adds to the residual stream, also what the stream lacks so far. Asymmetric calibration as in GPTAQ
(Li et al. 2025, arXiv:2504.02692), in closed form."""
_NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_ADDS = ("attn_output", "ffn_down")
_TIED = 0.1
"""Damping of a head that is the embedding too, where each error counts by itself. Of a student of SmolLM2 in Q4_0, embedding included,
held-out KL was .428 with that in float, .443 with GPTQ (.444 and .447 with .02 and 1 as damping), .475 by importance, .505 rounded."""


class Encoded(NamedTuple):
    """A tensor as a file holds it: ggml's type and its bytes [rows, bytes of a row]."""

    type: str
    data: npt.NDArray[np.uint8]


class QuantiseOptions(NamedTuple):
    """``types``: by site ("blk.3.ffn_down"), else by matrix ("ffn_down"), else ``type``. ``ridge``: share of the mean square of an input
    that holds ``aim``'s correction back. ``first``: what becomes of position 0 (``statistics.First``). GPTQ must
    not leave it out: errors are moved to where only that position's massive activation sees them, and attention loses what it rests on
    (SmolLM2-135M in Q4_0, 4k tokens of calibration, unrelated text: KL .986 without it, .135 with it, .248 rounded by importance).
    ``head``: type of the matrix that makes logits, the embedding where it is tied; by GPTQ in a type of fewer than 8 bits, else it stays.
    """

    type: str = "Q4_0"
    head: str = "F16"
    types: Mapping[str, str] = {}
    method: Method = "gptq"
    aim: Aim = "weights"
    ridge: float = 0.1
    first: First = "keep"
    gptq: GptqOptions = GPTQ_DEFAULTS
    batch_tokens: int = BATCH_TOKENS

    def type_of(self, site: str) -> str:
        """The type a site's matrix gets."""
        return self.types.get(site) or self.types.get(site.rsplit(".", 1)[-1]) or self.type


DEFAULTS = QuantiseOptions()


class Quantised(NamedTuple):
    """``model``: a copy whose matrices hold what the bytes decode to. ``tensors``: by GGUF name ("blk.0.attn_q.weight")."""

    model: Decoder
    tensors: dict[str, Encoded]


def quantise_model(
    model: Decoder,
    sequences: Sequence[Sequence[int]],
    options: QuantiseOptions = DEFAULTS,
    told: Told = quiet,
) -> Quantised:
    """Quantise the matrices of all layers, and the head if it is to be; norms and biases stay. ``told``: layers done, of how many.

    ``sequences``: tokens to calibrate with (``plain`` needs none). A layer whose parameters others share is quantised at its first place.
    Raises OptionError, DataError.
    """
    student = materialised(model)
    if options.method == "gptq":
        tensors = _sequential(model, student, sequences, options, told)
    else:
        tensors = _by_columns(model, student, sequences, options, told)
    return Quantised(student, tensors)


def materialised(model: Decoder) -> Decoder:
    """A copy that is only looked at, its parametrisations folded into plain weights (a deep copy would share their classes)."""
    student = frozen(empty(model.architecture))
    theirs = named_tensors(model)
    for name, tensor in named_tensors(student).items():
        tensor.copy_(theirs[name].detach())
    return student


def encode(weights: Tensor, type_name: str, importance: Tensor | None = None) -> Encoded:
    """By ggml's own quantiser, weights [out, in] in any of its types. Raises OptionError if the type does not fit."""
    if type_name not in _NUMBERS:
        raise OptionError(f"there is no type {type_name}; choose one of {', '.join(_NUMBERS)}")
    rows = np.ascontiguousarray(weights.detach().float().numpy())
    try:
        raw = quantise_rows(rows, _NUMBERS[type_name], None if importance is None else importance.float().numpy())
    except NativeError as problem:
        raise OptionError(f"rows of {rows.shape[1]} cannot be {type_name} ({problem}); choose another type") from None
    return Encoded(type_name, np.frombuffer(raw, np.uint8).reshape(len(rows), -1))


def decode(encoded: Encoded) -> Tensor:
    """float32 [rows, width]: what every reader makes of the bytes."""
    import gguf

    values: npt.NDArray[Any] = gguf.quants.dequantize(encoded.data, gguf.GGMLQuantizationType[encoded.type])
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _by_columns(
    model: Decoder, student: Decoder, sequences: Sequence[Sequence[int]], options: QuantiseOptions, told: Told
) -> dict[str, Encoded]:
    """Each matrix for itself, by ggml's quantiser."""
    tensors: dict[str, Encoded] = {}
    found: Mapping[str, Any]
    depth = len(model.layers)
    known = layers(model, sequences, hessian=False, first=options.first, sample=0, batch_tokens=options.batch_tokens)
    for index in range(depth):
        found = next(known)[1] if options.method == "importance" else {}
        for name in (name for group in GROUPS for name in group):
            site = f"blk.{index}.{name}"
            importance = found[name].square if name in found else None
            if model.architecture.owner(index) == index:
                _put(student, site, tensors, encode(model.linear(site).weight, options.type_of(site), importance))
        told(index + 1, depth)
    return tensors


def _put(student: Decoder, site: str, tensors: dict[str, Encoded], encoded: Encoded, values: Tensor | None = None) -> None:
    with torch.no_grad():
        student.linear(site).weight.copy_(decode(encoded) if values is None else values)
    tensors[f"{site}.weight"] = encoded


def _sequential(
    model: Decoder, student: Decoder, sequences: Sequence[Sequence[int]], options: QuantiseOptions, told: Told
) -> dict[str, Encoded]:
    """GPTQ group by group: a matrix' inputs are those of the model in which all matrices before it are quantised."""
    tensors: dict[str, Encoded] = {}
    depth = len(model.layers)
    if options.head in FORMATS and FORMATS[options.head].bits < 8:
        _quantise_head(model, student, sequences, tensors, options)
    for step in _steps(model, student, sequences, options):
        if model.architecture.owner(step.layer) == step.layer:
            for group in GROUPS:
                _quantise_group(step, group, student, tensors, options)
        told(step.layer + 1, depth)
    return tensors


@torch.no_grad()
def _quantise_head(
    model: Decoder, student: Decoder, sequences: Sequence[Sequence[int]], tensors: dict[str, Encoded], options: QuantiseOptions
) -> None:
    """Before all else, for the inputs of the float model: as embedding it makes the inputs of all matrices, which are rounded to suit."""
    moments = Moments(hessian=True)
    for rows in side_by_side(sequences, options.batch_tokens):
        moments.add(counted(model(rows.tokens).hidden, rows.real, options.first)[0])
    tied = student.architecture.tied
    how = options.gptq._replace(damping=_TIED) if tied else options.gptq
    blocks = gptq(student.head_weight.detach(), moments.hessian(), FORMATS[options.head], how)
    student.head_weight.copy_(blocks.values())
    tensors["token_embd.weight" if tied else "output.weight"] = Encoded(options.head, blocks.pack())


def _steps(model: Decoder, student: Decoder, sequences: Sequence[Sequence[int]], options: QuantiseOptions) -> Iterator[Step]:
    """The walk through both models; where the float model's stream is not asked for, that of the student stands in its place."""
    if options.aim != "weights":
        yield from walk(model, student, sequences, batch_tokens=options.batch_tokens)
        return
    stream = Stream(student, sequences, batch_tokens=options.batch_tokens)
    while not stream.ended:
        yield Step(stream.index, stream, stream)
        stream.advance()


def _quantise_group(step: Step, group: tuple[str, ...], student: Decoder, tensors: dict[str, Encoded], options: QuantiseOptions) -> None:
    """The matrices that share an input, at the layer both streams are at."""
    aims: dict[str, Tensor] = {}
    if options.aim == "weights":
        hessian = _hessian(step.student, group[0], options.first)
    else:
        hessian, aims = _corrections(step, group, options)
    for name in group:
        site = f"blk.{step.layer}.{name}"
        weights, type_name = student.linear(site).weight.detach(), options.type_of(site)
        if name in aims:
            weights = weights + aims[name]
        if type_name in FORMATS:
            blocks = gptq(weights, hessian, FORMATS[type_name], options.gptq)
            _put(student, site, tensors, Encoded(type_name, blocks.pack()), blocks.values())
        else:
            _put(student, site, tensors, encode(weights, type_name, hessian.diagonal()))


def _hessian(stream: Stream, name: str, first: First) -> Tensor:
    moments = Moments(hessian=True)
    stream.look({name: lambda number, x: moments.add(counted(x, stream.batches[number].real, first)[0])})
    return moments.hessian()


def _corrections(step: Step, group: tuple[str, ...], options: QuantiseOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """H of the student's inputs x, and by matrix C [out, in] such that (W + C) x comes closest to what is aimed at.

    With d = aim - W x, C = (sum d x^T / n) (H + ridge)^-1: the ridge regression of what is lacking on the inputs.
    """
    moments, residual = Moments(hessian=True), options.aim == "residual" and group[0] in _ADDS
    cross: dict[str, Tensor] = {}
    for number, batch in enumerate(step.student.batches):
        inputs, mine, theirs = (dict[str, Tensor]() for _ in range(3))
        names = [*group, "attn_output"] if residual and group != ("attn_output",) else group
        step.student.look({group[0]: partial(_keep, inputs, "x")}, {name: partial(_keep, mine, name) for name in names}, number)
        step.teacher.look(None, {name: partial(_keep, theirs, name) for name in names}, number)
        lacking = {name: theirs[name] - mine[name] for name in names}
        if residual:
            # What the stream lacks where the matrix' output is added to it: at the layer's entry, and from attention for the feed-forward.
            before = step.teacher.batches[number].hidden - batch.hidden + (lacking["attn_output"] if len(names) > len(group) else 0)
            lacking[group[0]] = lacking[group[0]] + before
        x, *lacks = counted(inputs["x"], batch.real, options.first, *(lacking[name] for name in group))
        moments.add(x)
        for name, d in zip(group, lacks, strict=True):
            cross[name] = cross.get(name, torch.zeros(())) + (d.T @ x).double()
    hessian = moments.hessian()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, options.ridge)))
    return hessian, {name: ((total / moments.count) @ inverse).float() for name, total in cross.items()}


def _keep(into: dict[str, Tensor], name: str, _: int, value: Tensor) -> None:
    into[name] = value
