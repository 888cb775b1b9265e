"""How far a student with fewer tokens is from its teacher, text by text: their tokens differ, the text does not.

Distributions are compared where both have read the same text, the teacher's of the student's tokens (``precision.Rest``). Perplexity is
that of the text: all nats of each by the teacher's tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt.hooks import DataError
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.divergence import Final, agreements
from edge_rt_distill.model.load import Teacher
from edge_rt_distill.model.rows import TokenSequence
from edge_rt_distill.model.tokens import Tokeniser
from edge_rt_distill.model.vocabulary import Fewer


class TextMeasures(NamedTuple):
    """``kl``: KL(teacher || student) in nats, ``top1``: share of places with the same likeliest token. ``perplexity_ratio``: the student's
    perplexity by the teacher's. ``longer``: the student's tokens by the teacher's, less 1."""

    kl: float
    top1: float
    perplexity_ratio: float
    longer: float


class Aligned(NamedTuple):
    """The same text in tokens of both. ``targets``: whether a token counts. ``ours``, ``theirs``: how many tokens of each have been read
    where both stand at the same place and what follows counts."""

    student: list[int]
    student_targets: list[bool]
    teacher: list[int]
    teacher_targets: list[bool]
    ours: list[int]
    theirs: list[int]


def align(sequence: TokenSequence, teacher: Tokeniser, fewer: Fewer) -> Aligned:
    """A sequence of the student's tokens and the teacher's of the same text. What is no text, as a sequence that begins or ends within a
    character, stays as it is.
    """
    tokens, ours = list(sequence.tokens), fewer.teacher.tokeniser
    texts = [ours.vocab.piece(token, False) for token in tokens]
    theirs, sizes = list[int](), list[int]()
    for start, end in _stretches(texts):
        some = [fewer.kept[token] for token in tokens[start:end]]
        if texts[start] and (text := _decoded(b"".join(texts[start:end]))) is not None:
            some = teacher.encode(text)
        theirs += some
        sizes += [len(teacher.vocab.piece(token, False)) or 1 for token in some]
    counted = [bool(target) for target in sequence.targets]
    own, other = list(accumulate(len(text) or 1 for text in texts)), list(accumulate(sizes))
    flags = [counted[bisect_right(own, begin)] for begin in [0, *other[:-1]]]
    place = {at: number for number, at in enumerate(own, 1)}
    both = [(place[at], number) for number, at in enumerate(other, 1) if at in place]
    both = [(i, j) for i, j in both if i < len(tokens) and counted[i]]
    return Aligned(tokens, counted, theirs, flags, [i for i, _ in both], [j for _, j in both])


def _stretches(texts: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Tokens of text in a row, and each control token, which has none, by itself: it is counted as a byte."""
    start = 0
    for at, text in enumerate(texts):
        if not text:
            if start < at:
                yield start, at
            yield at, at + 1
            start = at + 1
    if start < len(texts):
        yield start, len(texts)


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def logits_of(model: Decoder, sequences: Sequence[TokenSequence]) -> Iterator[Tensor]:
    """What a student says [T, V] of each sequence, as ``by_text`` wants it."""
    for one in sequences:
        with torch.no_grad():
            yield model.logits(model(torch.tensor([one.tokens])).hidden[0])


@torch.no_grad()
def by_text(teacher: Teacher, fewer: Fewer, sequences: Sequence[TokenSequence], logits: Iterable[Tensor]) -> TextMeasures:
    """Compare a student with a teacher that has more tokens. ``logits`` [T, V]: the student's of each sequence of its tokens.

    Raises DataError if nothing counts.
    """
    kl = same = places = student_nats = teacher_nats = student_tokens = teacher_tokens = 0.0
    for one, found in zip(sequences, logits, strict=True):
        text = align(one, teacher.tokeniser, fewer)
        if not text.ours:
            continue
        log_q = found.float().log_softmax(-1)
        hidden = teacher.model(torch.tensor([text.teacher])).hidden[0]
        said_there = Final(hidden[[j - 1 for j in text.theirs]], fewer.teacher.model.head_weight, fewer.rest)
        log_p = said_there.log_probabilities(slice(None))
        each = agreements(log_p, log_q[[i - 1 for i in text.ours]], torch.tensor([text.student[i] for i in text.ours]))
        kl, same, places = kl + float(each[0].sum()), same + float(each[1].sum()), places + len(text.ours)
        said = torch.arange(1, len(text.student))[torch.tensor(text.student_targets[1:])]
        student_nats -= float(log_q[said - 1].gather(1, torch.tensor(text.student)[said, None]).sum())
        meant = torch.arange(1, len(text.teacher))[torch.tensor(text.teacher_targets[1:])]
        teacher_nats -= float(Final(hidden[meant - 1], teacher.model.head_weight).of(torch.tensor(text.teacher)[meant]).sum())
        student_tokens, teacher_tokens = student_tokens + len(said), teacher_tokens + len(meant)
    if not places:
        raise DataError("no place counts in what a student is to be measured on; add samples with an answer or a text")
    ratio = math.exp(min(700.0, (student_nats - teacher_nats) / teacher_tokens))
    return TextMeasures(kl / places, same / places, ratio, student_tokens / teacher_tokens - 1)
