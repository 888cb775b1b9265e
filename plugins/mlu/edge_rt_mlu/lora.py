"""LoRA adapters: what they add to the products of a step, scale * B (A x) for the tokens of the sequences that go through one.

The base product is made for all tokens of a step together, so one step may carry sequences of several adapters and of none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import linear

from edge_rt.hooks import UnsupportedModel
from edge_rt_mlu.tensors import Reader

if TYPE_CHECKING:
    from edge_rt.hooks import LoraFile

EMBEDDING = "token_embd.weight"


class Factors(NamedTuple):
    """``a`` [rank, in] and ``b`` [out, rank] on the device; of the token embedding ``a`` is [V, rank]. ``scale``: of an adapter that is
    applied once.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class LoraWeights:
    """The factors of one adapter on the device, by the name of the weight that they change."""

    def __init__(self, lora: LoraFile, changeable: Collection[str], device: torch.device, dtype: torch.dtype) -> None:
        """``changeable``: weights that the engine lets an adapter change.

        Raises UnsupportedModel for an adapter of which a part would have no effect, ModelFileError, ModelChanged.
        """
        strange = next((pair.base for pair in lora.pairs if pair.base not in changeable), None)
        if strange:
            raise UnsupportedModel(f"the torch engine lets no adapter change {strange}; run it with --engine llama_cpp")
        lora.file.check_unchanged()
        reader = Reader(lora.file)
        self._factors: dict[str, Factors] = {}
        for pair in lora.pairs:
            a, b = (torch.empty((info.shape[1], info.shape[0]), dtype=dtype) for info in (pair.a, pair.b))
            reader.fill(a, pair.a.name, pair.a.shape)
            reader.fill(b, pair.b.name, pair.b.shape)
            self._factors[pair.base] = Factors(a.to(device), b.to(device), lora.scale(pair, 1.0))

    def get(self, name: str) -> Factors | None:
        """The factors of a weight, None if it stays as it is."""
        return self._factors.get(name)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(factors.a.nbytes + factors.b.nbytes for factors in self._factors.values())

    @property
    def rank(self) -> int:
        """The largest."""
        return max(int(factors.b.shape[1]) for factors in self._factors.values())


class Applied(NamedTuple):
    """An adapter as a sequence has it: ``scale`` times."""

    weights: LoraWeights
    scale: float


class Run(NamedTuple):
    """Rows [first, first + n) of a step that go through one adapter."""

    applied: Applied
    first: int
    n: int

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.first, self.first + self.n)

    def factors(self, name: str) -> tuple[Factors, float] | None:
        """Of a weight the factors and what B (A x) is multiplied with; None if the adapter leaves it as it is."""
        found = self.applied.weights.get(name)
        return None if found is None else (found, found.scale * self.applied.scale)


def runs(counts: Iterable[tuple[Applied | None, int]]) -> list[Run]:
    """The runs of a step whose parts have so many rows each; neighbours with the same adapter and scale are one."""
    found: list[Run] = []
    first = 0
    for applied, n in counts:
        if applied is not None and n:
            last = found[-1] if found else None
            if last and last.applied == applied and last.first + last.n == first:
                found[-1] = last._replace(n=last.n + n)
            else:
                found.append(Run(applied, first, n))
        first += n
    return found


def add_terms(y: torch.Tensor, x: torch.Tensor, runs: Sequence[Run], parts: Sequence[tuple[str, int]]) -> None:
    """Add to y [T, rows] in float32, the product of x [T, columns] with weights one below the other (``parts``: name, first row)."""
    for run in runs:
        for name, row in parts:
            if found := run.factors(name):
                (a, b, _), scale = found
                y[run.rows, row : row + len(b)] += linear(linear(x[run.rows], a), b).float() * scale


def add_embeddings(y: torch.Tensor, tokens: torch.Tensor, runs: Sequence[Run]) -> None:
    """Add to y [T, E] in float32, rows of the token embedding."""
    for run in runs:
        if found := run.factors(EMBEDDING):
            (a, b, _), scale = found
            y[run.rows] += linear(a[tokens[run.rows]], b).float() * scale
