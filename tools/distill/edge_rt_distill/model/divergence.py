"""How far one model's distributions are from another's: KL(teacher || student) over the whole vocabulary, in nats.

Every stage that judges a model by another does it with these. ``evaluate.measures`` adds standard errors; ``losses.token``, by which
students are trained, has other divergences too, and gradients of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from edge_rt.hooks import DataError
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.logits import pieces
from edge_rt_distill.model.precision import Head, Rest
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.progress import Told, quiet


class Final(NamedTuple):
    """All that a model says at N positions: states behind its final norm [N, D], and its head [V, D]. 4 D bytes a position. ``rest``: of a
    teacher whose student has fewer tokens."""

    hidden: Tensor
    head: Tensor
    rest: Rest | None = None

    def log_probabilities(self, rows: slice) -> Tensor:
        """Of every token at some of the positions [n, V], in nats."""
        return Head.of(self.head, self.rest).logits(self.hidden[rows]).log_softmax(-1)

    def of(self, labels: Tensor) -> Tensor:
        """Log-probabilities of a token at each position [N], in nats."""
        parts = pieces(len(labels), len(self.head))
        found = [self.log_probabilities(rows).gather(-1, labels[rows, None])[:, 0] for rows in parts]
        return torch.cat(found) if found else self.hidden.new_zeros(0)


def final(model: Decoder, rows: Rows, *, skip: Collection[int] = ()) -> Final:
    """What a model says where predictions count, row by row. ``skip``: layers that are left out."""
    return Final(model(rows.tokens, skip=skip).hidden[rows.mask > 0], model.head_weight)


def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [n] of probabilities and log-probabilities [n, V], with gradients by q."""
    # Where nothing differs, rounding may give less than nothing.
    return torch.bmm(p[:, None], (log_p - log_q)[:, :, None])[:, 0, 0].clamp_min(0)


def divergences(student: Sequence[Final], teacher: Final, told: Told = quiet) -> Tensor:
    """[R, N]: the divergence of each of R students at each position, with gradients by the students'. ``told``: positions done, and all."""
    found = []
    for rows in pieces(len(teacher.hidden), len(teacher.head)):
        with torch.no_grad():
            log_p = teacher.log_probabilities(rows)
            p = log_p.exp()
        found.append(torch.stack([kl(p, log_p, one.log_probabilities(rows)) for one in student]))
        told(rows.stop, len(teacher.hidden))
    return torch.cat(found, 1) if found else torch.zeros(len(student), 0)


def divergence(student: Final, teacher: Final) -> Tensor:
    """[N], with gradients by the student's states and head."""
    return divergences([student], teacher)[0]


class Reference(NamedTuple):
    """A text, and what a teacher says there: worth keeping where many students are compared with it."""

    batches: Sequence[Rows]
    said: Sequence[Final]

    @torch.no_grad()
    def kl(self, student: Decoder, *, skip: Collection[int] = ()) -> float:
        """Mean over the predictions by what they weigh, nats. ``skip``: the student's layers to leave out. Raises DataError where no
        prediction counts.
        """
        total = count = 0.0
        for known, rows in zip(self.said, self.batches, strict=True):
            weights = rows.mask[rows.mask > 0].double()
            total += float(divergence(final(student, rows, skip=skip), known).double() @ weights)
            count += float(weights.sum())
        if not count:
            raise DataError("no prediction counts in these samples; take longer or more samples")
        return total / count


@torch.no_grad()
def reference(teacher: Decoder, batches: Sequence[Rows]) -> Reference:
    """What students are compared with."""
    return Reference(batches, [final(teacher, rows) for rows in batches])


class Speaker(Protocol):
    """What says something at N positions: ``Final``, or logits that are there."""

    def log_probabilities(self, rows: slice) -> Tensor:
        """Of every token at some of the positions [n, V], in nats."""
        ...


@torch.no_grad()
def compare(student: Speaker, teacher: Final, labels: Tensor, chunk: int = 0) -> Tensor:
    """[3, N]: KL(teacher || student), same likeliest token (1 or 0), and negative log-likelihood to the student of the true next tokens
    ``labels`` [N]. ``chunk``: positions at a time, 0: as many as fit.
    """
    found = []
    for rows in pieces(len(labels), len(teacher.head), teacher.hidden.element_size(), chunk):
        log_p, log_q = teacher.log_probabilities(rows), student.log_probabilities(rows)
        same = log_q.argmax(-1) == log_p.argmax(-1)
        nats = -log_q.gather(-1, labels[rows, None])[:, 0]
        found.append(torch.stack((kl(log_p.exp(), log_p, log_q), same.to(log_q), nats)))
    return torch.cat(found, -1) if found else torch.zeros(3, 0)
