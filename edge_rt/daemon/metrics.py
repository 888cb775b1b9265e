"""Counters and histograms of the daemon, and their text for Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edge_rt import __version__

if TYPE_CHECKING:
    from collections import Counter

    from edge_rt.daemon.connection import EventStream

FIRST = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)  # upper ends of buckets, in seconds
RATE_SECONDS = 60  # whole seconds that ``TokenRate`` remembers
TOKENS = ("prompt_tokens", "completion_tokens")
CONTEXT = ("evicted_segments", "evicted_tokens", "recalled_segments", "recalled_tokens", "pruned_cells", "released_bytes")
"""What is counted of the end of every generation: of its usage, and of what became of its context."""


def count_finished(counts: Mapping[str, Counter[str]], done: Mapping[str, Any]) -> None:
    counts["tokens"].update({kind: done["usage"][kind] for kind in TOKENS})
    counts["context"].update({kind: done["context"][kind] for kind in CONTEXT})


class Histogram:
    """Counts by bucket. ``counts`` has one more than ``ends``: what is above all of them."""

    def __init__(self, ends: tuple[float, ...]) -> None:
        self.ends, self.counts, self.sum = ends, [0] * (len(ends) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, as often as it occurred."""
        self.counts[bisect_left(self.ends, value)] += times
        self.sum += value * times


class TokenRate:
    """Tokens by second: a ring, in which a second's place is its number modulo the places. Times are in seconds and rise."""

    def __init__(self) -> None:
        self._counts, self._second = [0] * (RATE_SECONDS + 1), 0

    def add(self, count: int, now: float) -> None:
        self._turn(now)
        self._counts[self._second % len(self._counts)] += count

    def by_second(self, now: float) -> list[int]:
        """Of the last ``SHOWN`` whole seconds, the oldest first."""
        self._turn(now)
        return [self._counts[second % len(self._counts)] for second in range(self._second - RATE_SECONDS, self._second)]

    def rate(self, now: float) -> float:
        """Tokens a second: of this second so far and the two before it."""
        recent = [*self.by_second(now)[-2:], self._counts[self._second % len(self._counts)]]
        return sum(recent) / (2 + now % 1)

    def _turn(self, now: float) -> None:
        """Empty the places of seconds that have begun since."""
        second = int(now)
        for later in range(max(self._second, second - RATE_SECONDS - 1) + 1, second + 1):
            self._counts[later % len(self._counts)] = 0
        self._second = max(self._second, second)


class Metrics:
    """Of all generations. Times are those at which the daemon heard of tokens, so a client that reads slowly lengthens its own."""

    def __init__(self) -> None:
        self.first_token, self.between_tokens = Histogram(FIRST), Histogram(BETWEEN)
        self.recent = TokenRate()

    def count_tokens(self, stream: EventStream, count: int, now: float) -> None:
        if not count:
            return
        self.recent.add(count, now)
        passed, stream.last_token = now - stream.last_token, now
        if not stream.begun:
            stream.begun, count, first = True, count - 1, passed
            self.first_token.observe(first)
            passed = 0.0
        if count:
            self.between_tokens.observe(passed / count, count)


PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

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

_MODEL_GAUGES = {
    "memory_held_bytes": "Bytes of caches and steps",
    "memory_reserved_bytes": "Bytes that caches and steps may come to hold for the sessions and requests that there are",
    "memory_allowance_bytes": "Bytes that caches and steps may hold",
    "memory_anonymous_bytes": "Bytes of the process with the model that no file stands behind, swapped ones included",
    "queued": "Requests that wait for memory",
    "parked": "Sessions whose cells are in files",
}
"""Gauges of each model."""


def prometheus_text(
    status: Mapping[str, Any], counts: Mapping[str, Any], metrics: Metrics, memory: Mapping[str, Mapping[str, Any]], *, ready: bool
) -> str:
    """All of them. ``memory``: bytes by owner, of each model whose worker has said."""
    return "\n".join(_prometheus_lines(status, counts, metrics, memory, ready)) + "\n"


def _prometheus_lines(
    status: Mapping[str, Any], counts: Mapping[str, Any], metrics: Metrics, memory: Mapping[str, Mapping[str, Any]], ready: bool
) -> Iterator[str]:
    yield from _prometheus_head("edge_rt_info", "gauge", "Version of the daemon")
    yield f'edge_rt_info{{version="{__version__}"}} 1'
    for name, label, help_text in _COUNTERS:
        yield from _prometheus_head(f"edge_rt_{name}_total", "counter", help_text)
        for kind, count in sorted(counts.get(name, {}).items()):
            yield f'edge_rt_{name}_total{{{label}="{kind}"}} {count}'
    yield from _prometheus_head("edge_rt_http_requests_total", "counter", "Requests over HTTP by path and status")
    for kind, count in sorted(counts.get("http", {}).items()):
        path, _, code = kind.rpartition(" ")
        yield f'edge_rt_http_requests_total{{path="{path}",status="{code}"}} {count}'
    yield from _prometheus_head("edge_rt_connections_total", "counter", "Clients that came")
    yield f"edge_rt_connections_total {counts['connections'].get('all', 0)}"
    yield from _prometheus_head("edge_rt_worker_deaths_total", "counter", "Times that the process with the model died")
    yield f"edge_rt_worker_deaths_total {counts['worker_deaths']}"
    yield from _prometheus_histogram("edge_rt_first_token_seconds", "From a request to the first token of its answer", metrics.first_token)
    yield from _prometheus_histogram("edge_rt_between_tokens_seconds", "Between two tokens of an answer", metrics.between_tokens)
    for field, name, help_text in _GAUGES:
        yield from _prometheus_head(f"edge_rt_{name}", "gauge", help_text)
        yield f"edge_rt_{name} {status['server'][field]}"
    yield from _prometheus_head("edge_rt_ready", "gauge", "1 if the default model answers, or comes into memory with its next request")
    yield f"edge_rt_ready {int(ready)}"
    yield from _prometheus_head("edge_rt_memory_budget_bytes", "gauge", "Bytes that all models may have")
    yield f"edge_rt_memory_budget_bytes {status['server']['memory']}"
    yield from _prometheus_head("edge_rt_evictions_total", "counter", "Models that left memory for others")
    yield f"edge_rt_evictions_total {counts['evictions']}"
    yield from _prometheus_head("edge_rt_model_ready", "gauge", "1 if the model is open")
    for one in status["models"]:
        yield f'edge_rt_model_ready{{model="{one["name"]}"}} {int(one["worker"]["state"] == "ready")}'
    yield from _prometheus_head("edge_rt_memory_bytes", "gauge", "Bytes of the process with the model, by owner")
    for name, owners in memory.items():
        for owner in ("weights_mapped", "weights_resident", "cache", "compute", "device"):
            if owners.get(owner) is not None:
                yield f'edge_rt_memory_bytes{{model="{name}",owner="{owner}"}} {owners[owner]}'
    for field, help_text in _MODEL_GAUGES.items():
        yield from _prometheus_head(f"edge_rt_{field}", "gauge", help_text)
        for name, facts in memory.items():
            if (value := facts.get(field.removeprefix("memory_").removesuffix("_bytes"))) is not None:
                yield f'edge_rt_{field}{{model="{name}"}} {value}'


def _prometheus_head(name: str, kind: str, help_text: str) -> tuple[str, str]:
    return f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"


def _prometheus_histogram(name: str, help_text: str, found: Histogram) -> Iterator[str]:
    yield from _prometheus_head(name, "histogram", help_text)
    below = 0
    for end, count in zip((*map(str, found.ends), "+Inf"), found.counts, strict=True):
        below += count
        yield f'{name}_bucket{{le="{end}"}} {below}'
    yield f"{name}_sum {found.sum:.6f}"
    yield f"{name}_count {below}"
