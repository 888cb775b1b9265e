"""Writes a model's GGUF again by a plan: tensors in another order, alignment or type, with the same metadata.

Any reader of GGUF takes the result. Layout as in core/gguf/reader.py; offsets follow each other with padding to the alignment alone, which
llama.cpp insists on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from edge_rt.compiler import folding
from edge_rt.compiler.shape import tensor_bytes
from edge_rt.core.gguf.reader import FOLDED, GGML_TYPES, MAGIC, SCALED, TensorInfo, metadata_spans
from edge_rt.deployment import Plan
from edge_rt.errors import OptionError
from edge_rt.native import memory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.core.gguf.model_file import ModelFile

_NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_PIECE = 8 << 20
"""Bytes that are copied at once."""
_ROWS = 4 << 20
"""Elements that are converted at once."""
Importance = Mapping[str, "npt.NDArray[np.float32]"]


class _Placed(NamedTuple):
    """A tensor of the new file: where it comes from, its type there, and its offset from the start of the data."""

    source: TensorInfo
    type_name: str
    nbytes: int
    offset: int


def write_gguf(
    source: ModelFile, out: BinaryIO, plan: Plan, importance: Importance | None = None, told: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Write the model as the plan has it. ``told`` is called with bytes done and in all.

    Raises OptionError, OSError, NativeError, ModelFileError if the source is no longer what was planned for.
    """
    placed, changed = _place(source, plan), folding.multiplied(source, plan)
    header = _header(source, plan, placed, folding.without_adapters(source, changed))
    out.write(header + b"\0" * (-len(header) % plan.alignment))
    done, total = 0, sum(one.nbytes for one in placed)
    for one in placed:
        powers, importances = changed.get(one.source.name), importance or {}
        for piece in _data(source, one, importances) if powers is None else folding.scaled_pieces(source, one.source, powers):
            out.write(piece)
            done += len(piece)
            told(done, total)
        out.write(b"\0" * (-one.nbytes % plan.alignment))


def _place(source: ModelFile, plan: Plan) -> list[_Placed]:
    tensors = source.header.tensors
    names = [name for name in plan.order if name in tensors]
    names += [name for name in tensors if name not in plan.order]
    placed, offset = [], 0
    for name in names:
        info = tensors[name]
        type_name = plan.types.get(name, info.type_name)
        if type_name not in _NUMBERS:
            raise OptionError(f"there is no type {type_name}; choose from {', '.join(_NUMBERS)}")
        nbytes = tensor_bytes(info.shape, type_name)
        placed.append(_Placed(info, type_name, nbytes, offset))
        offset = -(-(offset + nbytes) // plan.alignment) * plan.alignment
    return placed


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _strings(key: str, texts: Sequence[str]) -> bytes:
    """A metadata entry that is an array of strings."""
    return _string(key) + struct.pack("<IIQ", _ARRAY, _STRING, len(texts)) + b"".join(map(_string, texts))


def _header(source: ModelFile, plan: Plan, placed: list[_Placed], scaled: Sequence[str]) -> bytes:
    """Magic to tensor infos. The metadata's bytes are the source's, but for the alignment, and for what the plan adds."""
    raw = bytes(source.map[: source.header.data_offset])
    _, spans = metadata_spans(raw)
    kept = [raw[start:end] for key, start, end in spans if key not in ("general.alignment", "edge_rt.target", FOLDED, SCALED)]
    kept.append(_string("general.alignment") + struct.pack("<II", _UINT32, plan.alignment))
    kept.append(_string("edge_rt.target") + struct.pack("<I", _STRING) + _string(plan.target))
    kept += [_strings(key, texts) for key, texts in ((FOLDED, plan.folded), (SCALED, scaled)) if texts]
    infos = [
        _string(one.source.name)
        + struct.pack(f"<I{len(one.source.shape)}QIQ", len(one.source.shape), *one.source.shape, _NUMBERS[one.type_name], one.offset)
        for one in placed
    ]
    return MAGIC + struct.pack("<IQQ", 3, len(placed), len(kept)) + b"".join(kept) + b"".join(infos)


def _data(source: ModelFile, one: _Placed, importance: Importance) -> Iterator[bytes]:
    """A tensor's bytes, in pieces."""
    info = one.source
    if one.type_name == info.type_name:
        for start in range(0, info.nbytes, _PIECE):
            yield source.map[info.offset + start : info.offset + min(info.nbytes, start + _PIECE)]
        return
    from edge_rt.native.ggml import quantise

    for rows in float_rows(source, info):
        yield quantise(rows, _NUMBERS[one.type_name], importance.get(info.name))


def float_rows(source: ModelFile, info: TensorInfo, most: int | None = None) -> Iterator[npt.NDArray[np.float32]]:
    """A tensor's rows [n, width] as float32, ``most`` at a time; of three dimensions those of the first matrix first."""
    from edge_rt.core.kv.ops import token_embeddings
    from edge_rt.native import ggml

    width, count = info.shape[0], prod(info.shape[1:])
    with ggml.context(1) as ctx, ggml.cpu_backend(1) as backend:
        base = memory.address_of(source.map)
        with ggml.buffer_from_address(base, len(source.map)) as buffer:
            tensor = ggml.new_tensor(ctx.address, info.type, (width, count))
            ggml.place(tensor, buffer.address, base + info.offset)
            step = most or max(1, _ROWS // width)
            for first in range(0, count, step):
                yield token_embeddings(tensor, range(first, min(count, first + step)), backend)
