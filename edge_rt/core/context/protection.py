"""What must stay in the context whatever its grade. (The first cells, attention sinks, are counted in tokens: the window adds them.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from edge_rt.core.context.segments import Segment

Protection = Literal["system prompt", "tool schema", "newest part", "current question"]

NEWEST = 0.1
"""The share of all characters, from the end, that is protected as the newest part."""


def protections(segments: Sequence[Segment]) -> list[tuple[Protection, ...]]:
    """Why each segment is protected; an empty tuple: it is not. A segment that reaches into the newest part is protected whole."""
    question = max((segment.message for segment in segments if segment.role == "user"), default=None)
    total = sum(len(segment.text) for segment in segments)
    after = total  # characters from this segment's beginning to the end
    found: list[tuple[Protection, ...]] = []
    for segment in segments:
        newest = after - len(segment.text) < NEWEST * total
        after -= len(segment.text)
        reasons: list[tuple[bool, Protection]] = [
            (segment.kind == "system", "system prompt"),
            (segment.kind == "schema", "tool schema"),
            (newest and segment.kind != "schema", "newest part"),
            (segment.message == question, "current question"),
        ]
        found.append(tuple(name for holds, name in reasons if holds))
    return found
