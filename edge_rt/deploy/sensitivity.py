"""How much a model's answers change when weights get another type: measured on calibration text, group by group.

The model's weights are made half-precision floats in memory; those of a group are replaced by what quantisation leaves of them, and the
KL divergence of the next token's distribution to that of the untouched model is the group's sensitivity (nats a token, mean over the text).
To other types it is carried over by the squared error of the weights, to which the divergence of a small disturbance is proportional.
Groups are the products of a few neighbouring blocks, whose parts that share an input keep one type, so that they stay one product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.gguf.reader import GGML_TYPES
from edge_rt.core.graph.builder import SlotShape
from edge_rt.core.graph.config import read_config
from edge_rt.core.graph.decoder import ggml_unsupported
from edge_rt.core.graph.step import SequenceInput, StepGraph
from edge_rt.core.kv.cache import KVCache
from edge_rt.core.kv.positions import padded
from edge_rt.deploy.cost import tensor_bytes
from edge_rt.deploy.writer import float_rows
from edge_rt.errors import OptionError, UnsupportedModel
from edge_rt.native import ggml
from edge_rt.power.governor import Governor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.core.gguf.model_file import ModelFile
    from edge_rt.core.gguf.reader import Header

TEXT = Path(__file__).parent / "calibration.txt"
BASE = "Q4_0"
"""The type that sensitivities are measured with."""
TOKENS, PIECE = 512, 128
"""Tokens of the text that are used at most, and tokens that are fed at once, each piece in a context of its own."""
BANDS = 8
_SAMPLE = 64
"""Rows of a weight from which the error of a type is estimated."""
_KINDS = (
    ("attn_q", "attn_k", "attn_v"), ("attn_qkv",), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_gate_exps", "ffn_up_exps"),
    ("ffn_down", "ffn_down_exps"),
)  # fmt: skip
_NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()}


class Group(NamedTuple):
    """Tensors that get one type, and the elements in them; ``width`` is that of their rows."""

    name: str
    tensors: tuple[str, ...]
    elements: int
    width: int

    def nbytes(self, type_name: str) -> int:
        """In a type."""
        return tensor_bytes((self.width, self.elements // self.width), type_name)


class Sensitive(NamedTuple):
    """A group with its divergence by type (nats a token)."""

    group: Group
    divergence: Mapping[str, float]


def groups(header: Header) -> list[Group]:
    """The weights that may change their type: products of bands of blocks, then the head, and an embedding that is not the head."""
    config = read_config(header)
    bands = min(BANDS, config.n_layer)
    found: list[tuple[str, list[str]]] = []
    for band in range(bands):
        layers = range(config.n_layer * band // bands, config.n_layer * (band + 1) // bands)
        for kinds in _KINDS:
            names = [f"blk.{layer}.{kind}.weight" for layer in layers for kind in kinds]
            found.append((f"{'|'.join(kinds)} of {layers[0]}-{layers[-1]}", [name for name in names if name in header.tensors]))
    tied = "output.weight" not in header.tensors
    found.append(("head", ["token_embd.weight" if tied else "output.weight"]))
    if not tied:
        found.append(("embedding", ["token_embd.weight"]))
    return [_group(header, name, names) for name, names in found if names]


def _group(header: Header, name: str, names: Sequence[str]) -> Group:
    shapes = [header.tensors[one].shape for one in names]
    return Group(name, tuple(names), sum(map(prod, shapes)), shapes[0][0])


def fitting(group: Group, types: Sequence[str]) -> list[str]:
    """Those of the types whose blocks fill the group's rows."""
    blocks = {name: block for name, block, _ in GGML_TYPES.values()}
    return [one for one in types if group.width % blocks[one] == 0]


def measure(
    source: ModelFile, tokens: Sequence[int], types: Sequence[str], threads: int, told: Callable[[int, int], None] = lambda *_: None
) -> list[Sensitive]:
    """Measure every group. ``told`` is called with groups done and in all. Raises UnsupportedModel, OutOfMemory, OptionError."""
    with contextlib.closing(FloatModel(source, threads)) as model:
        reference = model.distributions(tokens)
        found = []
        parts = groups(source.header)
        for number, group in enumerate(parts):
            errors = {one: _error(source, group, one) for one in {BASE, *fitting(group, types)}}
            with model.replaced(group.tensors, BASE):
                base = model.divergence(tokens, reference)
            found.append(Sensitive(group, {one: base * error / max(errors[BASE], 1e-30) for one, error in errors.items()}))
            told(number + 1, len(parts))
        return found


def divergence(source: ModelFile, other: Mapping[str, str], tokens: Sequence[int], threads: int) -> float:
    """KL divergence to the source, nats a token, of the model with tensors in other types."""
    with contextlib.closing(FloatModel(source, threads)) as model, contextlib.ExitStack() as stack:
        reference = model.distributions(tokens)
        for name, type_name in other.items():
            stack.enter_context(model.replaced((name,), type_name))
        return model.divergence(tokens, reference)


def calibration(source: ModelFile, path: Path | None = None) -> list[int]:
    """Tokens of a text, of ours if none is given. Raises OptionError for one that is too short or cannot be read."""
    from edge_rt.native.llama import Vocab

    try:
        text = (path or TEXT).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the calibration text {path} cannot be read ({error}); give a text file in UTF-8") from error
    with contextlib.closing(Vocab.load(source.native_path)) as vocab:
        tokens = vocab.tokenize(text)[:TOKENS]
    if len(tokens) < 2 * PIECE:
        raise OptionError(f"the calibration text has {len(tokens)} tokens; give one of {TOKENS} or more")
    return tokens[: len(tokens) // PIECE * PIECE]


# ---- the model as floats ---------------------------------------------------------------------------------------------


class FloatModel:
    """A model whose weights can be replaced: matrices as half-precision floats in memory of its own. Fills ``Weights``."""

    def __init__(self, source: ModelFile, threads: int) -> None:
        """Raises UnsupportedModel, OutOfMemory."""
        if reason := ggml_unsupported(source):
            raise UnsupportedModel(f"the sensitivity of its weights cannot be measured: {reason}; leave --quality and --weights out")
        self.source, self.config = source, read_config(source.header)
        self.centred, self.corrections = False, None
        infos = source.header.tensors.values()
        self._ctx = ggml.context(len(source.header.tensors))
        self._tensors = {}
        for info in infos:
            type_ = ggml.TYPE_F16 if len(info.shape) > 1 else ggml.TYPE_F32
            self._tensors[info.name] = ggml.new_tensor(self._ctx.address, type_, info.shape)
        self._buffer = ggml.allocate_context(self._ctx)
        for info in infos:
            self._fill(info.name, None)
        self._governor = Governor(threads)  # beside a busy neighbour one thread is many times as fast as two
        self._backend = ggml.cpu_backend(threads)
        self._arena = ggml.allocator()
        self._cache = KVCache(self.config, ggml.TYPE_F16, padded(PIECE))
        shape = SlotShape(PIECE, padded(PIECE), PIECE)
        self._graph = StepGraph(self.config, self, [shape], [self._cache.view], self._arena, False)

    def get(self, name: str) -> int | None:
        """Address of a weight tensor, None if the model has none of that name."""
        return self._tensors.get(name)

    def require(self, name: str) -> int:
        """The same; the source was checked for what its graph needs."""
        return self._tensors[name]

    def joined(self, names: tuple[str, ...]) -> int | None:
        """None: weights are replaced one by one."""
        return None

    @contextlib.contextmanager
    def replaced(self, names: Sequence[str], type_name: str) -> Iterator[None]:
        """While it lasts, some weights are what a type leaves of them."""
        for name in names:
            self._fill(name, type_name)
        try:
            yield
        finally:
            for name in names:
                self._fill(name, None)

    def _fill(self, name: str, type_name: str | None) -> None:
        """Write a weight as it is, or as a type leaves it, row by row."""
        info, tensor = self.source.header.tensors[name], self._tensors[name]
        half, row = len(info.shape) > 1, 0
        out = ggml.view(tensor, "f2" if half else "f4", (prod(info.shape[1:]), info.shape[0]))
        for rows in float_rows(self.source, info):
            out[row : row + len(rows)] = rows if type_name is None else rounded(rows, type_name)
            row += len(rows)

    def distributions(self, tokens: Sequence[int]) -> list[npt.NDArray[np.float32]]:
        """Log-probabilities of the next token behind every token, [PIECE, V] for each piece."""
        return [_log_softmax(logits) for logits in self._logits(tokens)]

    def divergence(self, tokens: Sequence[int], reference: Sequence[npt.NDArray[np.float32]]) -> float:
        """Mean KL divergence of the distributions now to others, nats a token."""
        import numpy as np

        total = 0.0
        for expected, logits in zip(reference, self._logits(tokens), strict=True):
            found = _log_softmax(logits)
            total += float((np.exp(expected) * (expected - found)).sum())
        return max(0.0, total / len(tokens))

    def _logits(self, tokens: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        import numpy as np

        for start in range(0, len(tokens), PIECE):
            self._graph.set_inputs([SequenceInput(self._cache.view, (0,), (0,), tokens[start : start + PIECE], range(PIECE))])
            ggml.c.backend_cpu_set_n_threads(self._backend.address, self._governor.threads())
            for segment in self._graph.segments:
                ggml.compute(self._backend, segment.graph)
            assert self._graph.output is not None, "logits were asked for"
            yield np.asarray(self._graph.output)

    def close(self) -> None:
        """Give the memory back."""
        self._graph.close()
        self._cache.close()
        for handle in (self._arena, self._backend, self._buffer, self._ctx):
            handle.close()


def rounded(rows: npt.NDArray[np.float32], type_name: str) -> npt.NDArray[np.float32]:
    """What a type leaves of rows [n, width]."""
    from edge_rt.core.kv.ops import token_embeddings
    from edge_rt.native.ggml import quantise_rows

    number, (n, width) = _NUMBERS[type_name], rows.shape
    data = quantise_rows(rows, number)
    with ggml.context(1) as ctx, ggml.cpu_backend(1) as backend:
        tensor = ggml.new_tensor(ctx.address, number, (width, n))
        with ggml.allocate_context(ctx):
            ggml.c.backend_tensor_set(tensor, data, 0, len(data))
            return token_embeddings(tensor, range(n), backend)


def _error(source: ModelFile, group: Group, type_name: str) -> float:
    """The share of the squares of a group's weights that a type loses, from a sample of each tensor's rows."""
    import numpy as np

    lost = whole = 0.0
    for name in group.tensors:
        info = source.header.tensors[name]
        rows = next(float_rows(source, info, _SAMPLE))
        lost += float(np.square(rounded(rows, type_name) - rows).sum()) / len(rows) * prod(info.shape[1:])
        whole += float(np.square(rows).sum()) / len(rows) * prod(info.shape[1:])
    return lost / max(whole, 1e-30)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import numpy as np

    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: npt.NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found
