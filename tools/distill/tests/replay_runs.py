"""Results of replays that never were: services whose every moment is said."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from edge_rt_distill.replay.results import Fault, Outcome, Reading, Results
from edge_rt_distill.replay.trace import PATHS, Request, Trace


def outcome(number: int, first: float = 0.5, gap: float = 0.05, tokens: int = 11, sent: float | None = None, **more: Any) -> Outcome:
    """A request that is sent ``number`` seconds after the begin (or ``sent``) and answered by pieces of one token."""
    begin = float(number) if sent is None else sent
    pieces = tuple(begin + first + gap * place for place in range(tokens))
    known = {"ended": pieces[-1] if pieces else begin + first, "status": "ok", "text": "yes", "prompt_tokens": 100 + number}
    return Outcome(number, **{"due": begin, "sent": begin, "pieces": pieces, "tokens": (1,) * tokens, **known, **more})


LOST: dict[str, Any] = {"first": 0.1, "tokens": 0, "status": "error", "code": "connection", "text": "", "prompt_tokens": None}
"""What of a request is otherwise whose connection was lost."""


def results(*outcomes: Outcome, **more: Any) -> Results:
    return Results(**{"target": "server", "load": "open x1", "trace": "abc", "outcomes": outcomes, **more})


def service(count: int = 80, seed: int = 0, each: Callable[[int], dict[str, Any]] = lambda number: {}, **more: Any) -> Results:
    """A service with some unrest. ``each``: what of a request is otherwise."""
    dice = random.Random(seed)
    usual = [{"first": dice.uniform(0.3, 0.7), "gap": dice.uniform(0.04, 0.06)} for _ in range(count)]
    return results(*(outcome(number, **{**one, **each(number)}) for number, one in enumerate(usual)), **more)


def trace(count: int = 80, each: Callable[[int], dict[str, Any]] = lambda number: {}) -> Trace:
    """The requests of a service, greedy. ``each``: what of a request is otherwise."""
    body = {"messages": [{"role": "user", "content": "Yes?"}], "temperature": 0}
    return Trace(tuple(Request(**{"at": float(number), "path": PATHS[0], "body": body, **each(number)}) for number in range(count)), {})


def readings(*memory: int | None, every: float = 1.0) -> tuple[Reading, ...]:
    return tuple(Reading(place * every, one) for place, one in enumerate(memory))


def scaled(found: Results, by: float) -> Results:
    """All moments ``by`` times as late."""
    moved = [
        one._replace(
            due=one.due * by, sent=one.sent * by, ended=one.ended * by, pieces=tuple(piece * by for piece in one.pieces),
            prompt_seconds=None if one.prompt_seconds is None else one.prompt_seconds * by,
        )
        for one in found.outcomes
    ]  # fmt: skip
    return found._replace(outcomes=tuple(moved), faults=tuple(Fault(one.at * by, one.what) for one in found.faults))
