"""Tokens a second that several clients get together: ours over its socket and over HTTP, llama.cpp's server over HTTP."""

from __future__ import annotations

import itertools
import statistics
from functools import partial

from bench import models
from bench.results import OURS, Bound, Result, Settings, compare
from bench.serve.servers import OVER_HTTP, PEER, LineUp, Serving, burst, line_up
from bench.timing import interleave

CLIENTS = {1: None, 2: None, 4: 1.1, 8: 1.1}
"""How many at once, and what the ratio to the peer must be."""
_TOKENS, _ROUNDS = 128, 5


def run(settings: Settings) -> list[Result]:
    """Chats of about 64 tokens of prompt, each round another text, and 128 tokens of answer whatever they say."""
    with line_up(models.smollm2(settings, "Q4_1"), settings) as line:
        return [result for clients, bound in CLIENTS.items() for result in _together(line, clients, bound, settings)]


def _together(line: LineUp, clients: int, bound: float | None, settings: Settings) -> list[Result]:
    """The two ways to ask ours, against the peer: two results of one measurement."""
    tokens, rounds = settings.pick(_TOKENS, 8), settings.pick(_ROUNDS, 1)
    texts = itertools.count(1000 * clients)  # nobody is asked the same twice
    cpu: dict[str, list[float]] = {name: [] for name in line.servers}

    def rate(name: str, server: Serving) -> float:
        before = server.cpu_seconds()
        seconds = burst(server, clients, tokens, seed=next(texts))
        cpu[name].append(1e3 * (server.cpu_seconds() - before) / (clients * tokens))
        return clients * tokens / seconds

    contenders = {name: partial(rate, name, server) for name, server in line.servers.items()}
    samples = interleave(contenders, rounds=rounds, most=settings.pick(2 * rounds, rounds), deadline=settings.deadline)
    used = ", ".join(f"{name} {statistics.median(values[1:] or values):.2f} ms" for name, values in cpu.items())
    title = f"{clients} client{'s' if clients > 1 else ''}"
    found = []
    for way in (OURS, OVER_HTTP):
        ours = {OURS: samples[way], **({PEER: samples[PEER]} if PEER in samples else {})}
        bounds = [Bound(PEER, "at least", bound)] if bound and PEER in samples else []
        notes = [*line.notes, f"CPU time a token: {used}"] if way == OURS else []
        name = f"serving {title}, over {'its own socket' if way == OURS else 'HTTP'}"
        found.append(compare(name, "tokens/s", ours, bounds, notes))
    return found
