"""What must stay in the context whatever its grade. (Attention sinks, the first cells, are counted in tokens: candidates.py adds them.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from edge_rt.core.context.segments import Segment

Protection = Literal["attention sinks", "system prompt", "tool schema", "newest part", "current question"]

NEWEST = 0.1
"""The share of all characters, from the end, that is protected as the newest part."""


def protections(segments: Sequence[Segment], share: float = NEWEST) -> list[tuple[Protection, ...]]:
    """Why each segment is protected; an empty tuple: it is not. A segment that reaches into the newest part is protected whole.

    ``share`` of all characters is the newest part (0: there is none; the window counts it in tokens).
    """
    question = max((segment.message for segment in segments if segment.role == "user"), default=None)
    total = sum(len(segment.text) for segment in segments)
    after = total  # characters from this segment's beginning to the end
    found: list[tuple[Protection, ...]] = []
    for segment in segments:
        newest = after - len(segment.text) < share * total
        after -= len(segment.text)
        reasons: list[tuple[bool, Protection]] = [
            (segment.kind == "system", "system prompt"),
            (segment.kind == "schema", "tool schema"),
            (newest and segment.kind != "schema", "newest part"),
            (segment.message == question, "current question"),
        ]
        found.append(tuple(name for holds, name in reasons if holds))
    return found
