"""What the stages see of a teacher: its states, computed when asked for, or kept."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edge_rt_distill.model.architecture import Architecture
from edge_rt_distill.model.decoder import Decoder, Output
from edge_rt_distill.model.divergence import Final
from edge_rt_distill.model.precision import Rest
from edge_rt_distill.model.rows import Rows


class TeacherView(Protocol):
    """A teacher. Everything it gives is without gradient."""

    @property
    def architecture(self) -> Architecture:
        """Its sizes."""
        ...

    def says(self, hidden: Tensor) -> Final:
        """What its states [N, D] say of the student's tokens."""
        ...

    def hidden(self, rows: Rows) -> Tensor:
        """States behind the final norm [B, T, D]; what stands behind a row's length means nothing. The same for equal sequences."""
        ...

    def observe(self, rows: Rows, states: Collection[int], attention: Collection[int]) -> Output:
        """As ``Decoder.forward``: hidden states, and those and the maps of some layers."""
        ...


class LiveTeacher:
    """Computes everything when it is asked for. ``rest``: what the model says of tokens that it had and its student has not."""

    def __init__(self, model: Decoder, rest: Rest | None = None) -> None:
        self.model, self.rest = model, rest

    @property
    def architecture(self) -> Architecture:
        """See TeacherView."""
        return self.model.architecture

    def says(self, hidden: Tensor) -> Final:
        """See TeacherView."""
        return Final(hidden, self.model.head_weight.detach(), self.rest)

    def hidden(self, rows: Rows) -> Tensor:
        """See TeacherView."""
        return self.observe(rows, (), ()).hidden

    @torch.no_grad()
    def observe(self, rows: Rows, states: Collection[int], attention: Collection[int]) -> Output:
        """See TeacherView."""
        found: Output = self.model(rows.tokens, states=states, attention=attention)
        return found


class CachingTeacher(LiveTeacher):
    """Keeps hidden states of up to ``capacity`` bytes, as ``kept_as`` (in half precision 1.1 kB a token of SmolLM2; its logits are 197 kB).

    Each sequence is computed by itself, and rounded before its first use too: so what is given does not depend on what it was batched
    with, nor on what is in the cache, and a resumed run sees what the first one saw.
    """

    def __init__(
        self, model: Decoder, capacity: int = 1 << 30, kept_as: torch.dtype = torch.float16, rest: Rest | None = None
    ) -> None:  # fmt: skip
        super().__init__(model, rest)
        self.capacity, self.used, self.kept_as = capacity, 0, kept_as
        self.kept: dict[tuple[bytes, bool], Tensor] = {}  # what rounded products gave is another answer

    def hidden(self, rows: Rows) -> Tensor:
        """See TeacherView."""
        batch, length = rows.tokens.shape
        found = torch.zeros(batch, length, self.architecture.width, dtype=self.model.head_weight.dtype)
        for row in range(batch):
            tokens = rows.tokens[row, : int(rows.lengths[row])]
            found[row, : len(tokens)] = self._sequence(tokens)
        return found

    @torch.no_grad()
    def _sequence(self, tokens: Tensor) -> Tensor:
        key = hashlib.blake2b(tokens.numpy().tobytes(), digest_size=16).digest(), torch.is_autocast_enabled("cpu")
        states = self.kept.get(key)
        if states is None:
            states = self._computed(tokens[None]).hidden[0].to(self.kept_as)
            size = states.numel() * states.element_size()
            if self.used + size <= self.capacity:
                self.kept[key] = states
                self.used += size
        return states

    def _computed(self, tokens: Tensor) -> Output:
        """The model's, of matrices that were rounded once: where products are rounded, torch does so anew for each that is not trained."""
        rounded = self._rounded if torch.is_autocast_enabled("cpu") else {}
        found: Output = functional_call(self.model, rounded, (tokens,))
        return found

    @cached_property
    def _rounded(self) -> dict[str, Tensor]:
        kind = torch.get_autocast_dtype("cpu")
        found = self.model.layers.named_modules(prefix="layers")
        return {f"{name}.weight": one.weight.detach().to(kind) for name, one in found if isinstance(one, nn.Linear)}
