"""How far a student is from its teacher on held-out sequences, with standard errors.

Positions of one sequence are not independent, so errors are over sequences: of a mean over positions sum(a) / sum(n), with a and n the
sum and the number of positions of each of S sequences, the variance is S / (S - 1) x sum((a - mean n)^2) / sum(n)^2 (the estimator of a
ratio, Cochran 1977, Sampling Techniques, 6.4). Of a single sequence no error is known: infinity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt.hooks import DataError, OptionError
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.divergence import Speaker, compare, final
from edge_rt_distill.model.rows import Rows, TokenSequence, grouped, rows_of
from edge_rt_distill.stages.teachers import LiveTeacher, TeacherView


class Counts(NamedTuple):
    """Sums over each sequence's positions that count [S]: the ``number`` of those at which the teacher knows what the student has read,
    KL(teacher||student) there in nats, and at how many of them both find the same token likeliest; the negative log-likelihood of the
    text, in nats, to the ``student`` and to the ``teacher``, and its ``tokens``, the teacher's."""

    number: Tensor
    kl: Tensor
    same: Tensor
    student: Tensor
    teacher: Tensor
    tokens: Tensor


class Measures(NamedTuple):
    """Means over positions. ``kl``: KL(teacher||student), nats. ``top1``: share of positions with the same likeliest token.

    ``perplexity_ratio``: the student's perplexity by the teacher's: of the text, a token of the teacher's. ``*_error``: standard errors.
    ``tokens``: positions that counted.
    """

    kl: float
    kl_error: float
    top1: float
    top1_error: float
    perplexity_ratio: float
    perplexity_ratio_error: float
    perplexity_student: float
    perplexity_teacher: float
    tokens: int
    sequences: int


def divergence(
    student: Decoder, teacher: Decoder | TeacherView, sequences: Sequence[TokenSequence], *, batch_tokens: int = 2048
) -> Measures:  # fmt: skip
    """Compare on ``sequences``, at most ``batch_tokens`` at a time. Raises DataError if nothing counts, OptionError for other tokens."""
    return summarise(count(student, teacher, sequences, batch_tokens=batch_tokens))


@torch.no_grad()
def count(student: Decoder, teacher: Decoder | TeacherView, sequences: Sequence[TokenSequence], *, batch_tokens: int = 2048) -> Counts:
    """What ``divergence`` is made of, sequence by sequence in their order. Raises as it does."""
    view = LiveTeacher(teacher) if isinstance(teacher, Decoder) else teacher
    if student.architecture.vocabulary != view.architecture.vocabulary:
        ours, theirs = student.architecture.vocabulary, view.architecture.vocabulary
        raise OptionError(f"the student has {ours} tokens and the teacher {theirs}; compare models of one tokenizer")
    counted = [i for i, sequence in enumerate(sequences) if any(sequence.targets[1:])]
    if not counted:
        raise DataError("no position counts in what a student is to be measured on; add samples with an answer or a text")
    sums = torch.zeros(len(Counts._fields), len(sequences), dtype=torch.float64)
    for chosen in grouped([len(sequences[i].tokens) for i in counted], batch_tokens):
        rows = rows_of(sequences, [counted[i] for i in chosen])
        sums[:, torch.tensor(rows.numbers)] = count_rows(final(student, rows), view, rows)
    return Counts(*sums[:, counted])


@torch.no_grad()
def count_rows(student: Speaker, teacher: TeacherView, rows: Rows) -> Tensor:
    """The sums of ``Counts`` for each row [6, B]. ``student``: what it says where predictions count, row by row."""
    at = rows.mask > 0
    known = teacher.knows(rows)[at]
    kl, same, nats = compare(student, teacher.says(teacher.hidden(rows)[at]), rows.labels[at]).double()
    nothing = torch.zeros_like(kl)
    each = torch.stack((known.double(), kl.where(known, nothing), same.where(known, nothing), nats))
    return torch.cat((torch.zeros(4, len(at), dtype=torch.float64).index_add_(1, at.nonzero()[:, 0], each), teacher.nats(rows)))


def summarise(counts: Counts) -> Measures:
    """Means and their standard errors."""
    kl, kl_error = _mean(counts.kl, counts.number)
    top1, top1_error = _mean(counts.same, counts.number)
    excess, excess_error = _mean(counts.student - counts.teacher, counts.tokens)
    ours, theirs = (_mean(one, counts.tokens)[0] for one in (counts.student, counts.teacher))
    ratio = _exp(excess)
    return Measures(
        kl, kl_error, top1, top1_error, ratio, ratio * excess_error, _exp(ours), _exp(theirs), int(counts.number.sum()), len(counts.number)
    )


def measured(found: Measures) -> dict[str, float]:
    """Of held-out measures what summaries say."""
    return {"kl": found.kl, "top1": found.top1, "perplexity_ratio": found.perplexity_ratio}


def difference(left: Counts, right: Counts, name: str = "kl") -> tuple[float, float]:
    """(mean of left minus right, its standard error) of two students on the same sequences: what they share is no noise."""
    if not left.number.equal(right.number):
        raise OptionError("two students are compared on the same sequences; measure them again")
    return _mean(getattr(left, name) - getattr(right, name), left.number)


def _mean(sums: Tensor, numbers: Tensor) -> tuple[float, float]:
    total, count = float(numbers.sum()), len(numbers)
    mean = float(sums.sum()) / total
    if count < 2:
        return mean, math.inf
    variance = count / (count - 1) * float((sums - mean * numbers).square().sum()) / total**2
    return mean, math.sqrt(variance)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
