"""Which model a request over HTTP is for."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from edge_rt.daemon.http.errors import TRY_AGAIN, ApiError, wrong
from edge_rt.errors import ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.hosted import Hosted
    from edge_rt.daemon.server import Server


def called(hosted: Hosted, adapter: str | None) -> str:
    """The name of a model, or of a model with an adapter, which clients see as one more model."""
    return hosted.name if adapter is None else f"{hosted.name}:{adapter}"


def named(server: Server, name: str | None) -> tuple[Hosted, str | None]:
    """The model that a request names, or the default, and the adapter in ``NAME:ADAPTER``. Raises ApiError, ProtocolError: no_model."""
    try:
        return server.models.find(name), None
    except ProtocolError as error:
        if name is None or not server.models.names:
            raise
        model, _, adapter = name.rpartition(":")
        with suppress(ProtocolError):
            if model and adapter in (found := server.models.find(model)).adapters:
                return found, adapter
        message = f"there is no model {name!r:.80} here; name one of {server.models.names}"
        raise ApiError(404, message, "model_not_found", param="model") from error


def answering(server: Server, name: str | None) -> tuple[Hosted, str | None]:
    """The same, if it can answer soon. Raises ApiError while it is being opened and nobody waits for it yet."""
    hosted, adapter = named(server, name)
    worker = hosted.supervisor.status()
    if worker["state"] in ("starting", "waiting") and hosted.idle and not server.draining:
        share = f" {100 * worker['done'] // worker['total']} %" if worker.get("total") else ""
        message = f"the model is being opened ({worker.get('phase', worker['state'])}{share}); ask again a little later"
        raise ApiError(503, message, "model_loading", headers=TRY_AGAIN)
    return hosted, adapter


def bare(found: tuple[Hosted, str | None], what: str) -> Hosted:
    """A model for ``what`` there is only without an adapter. Raises ApiError if one was named."""
    hosted, adapter = found
    if adapter is not None:
        raise wrong("model", f"{what} a model without an adapter; name {hosted.name}")
    return hosted
