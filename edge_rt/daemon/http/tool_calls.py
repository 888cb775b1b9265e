"""Calls of functions in what a model writes: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Hermes and Qwen have it.

Only what is such a call of a function that was offered is taken out of the text; all else stays text, as the model wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NamedTuple

BEGIN, END = "<tool_call>", "</tool_call>"


class Call(NamedTuple):
    """A call. ``arguments``: JSON, as OpenAI's API has it."""

    name: str
    arguments: str


class ToolCalls:
    """One answer: text in as it comes, text and calls out. Of text, only what may belong to a call is held back."""

    def __init__(self, names: Collection[str]) -> None:
        """``names``: of the functions that were offered; if there are none, all is text."""
        self._names = names
        self._held = ""
        self.found = 0
        """Calls so far."""

    def feed(self, text: str) -> list[str | Call]:
        """Take text; what is certain now, in order."""
        if not self._names:
            return [text] if text else []
        self._held += text
        out: list[str | Call] = []
        while self._held:
            start = self._held.find(BEGIN)
            if start < 0:
                certain = _certain(self._held)
                out += [self._held[:certain]] if certain else []
                self._held = self._held[certain:]
                break
            before = len(self._held[:start].rstrip())
            if before:
                out.append(self._held[:before])
                self._held, start = self._held[before:], start - before
            end = self._held.find(END, start)
            if end < 0:
                break
            whole, self._held = self._held[: end + len(END)], self._held[end + len(END) :]
            call = self._call(whole[start + len(BEGIN) : end])
            self.found += call is not None
            out.append(call or whole)
        return out

    def flush(self) -> list[str | Call]:
        """What is left at the end. Blanks after a call are none of the answer."""
        held, self._held = self._held, ""
        return [] if not held or (self.found and not held.strip()) else [held]

    def _call(self, text: str) -> Call | None:
        try:
            found: Any = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not isinstance(found.get("arguments"), dict):
            return None
        name = found.get("name")
        if not isinstance(name, str) or name not in self._names:
            return None
        return Call(name, json.dumps(found["arguments"], ensure_ascii=False))


def _certain(text: str) -> int:
    """How much of a text without a whole ``BEGIN`` cannot belong to one or to the blanks before it."""
    for n in range(min(len(BEGIN) - 1, len(text)), 0, -1):
        if text.endswith(BEGIN[:n]):
            return len(text[:-n].rstrip())
    return len(text.rstrip())
