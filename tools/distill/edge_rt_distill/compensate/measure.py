"""What corrections are judged by: the KL from the float model, at every position of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.divergence import Final, finals, mean_divergence
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.quantise.walk import side_by_side


class Reference(NamedTuple):
    """A text, and what the float model says there."""

    batches: list[Rows]
    said: list[Final]

    def kl(self, model: Decoder) -> float:
        """Mean over all positions, nats a token."""
        return mean_divergence(model, self.said, self.batches)


def everywhere(sequences: Sequence[Sequence[int]], batch_tokens: int = 512) -> list[Rows]:
    """Rows of a text, every position of which counts, the last one too: what comes next is not looked at."""
    return [rows._replace(mask=rows.real.float()) for rows in side_by_side(sequences, batch_tokens)]


def reference(teacher: Decoder, sequences: Sequence[Sequence[int]]) -> Reference:
    """What other models are compared with. Raises DataError if there are no tokens."""
    batches = everywhere(sequences)
    return Reference(batches, finals(teacher, batches))
