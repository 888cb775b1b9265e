"""What somebody says of an answer: checked, then written by whoever records traffic, redacted as all that is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edge_rt.errors import EdgeError, ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.channel import Channel
    from edge_rt.daemon.protocol import Request

RATINGS = (-1, 0, 1)
_FAILED = {
    "dropped_queue": ("limit", "there is no room for more that is to be recorded; send the feedback again a little later"),
    "dropped_redaction": ("failed", "the feedback could not be redacted, and is not recorded as it is; the daemon's log says more"),
    "dropped_form": ("failed", "the feedback has numbers that JSON has not; leave them out"),
    "dropped_disk": ("failed", "the file of recorded traffic cannot be written; the daemon's status says why"),
}
"""The code and the sentence for what may become of it (``RESULTS`` of traffic/writer.py); at the daemon's end nobody is told any more."""


def give(connection: Channel, request: Request, size: int) -> None:
    """Have feedback written; the request is answered when it is. Raises ProtocolError."""
    number, server = request.id, connection.server
    assert number is not None, "only ack has none"
    if server.recorder is None:
        raise ProtocolError("not_recording", "the daemon records nothing, so feedback has no place; start it with --record FILE")
    fields = _checked(request.fields)
    of_model = "model" in fields or server.models.default is not None
    template = server.models.find(fields.get("model")).template if of_model else ""
    loop = asyncio.get_running_loop()

    def written(result: str) -> None:
        connection.done(number)
        if result == "recorded":
            connection.answer(number, {})
        else:
            connection.refuse(number, ProtocolError(*_FAILED[result]))

    connection.begin(number, size)
    server.recorder.feedback(connection, fields, size, template, lambda result: loop.call_soon_threadsafe(written, result))


def _checked(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same, its messages as chat templates have them. Raises ProtocolError."""
    from edge_rt.daemon.http.request import messages_of

    if ("prompt" in fields) == ("messages" in fields):
        raise ProtocolError("bad_request", "feedback is of an answer to a prompt or to messages; give one of them")
    if not fields.keys() & {"rating", "correction", "comment"}:
        raise ProtocolError("bad_request", "feedback says something of the answer; give a rating, a correction or a comment")
    if fields.get("rating", 0) not in RATINGS:
        raise ProtocolError("option", f"the rating is {fields['rating']}; give -1, 0 or 1")
    if not fields.get("prompt", fields.get("messages")):
        raise ProtocolError("option", "what was answered is empty; give the prompt or the messages")
    if "messages" not in fields:
        return fields
    try:
        return {**fields, "messages": messages_of(fields["messages"])}
    except EdgeError as error:
        raise ProtocolError("bad_request", str(error)) from error
