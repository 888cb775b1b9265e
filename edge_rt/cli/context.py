"""`edge-rt context explain`: a conversation as the context window sees it. Needs no model and no engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_rt.cli.generation import read_text
from edge_rt.cli.options import JsonOption, argument, option
from edge_rt.cli.output import write, write_json
from edge_rt.core.context.eviction import Protection, protections
from edge_rt.core.context.history import Segment, segments
from edge_rt.errors import OptionError
from edge_rt.hooks import Grade
from edge_rt.plugin_host.registry import Registry
from edge_rt.types import Message

_SHOWN = 100  # characters of a segment


class ContextCommand(JsonOption):
    """Show a conversation's segments, their grades and what makes them.

    Grades say which segments a full context can best do without; protected ones must stay.
    FILE holds messages, as a JSON list or one a line, or a request {"messages": [...], "tools": [...]}, or else plain text.

    Examples:
      edge-rt context explain talk.json
      edge-rt context explain letter.txt --weights mine.ini
      edge-rt context explain talk.json --json | jq -r 'select(.score < 0.1) | .text'
    """

    action: str = argument(metavar="explain", help="What to do: explain.")
    file: str = argument(metavar="FILE", help="The conversation; - for standard input.")
    grader: str = option("content", "--grader NAME", "Grader, as `edge-rt plugins` names it.")
    weights: str | None = option(None, "--weights FILE", "Weights for the grader instead of its own.")
    json: bool = option(False, "--json", "Write one JSON object a segment.")

    def run(self) -> int:
        if self.action != "explain":
            raise OptionError(f"edge-rt context has no action {self.action!r}; write edge-rt context explain FILE")
        messages, tools = parse(read_text(self.file, "the conversation"))
        grade = Registry.load().grader(self.grader).start(None if self.weights is None else Path(self.weights))
        parts = segments(messages, tools)
        for segment, protected in zip(parts, protections(parts), strict=True):
            if self.json:
                write_json(_record(segment, grade(segment), protected))
            else:
                write(_text(segment, grade(segment), protected))
        return 0


def parse(text: str) -> tuple[list[Message], list[Mapping[str, Any]]]:
    """Messages and tool schemas from JSON, JSON lines or plain text. Raises OptionError for a request without a list of messages."""
    value = _json(text)
    if value is None:
        return [{"role": "user", "content": text}], []
    if isinstance(value, list):
        value = {"messages": value}
    elif "role" in value:  # one message, as the only line of JSON lines
        value = {"messages": [value]}
    messages, tools = value.get("messages"), value.get("tools") or []
    if not isinstance(messages, list) or not isinstance(tools, list):
        raise OptionError('the conversation is JSON but no messages; give a list such as [{"role": "user", "content": "Hello"}]')
    return messages, tools


def _json(text: str) -> dict[str, Any] | list[Any] | None:
    """The list or object that a text is, or the list of the objects on its lines; None for other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            return None
        if not all(isinstance(line, dict) for line in value):
            return None
    return value if value and isinstance(value, (dict, list)) else None


def _record(segment: Segment, grade: Grade, protected: tuple[Protection, ...]) -> dict[str, Any]:
    features = [{**part._asdict(), "value": round(part.value, 2), "points": round(part.points, 4)} for part in grade.contributions]
    return {**segment._asdict(), "score": round(grade.score, 4), "features": features, "protected": list(protected)}


def _text(segment: Segment, grade: Grade, protected: tuple[Protection, ...]) -> str:
    """Three lines: the score and the place of a segment, its beginning, and the features that make the score."""
    where = "tool schema" if segment.kind == "schema" else f"message {segment.message}, {segment.role}"
    head = f"{grade.score:.2f}  {where}, {segment.kind}, characters {segment.start} to {segment.end}"
    head += f"; protected: {', '.join(protected)}" if protected else ""
    beginning = repr(segment.text[:_SHOWN]) + (" ..." if len(segment.text) > _SHOWN else "")  # repr escapes what a terminal would obey
    why = ", ".join(f"{part.feature} {part.value:g} ({part.points:+.2f})" for part in grade.contributions)
    return f"{head}\n      {beginning}\n      {why or 'nothing that the grader counts'}\n"
