"""What the stages see of a teacher: its states, computed when asked for, or kept."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edge_rt_distill.model.alignment import Aligned, align
from edge_rt_distill.model.architecture import Architecture
from edge_rt_distill.model.decoder import Decoder, Output
from edge_rt_distill.model.divergence import Final
from edge_rt_distill.model.rows import Rows, fill
from edge_rt_distill.model.tokens import Tokeniser
from edge_rt_distill.model.vocabulary import Fewer


class TeacherView(Protocol):
    """A teacher. Everything it gives is without gradient."""

    @property
    def architecture(self) -> Architecture:
        """Its sizes."""
        ...

    def says(self, hidden: Tensor) -> Final:
        """What its states [N, D] say of the student's tokens."""
        ...

    def knows(self, rows: Rows) -> Tensor:
        """[B, T] bool: where it has read what the student has, and so says something of what follows."""
        ...

    def hidden(self, rows: Rows) -> Tensor:
        """States behind the final norm [B, T, D]; what stands where it does not know means nothing. The same for equal sequences."""
        ...

    def observe(self, rows: Rows, states: Collection[int], attention: Collection[int]) -> Output:
        """As ``Decoder.forward``: hidden states, and those and the maps of some layers."""
        ...

    def nats(self, rows: Rows) -> Tensor:
        """[2, B]: the negative log-likelihood of what counts in each row, and in how many of its own tokens that is written."""
        ...


class LiveTeacher:
    """Computes everything when it is asked for."""

    def __init__(self, model: Decoder) -> None:
        self.model = model

    @property
    def architecture(self) -> Architecture:
        """See TeacherView."""
        return self.model.architecture

    def says(self, hidden: Tensor) -> Final:
        """See TeacherView."""
        return Final(hidden, self.model.head_weight.detach())

    def knows(self, rows: Rows) -> Tensor:
        """See TeacherView: everywhere."""
        return rows.real

    def hidden(self, rows: Rows) -> Tensor:
        """See TeacherView."""
        return self.observe(rows, (), ()).hidden

    @torch.no_grad()
    def observe(self, rows: Rows, states: Collection[int], attention: Collection[int]) -> Output:
        """See TeacherView."""
        found: Output = self.model(rows.tokens, states=states, attention=attention)
        return found

    @torch.no_grad()
    def nats(self, rows: Rows) -> Tensor:
        """See TeacherView."""
        at = rows.mask > 0
        each = -self.says(self.hidden(rows)[at]).of(rows.labels[at]).double()
        return torch.zeros(2, len(at), dtype=torch.float64).index_add_(1, at.nonzero()[:, 0], torch.stack((each, torch.ones_like(each))))


class CachingTeacher(LiveTeacher):
    """Keeps hidden states of up to ``capacity`` bytes, as ``kept_as`` (in half precision 1.1 kB a token of SmolLM2; its logits are 197 kB).

    Each sequence is computed by itself, and rounded before its first use too: so what is given does not depend on what it was batched
    with, nor on what is in the cache, and a resumed run sees what the first one saw.
    """

    def __init__(self, model: Decoder, capacity: int = 1 << 30, kept_as: torch.dtype = torch.float16) -> None:
        super().__init__(model)
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


class ReadingTeacher:
    """A teacher for a student with fewer tokens: it reads each text in its own, as it is used to, and says of the student's what follows.

    Within a word that the student writes in pieces it has nothing to say. Maps of attention have a row and a column for each token: for
    those it reads the student's.
    """

    def __init__(self, whole: LiveTeacher, tokeniser: Tokeniser, fewer: Fewer) -> None:
        """``whole``: with all of its tokens, those of ``tokeniser``."""
        self.whole, self.tokeniser, self.fewer = whole, tokeniser, fewer

    @property
    def architecture(self) -> Architecture:
        """See TeacherView; with the student's tokens."""
        return self.fewer.teacher.model.architecture

    def says(self, hidden: Tensor) -> Final:
        """See TeacherView: what it says of a token that is gone counts for the one that it begins with."""
        return Final(hidden, self.fewer.teacher.model.head_weight.detach(), self.fewer.rest)

    def knows(self, rows: Rows) -> Tensor:
        """See TeacherView."""
        return _read(rows, self._texts(rows)) > 0

    def hidden(self, rows: Rows) -> Tensor:
        """See TeacherView."""
        texts = self._texts(rows)
        return _there(self.whole.hidden(fill([one.tokens for one in texts])), _read(rows, texts))

    @torch.no_grad()
    def observe(self, rows: Rows, states: Collection[int], attention: Collection[int]) -> Output:
        """See TeacherView."""
        texts = self._texts(rows)
        read = _read(rows, texts)
        found = self.whole.observe(fill([one.tokens for one in texts]), states, ())
        maps = self.fewer.teacher.model(rows.tokens, attention=attention).attention if attention else {}
        return Output(_there(found.hidden, read), {layer: _there(one, read) for layer, one in found.states.items()}, maps)

    def nats(self, rows: Rows) -> Tensor:
        """See TeacherView."""
        texts = self._texts(rows)
        weights = [[row[at - 1] if at else 0.0 for at in one.origin] for row, one in zip(rows.mask.tolist(), texts, strict=True)]
        return self.whole.nats(fill([one.tokens for one in texts], weights))

    def _texts(self, rows: Rows) -> list[Aligned]:
        sizes = rows.lengths.tolist()
        return [align(row[:size].tolist(), self.tokeniser, self.fewer) for row, size in zip(rows.tokens, sizes, strict=True)]


def _read(rows: Rows, texts: Sequence[Aligned]) -> Tensor:
    """[B, T]: how many of the teacher's tokens are read where each of the student's ends; 0 where none ends there."""
    found = torch.zeros_like(rows.tokens)
    for row, one in enumerate(texts):
        found[row, : len(one.read)] = torch.tensor(one.read)
    return found


def _there(states: Tensor, read: Tensor) -> Tensor:
    """Of the teacher's states [B, S, D] those where the student's tokens end [B, T, D]."""
    return states.gather(1, (read - 1).clamp_min(0)[..., None].expand(-1, -1, states.shape[-1]))
