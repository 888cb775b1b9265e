"""What the daemon says of itself at one path: status, counters, throughput, memory, and the sessions of who asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from edge_rt.daemon.measures import CONTEXT

if TYPE_CHECKING:
    from edge_rt.daemon.frames import Message
    from edge_rt.daemon.http.routes import Exchange

MEMORY_SECONDS = 0.5
"""How long an answer waits for the workers to say what they hold."""


def with_memory(exchange: Exchange, work: Callable[[dict[str, Message]], None]) -> None:
    """``work`` with the bytes of each model whose worker says so soon. Not at all if the client leaves before."""
    server = exchange.server

    async def go_on() -> None:
        memory = await server.models.memory(MEMORY_SECONDS)
        if waiting:
            work(memory)

    waiting = [exchange]
    exchange.left = waiting.clear
    server.tasks.spawn(go_on())


def status(exchange: Exchange) -> None:
    """Answer with all of it, as docs/http.md has it."""
    headers = (("Cache-Control", "no-store"),)
    with_memory(exchange, lambda memory: exchange.connection.respond_json(_status(exchange, memory), headers=headers))


def _status(exchange: Exchange, memory: Mapping[str, Message]) -> dict[str, Any]:
    server = exchange.server
    recent, now = server.measures.recent, server.now()
    counts = server.metrics()
    counts["context"] = {kind: counts["context"].get(kind, 0) for kind in CONTEXT}
    return {
        **server.status(),
        "counts": counts,
        "throughput": {"tokens_per_second": round(recent.rate(now), 2), "by_second": recent.by_second(now)},
        "memory": {model: {name: value for name, value in found.items() if name != "by_session"} for model, found in memory.items()},
        "sessions": {"open": len(server.sessions), "own": _own_sessions(exchange, memory)},
    }


def _own_sessions(exchange: Exchange, memory: Mapping[str, Message]) -> list[dict[str, Any]]:
    """The sessions of the user who asks, and nobody else's."""
    connection, server = exchange.connection, exchange.server
    assert connection.user is not None, "nobody else comes as far as this"
    names = {session: name for (user, _, name), session in connection.names.items() if user == connection.user}
    found = []
    for one in server.sessions.of(connection.user):
        said = memory.get(one.hosted.name, {}).get("by_session", {}).get(one.id, {})
        held = {name: said.get(name) for name in ("cells", "bytes", "parked")}
        found.append({"name": names.get(one.id), "model": one.hosted.name, "busy": one.busy, **held})
    return found
