"""Feedback that is sent to a daemon: what an answer was worth, and what it should have been."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2

from edge_rt.hooks import DataError, UserError
from edge_rt_distill.addresses import read_address, read_key

SECONDS = 60.0
"""For the daemon to write it."""
_FIELDS = ("messages", "prompt", "answer", "model", "rating", "correction", "comment")


def read_answer(text: str, where: str) -> dict[str, Any]:
    """A JSON object with ``messages`` or a ``prompt`` and the ``answer``, and further fields of feedback if they are not given otherwise.
    Raises DataError.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{where} is not JSON ({error}); give {{"messages": [...], "answer": "..."}}') from error
    if not isinstance(found, dict) or "answer" not in found or ("messages" in found) == ("prompt" in found):
        raise DataError(f'{where} has no answer to messages or to a prompt; give {{"messages": [...], "answer": "..."}}')
    if unknown := sorted(found.keys() - set(_FIELDS)):
        raise DataError(f"{where} has {unknown[0]!r}; feedback has {', '.join(_FIELDS)}")
    return found


def give(address: str, key_file: Path | None, feedback: Mapping[str, Any]) -> None:
    """Send feedback to the daemon at a URL, or ``unix:PATH``. Raises OptionError, and UserError if it is refused, in the daemon's words."""
    base, socket, here = read_address(address)
    headers = {"Authorization": f"Bearer {read_key(key_file)}"} if key_file is not None else {}
    transport = httpx2.HTTPTransport(uds=socket) if socket is not None else None
    try:
        with httpx2.Client(base_url=base, headers=headers, transport=transport, timeout=SECONDS, trust_env=not here) as client:
            reply = client.post("/edge-rt/feedback", json=dict(feedback))
            found = reply.json()
    except (httpx2.HTTPError, ValueError) as error:
        raise UserError(f"{address} did not answer with JSON ({error}); is a daemon of edge-rt there, with --http?") from error
    if reply.status_code != 200:
        told = found.get("error", found) if isinstance(found, dict) else found
        raise UserError(f"{address} answered {reply.status_code}: {told.get('message', told) if isinstance(told, dict) else told}")
