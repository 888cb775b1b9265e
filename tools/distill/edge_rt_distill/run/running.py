"""What a written student does in the runtimes: logits of edge-rt and of stock llama.cpp, and how far they are from the teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import edge_rt
from edge_rt.hooks import DataError
from edge_rt_distill.evaluate.measures import Counts, Measures, count_rows, summarise
from edge_rt_distill.model.divergence import kl
from edge_rt_distill.model.rows import TokenSequence, rows_of
from edge_rt_distill.progress import Told, quiet
from edge_rt_distill.stages.teachers import TeacherView

Logits = npt.NDArray[np.float32]


def run_logits(
    model: Path, sequences: Sequence[TokenSequence], *, compensation: str = "auto", engine: str | None = None,
    told: Told = quiet,
) -> Iterator[Logits]:  # fmt: skip
    """The runtime's logits [T, V] of one sequence after the other. Raises what ``edge_rt.open`` raises."""
    longest = max(len(one.tokens) for one in sequences)
    with edge_rt.open(model, compensation=compensation, context=longest, engine=engine) as running:
        for done, one in enumerate(sequences, 1):
            yield running.logits(one.tokens)
            told(done, len(sequences))


@torch.no_grad()
def from_stock(model: Path, sequences: Sequence[TokenSequence]) -> float:
    """How far edge-rt is from stock llama.cpp: KL(stock || edge-rt) in nats per token.

    It is not 0: edge-rt times, machine by machine, which kernels of attention and of packed weights are faster, and those round otherwise;
    where that moves an input over the border between two of the 8-bit steps to which it is rounded, logits move by up to some percent. That
    is below a thousandth of a nat. A model that is read wrongly is tenths of a nat away, or more.
    """
    ours = run_logits(model, sequences, compensation="off")
    stock = run_logits(model, sequences, compensation="off", engine="llama_cpp")
    apart = []
    for q, p in zip(ours, stock, strict=True):
        log_q, log_p = (torch.from_numpy(logits).log_softmax(-1) for logits in (q, p))
        apart.append(kl(log_p.exp(), log_p, log_q))
    return float(torch.cat(apart).mean())


class _Logits(NamedTuple):
    """Logits [N, V] that are there."""

    values: Tensor

    def log_probabilities(self, rows: slice) -> Tensor:
        """See Speaker."""
        return self.values[rows].log_softmax(-1)


def against(teacher: TeacherView, sequences: Sequence[TokenSequence], logits: Iterable[Logits]) -> Measures:
    """How far the runtime's logits are from the teacher's. Raises DataError if nothing counts."""
    sums = []
    for one, found in zip(sequences, logits, strict=True):
        rows = rows_of([one])
        if bool(rows.mask.any()):
            sums.append(count_rows(_Logits(torch.from_numpy(found)[rows.mask[0] > 0]), teacher, rows)[:, 0])
    if not sums:
        raise DataError("no position counts in what a student is to be measured on; add samples with an answer or a text")
    return summarise(Counts(*torch.stack(sums, 1)))
