"""Feedback that is sent to a daemon: what an answer was worth, and what it should have been."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from edge_rt.hooks import DataError
from edge_rt_distill.asking import Asking
from edge_rt_distill.data.json_lines import values

SECONDS = 60.0
"""For the daemon to write it."""
_FIELDS = ("messages", "prompt", "answer", "model", "rating", "correction", "comment")


def read_answers(text: str, where: str) -> list[dict[str, Any]]:
    """A JSON object, or one a line, each with ``messages`` or a ``prompt`` and the ``answer``, and further fields of feedback if they are
    not given otherwise. Raises DataError, for a line by its number.
    """
    try:
        return [_answer(json.loads(text), where)]
    except (ValueError, RecursionError) as error:
        if "\n" not in text.strip():
            raise DataError(f'{where} is not JSON ({error}); give {{"messages": [...], "answer": "..."}}') from error
    return [_answer(value, f"{where}, line {number}") for number, value in values(text, where)]


def _answer(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict) or "answer" not in found or ("messages" in found) == ("prompt" in found):
        raise DataError(f'{where} has no answer to messages or to a prompt; give {{"messages": [...], "answer": "..."}}')
    if unknown := sorted(found.keys() - set(_FIELDS)):
        raise DataError(f"{where} has {unknown[0]!r}; feedback has {', '.join(_FIELDS)}")
    return found


def give(address: str, key_file: Path | None, answers: Iterable[Mapping[str, Any]]) -> Iterator[None]:
    """Send feedback to the daemon at a URL, or ``unix:PATH``; something comes each time that one is recorded. Raises OptionError, and
    UserError if one is refused, in the daemon's words.
    """
    with closing(Asking(address, key_file, SECONDS)) as server:
        for one in answers:
            server.post("/edge-rt/feedback", one)
            yield
