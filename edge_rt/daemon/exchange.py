"""Models that come and go as clients ask: one exchange at a time, and each is answered, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from edge_rt.daemon.models import name_of
from edge_rt.errors import EdgeError, ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.channel import Channel
    from edge_rt.daemon.frames import Message
    from edge_rt.daemon.hosted import Hosted
    from edge_rt.daemon.models import Models
    from edge_rt.daemon.protocol import Request
    from edge_rt.daemon.supervisor import Spec
    from edge_rt.daemon.tasks import Tasks


class Exchange:
    """``spec`` says what a worker is to open for a model that a client names."""

    def __init__(self, models: Models, spec: Callable[[str, dict[str, Any]], Spec], tasks: Tasks) -> None:
        self._models, self._spec, self._tasks = models, spec, tasks
        self._task: asyncio.Task[None] | None = None

    def load(self, connection: Channel, request: Request, model: str, options: dict[str, Any]) -> None:
        """Load a model, which is the default from now on; answered when it is started. Raises ProtocolError, ModelFileError."""
        spec = self._spec(model, options)
        before = self._models.named(name_of(model, spec))

        async def work() -> Message:
            if before is not None:
                await self._models.unload(before)
            self._models.load(self._models.know_default(model, spec))
            return {"model": spec.model}

        self._begin(connection, request, before, work)

    def unload(self, connection: Channel, request: Request, hosted: Hosted) -> None:
        """End a model's worker, and forget the model. Raises ProtocolError."""

        async def work() -> Message:
            await self._models.unload(hosted)
            self._models.forget(hosted)
            return {}

        self._begin(connection, request, hosted, work)

    def _begin(self, connection: Channel, request: Request, hosted: Hosted | None, work: Callable[[], Awaitable[Message]]) -> None:
        """Raises ProtocolError while a model's worker may not go, or another just does."""
        if (hosted is not None and not hosted.idle) or (self._task is not None and not self._task.done()):
            raise ProtocolError("busy", "requests are under way; wait for them, or cancel them")

        async def answered() -> None:
            try:
                found = await work()
            except Exception as error:
                if not isinstance(error, EdgeError):
                    logging.getLogger("edge_rt.daemon").error("%s failed", request.op, exc_info=error)
                connection.refuse(request.id, error)
            else:
                connection.answer(request.id, found)

        self._task = self._tasks.spawn(answered())
