"""The grader ``content``: what a segment is made of, by rules for English and Chinese (edge_rt/core/context/grading.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.hooks import GraderFactory, hookimpl

if TYPE_CHECKING:
    from edge_rt.hooks import Grade, Segment

EDGE_RT_API = 1


def make(weights: Path | None) -> Callable[[Segment], Grade]:
    """The grader with the weights of a file, or the default ones. Raises OptionError."""
    from edge_rt.hooks import content_grader  # only now: its patterns take milliseconds to compile

    return content_grader(weights)


@hookimpl
def edge_rt_graders() -> Iterable[GraderFactory]:
    """One grader."""
    return [GraderFactory("content", make, "clauses, connectives, names, times, amounts and identifiers, in English and Chinese")]
