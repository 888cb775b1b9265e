"""What is trained in: float32, or bfloat16 in the products where the CPU multiplies it faster (weights, sums and steps stay float32)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from edge_rt.hooks import cpu_processors

Precision = Literal["float32", "bfloat16"]
FASTER = ("avx512_bf16", "amx_bf16", "bf16")
"""Features of CPUs that multiply bfloat16. Where there is none, torch converts for every product, which is slower than float32."""


def best() -> Precision:
    """The faster one here."""
    found = next(cpu_processors(), None)
    return "bfloat16" if found is not None and any(name in found.features for name in FASTER) else "float32"


def computing_in(precision: Precision) -> AbstractContextManager[object]:
    """While it lasts, products are made so: of SmolLM2 bfloat16 is 0.0008 nats from float32, and twice as fast to train."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


class Rest(NamedTuple):
    """Tokens that a teacher has and its student has not: rows of its head [R, D], and for each the student's token that it is written with
    first, ``into`` [R]. To the student, what the teacher says of one is said of the other."""

    weight: Tensor
    into: Tensor


class Head(NamedTuple):
    """Logits of a model's head [V, D], in the precision that holds where it is made; with those of a ``rest`` added where they belong."""

    weight: Tensor
    rest: Rest | None = None

    @classmethod
    def of(cls, weight: Tensor, rest: Rest | None = None) -> Head:
        """The head, converted once."""
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        return cls(weight.to(kind), None if rest is None else rest._replace(weight=rest.weight.to(kind)))

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] of hidden states [N, D], in their type. With a rest: of probabilities that were added, so up to a number for each row."""
        states = hidden.to(self.weight.dtype)
        own = (states @ self.weight.T).to(hidden.dtype)
        if self.rest is None or not len(self.rest.into):
            return own
        others = (self.rest.weight @ states.T).to(hidden.dtype)  # [R, N]: rows are added as a whole
        most = torch.maximum(own.amax(1), others.amax(0))
        total = own.sub_(most[:, None]).exp_()
        added = torch.zeros_like(total.T, memory_format=torch.contiguous_format).index_add_(0, self.rest.into, others.sub_(most).exp_())
        return total.add_(added.T).clamp_min_(torch.finfo(total.dtype).tiny).log_()

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient of hidden states [N, D] from that of logits [N, V], in its type."""
        return (gradient.to(self.weight.dtype) @ self.weight).to(gradient.dtype)

    def of_weight(self, gradient: Tensor, hidden: Tensor) -> Tensor:
        """The gradient of the head [V, D], in the type of ``gradient``."""
        return (gradient.T.to(self.weight.dtype) @ hidden.to(self.weight.dtype)).to(gradient.dtype)
