"""What a written student does in the runtimes: logits of edge-rt and of stock llama.cpp, and how far they are from the teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import edge_rt
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.rows import TokenSequence

Logits = npt.NDArray[np.float32]


def run_logits(
    model: Path, sequences: Sequence[TokenSequence], *, compensation: str = "auto", engine: str | None = None,
    told: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[Logits]:  # fmt: skip
    """The runtime's logits [T, V] of one sequence after the other. Raises what ``edge_rt.open`` raises."""
    longest = max(len(one.tokens) for one in sequences)
    with edge_rt.open(model, compensation=compensation, context=longest, engine=engine) as running:
        for done, one in enumerate(sequences, 1):
            yield running.logits(one.tokens)
            told(done, len(sequences))


def equal_to_stock(model: Path, sequences: Sequence[TokenSequence]) -> bool:
    """Whether stock llama.cpp gives the same logits, within what its own kernels differ by between batch sizes."""
    ours = run_logits(model, sequences, compensation="off")
    stock = run_logits(model, sequences, compensation="off", engine="llama_cpp")
    return all(bool(np.abs(one - other).max() <= 1e-3 * np.abs(one).max()) for one, other in zip(ours, stock, strict=True))


@torch.no_grad()
def against(teacher: Decoder, sequences: Sequence[TokenSequence], logits: Iterable[Logits]) -> dict[str, float]:
    """KL(teacher||runtime) in nats, share of positions with the same likeliest token, and perplexity by the teacher's."""
    kl = same = excess = count = 0.0
    for one, found in zip(sequences, logits, strict=True):
        tokens = torch.tensor([one.tokens])
        counted = torch.tensor(one.targets[1:]).nonzero().squeeze(-1)
        p = torch.log_softmax(teacher.logits(teacher(tokens).hidden[0][counted]), -1)
        q = torch.log_softmax(torch.from_numpy(found)[counted], -1)
        true = tokens[0][counted + 1][:, None]
        kl += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        excess += float((p.gather(-1, true) - q.gather(-1, true)).sum())
        count += len(counted)
    return {"kl": kl / count, "top1": same / count, "perplexity_ratio": math.exp(min(700.0, excess / count))}
