"""What corrections are judged by: every position of a text."""

from __future__ import annotations

from collections.abc import Sequence

from edge_rt_distill.model.rows import Rows
from edge_rt_distill.quantise.walk import side_by_side


def everywhere(sequences: Sequence[Sequence[int]], batch_tokens: int = 512) -> list[Rows]:
    """Rows of a text, every position of which counts, the last one too: what comes next is not looked at."""
    return [rows._replace(mask=rows.real.float()) for rows in side_by_side(sequences, batch_tokens)]
