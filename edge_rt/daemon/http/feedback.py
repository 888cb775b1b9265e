"""What an answer was worth, over HTTP: ``/edge-rt/feedback``, the protocol's ``feedback``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edge_rt.daemon import protocol
from edge_rt.daemon.http import body
from edge_rt.daemon.http.models import bare, named
from edge_rt.daemon.http.request import checked

if TYPE_CHECKING:
    from edge_rt.daemon.http.routes import Exchange

FIELDS: Mapping[str, str] = protocol.OPS["feedback"]


def give(exchange: Exchange) -> None:
    """Answer when it is recorded. Raises ApiError, ProtocolError."""
    fields, _ = checked(body.parse(exchange.body), FIELDS, ())
    if "model" in fields:
        fields["model"] = bare(named(exchange.server, fields["model"]), "feedback is of").name
    exchange.heard = lambda message: exchange.connection.respond_json({"object": "edge_rt.feedback"})
    exchange.connection.run("feedback", fields, len(exchange.body))
