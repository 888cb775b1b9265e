"""The daemon's numbers in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edge_rt import __version__

if TYPE_CHECKING:
    from edge_rt.daemon.measures import Histogram
    from edge_rt.daemon.server import Server

TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COUNTERS = (
    ("requests", "op", "Requests by operation of the protocol, those over HTTP too"),
    ("errors", "code", "Errors by the protocol's code"),
    ("tokens", "kind", "Tokens of prompts and of answers"),
    ("context", "kind", "What left the context of requests and came back to it"),
    ("recording", "result", "Requests recorded, left out by sampling, and dropped, by why"),
)
_GAUGES = (
    ("connections", "connections_open", "Clients that are connected"),
    ("sessions", "sessions_open", "Sessions that are open"),
    ("requests", "requests_under_way", "Requests that the worker has not answered yet"),
    ("held_bytes", "held_bytes", "Bytes of requests that were not answered yet"),
    ("uptime", "uptime_seconds", "Seconds since the daemon's start"),
)

_WORKERS = {
    "memory_held_bytes": "Bytes of caches and steps",
    "memory_reserved_bytes": "Bytes that caches and steps may come to hold for the sessions and requests that there are",
    "memory_allowance_bytes": "Bytes that caches and steps may hold",
    "memory_anonymous_bytes": "Bytes of the process with the model that no file stands behind, swapped ones included",
    "queued": "Requests that wait for memory",
    "parked": "Sessions whose cells are in files",
}
"""Gauges of each model."""


def text(server: Server, memory: Mapping[str, Mapping[str, Any]]) -> str:
    """All of them. ``memory``: bytes by owner, of each model whose worker has said."""
    return "\n".join(_lines(server, memory)) + "\n"


def _lines(server: Server, memory: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    status, counts = server.status(), server.counts
    yield from _head("edge_rt_info", "gauge", "Version of the daemon")
    yield f'edge_rt_info{{version="{__version__}"}} 1'
    for name, label, help_text in _COUNTERS:
        yield from _head(f"edge_rt_{name}_total", "counter", help_text)
        for kind, count in sorted(counts.get(name, {}).items()):
            yield f'edge_rt_{name}_total{{{label}="{kind}"}} {count}'
    yield from _head("edge_rt_http_requests_total", "counter", "Requests over HTTP by path and status")
    for kind, count in sorted(counts.get("http", {}).items()):
        path, _, code = kind.rpartition(" ")
        yield f'edge_rt_http_requests_total{{path="{path}",status="{code}"}} {count}'
    yield from _head("edge_rt_connections_total", "counter", "Clients that came")
    yield f"edge_rt_connections_total {counts['connections']['all']}"
    yield from _head("edge_rt_worker_deaths_total", "counter", "Times that the process with the model died")
    yield f"edge_rt_worker_deaths_total {server.models.deaths}"
    yield from _histogram("edge_rt_first_token_seconds", "From a request to the first token of its answer", server.measures.first_token)
    yield from _histogram("edge_rt_between_tokens_seconds", "Between two tokens of an answer", server.measures.between_tokens)
    for field, name, help_text in _GAUGES:
        yield from _head(f"edge_rt_{name}", "gauge", help_text)
        yield f"edge_rt_{name} {status['server'][field]}"
    yield from _head("edge_rt_ready", "gauge", "1 if the default model answers, or comes into memory with its next request")
    yield f"edge_rt_ready {int(server.health() in ('ready', 'asleep'))}"
    yield from _head("edge_rt_memory_budget_bytes", "gauge", "Bytes that all models may have")
    yield f"edge_rt_memory_budget_bytes {status['server']['memory']}"
    yield from _head("edge_rt_evictions_total", "counter", "Models that left memory for others")
    yield f"edge_rt_evictions_total {server.models.evictions}"
    yield from _head("edge_rt_model_ready", "gauge", "1 if the model is open")
    for one in status["models"]:
        yield f'edge_rt_model_ready{{model="{one["name"]}"}} {int(one["worker"]["state"] == "ready")}'
    yield from _head("edge_rt_memory_bytes", "gauge", "Bytes of the process with the model, by owner")
    for name, owners in memory.items():
        for owner in ("weights_mapped", "weights_resident", "cache", "compute", "device"):
            if owners.get(owner) is not None:
                yield f'edge_rt_memory_bytes{{model="{name}",owner="{owner}"}} {owners[owner]}'
    for field, help_text in _WORKERS.items():
        yield from _head(f"edge_rt_{field}", "gauge", help_text)
        for name, facts in memory.items():
            if (value := facts.get(field.removeprefix("memory_").removesuffix("_bytes"))) is not None:
                yield f'edge_rt_{field}{{model="{name}"}} {value}'


def _head(name: str, kind: str, help_text: str) -> tuple[str, str]:
    return f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"


def _histogram(name: str, help_text: str, found: Histogram) -> Iterator[str]:
    yield from _head(name, "histogram", help_text)
    below = 0
    for end, count in zip((*map(str, found.ends), "+Inf"), found.counts, strict=True):
        below += count
        yield f'{name}_bucket{{le="{end}"}} {below}'
    yield f"{name}_sum {found.sum:.6f}"
    yield f"{name}_count {below}"
