"""Traces for who has no traffic yet: who asks what at which times, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, islice
from typing import NamedTuple

from edge_rt.hooks import OptionError
from edge_rt_distill.replay.contents import LANGUAGES, Ask, attacks, conversation, deck, long_prompt, questions
from edge_rt_distill.replay.trace import PATHS, Request, Trace


class Wanted(NamedTuple):
    """``rate``: the mean of requests a second. ``longest``: of long prompts, in thousands of tokens."""

    requests: int = 200
    rate: float = 1.0
    seed: int = 0
    language: str = "both"
    longest: float = 4.0


class Generator(NamedTuple):
    """``make``: requests, perhaps more than are wanted, in the order of their times."""

    make: Callable[[Wanted, random.Random], Iterator[Request]]
    what: str


def make(kind: str, wanted: Wanted) -> Trace:
    """A trace of a kind in GENERATORS; the same wishes give the same trace. Raises OptionError."""
    if kind not in GENERATORS:
        raise OptionError(f"no traffic is named {kind!r}; choose {', '.join(GENERATORS)}")
    if wanted.language not in LANGUAGES:
        raise OptionError(f"no language is named {wanted.language!r}; choose {', '.join(LANGUAGES)}")
    if wanted.requests < 1 or not 0 < wanted.rate < 1e6 or not 0.25 <= wanted.longest <= 1024:
        raise OptionError("a trace has a request or more, a rate above 0, and long prompts of 0.25 to 1024 thousand tokens")
    drawn = GENERATORS[kind].make(wanted, random.Random(f"{kind} {wanted.seed}"))
    requests = [one._replace(at=round(one.at, 4)) for one in islice(drawn, wanted.requests)]
    return Trace(tuple(requests), {"by": "edge-rt replay make", "kind": kind, **wanted._asdict()})


# ---- times ---------------------------------------------------------------------------------------------------------------------------


def poisson(rate: float, dice: random.Random) -> Iterator[float]:
    """Moments of clients who know nothing of each other."""
    at = 0.0
    while True:
        at += dice.expovariate(rate)
        yield at


BURST, SHARE, LENGTH = 3.0, 0.2, 10.0
"""In a burst so many times the mean rate; the share of time in bursts; their mean length, in mean times between requests."""


def bursts(rate: float, dice: random.Random) -> Iterator[float]:
    """Quiet times and bursts, each of a random length: a Poisson process whose rate a Markov chain of two states changes (MMPP, Heffes
    and Lucantoni 1986). The mean rate is ``rate``."""
    rates = (rate * (1 - SHARE * BURST) / (1 - SHARE), rate * BURST)
    lengths = (LENGTH / rate * (1 - SHARE) / SHARE, LENGTH / rate)
    at, state = 0.0, int(dice.random() < SHARE)
    while True:
        ends = at + dice.expovariate(1 / lengths[state])
        while (at := at + dice.expovariate(rates[state])) < ends:
            yield at
        at, state = ends, 1 - state  # what was drawn beyond the end counts for nothing: the process has no memory


# ---- who asks what -------------------------------------------------------------------------------------------------------------------


def _request(kind: str, at: float, ask: Ask, session: str | None = None) -> Request:
    body = {"messages": [dict(one) for one in ask.messages], "max_tokens": ask.tokens, "temperature": 0}
    return Request(at, PATHS[0], body, session=session, checks=ask.checks, kind=kind)


def _single(
    kind: str, asks: Callable[[Sequence[str]], list[Ask]], times: Callable[[float, random.Random], Iterator[float]],
    wanted: Wanted, dice: random.Random,
) -> Iterator[Request]:  # fmt: skip
    """Requests that have nothing to do with each other: all of ``asks`` in a random order, again and again."""
    drawn = deck(asks(LANGUAGES[wanted.language]), dice)
    return (_request(kind, at, next(drawn)) for at in times(wanted.rate, dice))


def _long_context(wanted: Wanted, dice: random.Random) -> Iterator[Request]:
    sizes, size = [], 0.25
    while size < wanted.longest:
        sizes.append(int(size * 1024))
        size *= 2
    drawn = deck([*sizes, int(wanted.longest * 1024)], dice)
    for at in poisson(wanted.rate, dice):
        yield _request("long-context", at, long_prompt(dice.choice(LANGUAGES[wanted.language]), next(drawn), dice))


PAUSE = 4.0
"""Seconds between two turns, in the mean: a user reads and writes."""


def _multi_turn(wanted: Wanted, dice: random.Random) -> Iterator[Request]:
    """Conversations at random within the time that so many requests take, until there are enough requests."""
    found: list[Request] = []
    number, span = 0, wanted.requests / wanted.rate
    while len(found) < wanted.requests:
        number += 1
        asks = conversation(dice.choice(LANGUAGES[wanted.language]), dice)[: wanted.requests - len(found)]
        after = [0.0, *accumulate(dice.expovariate(1 / PAUSE) for _ in asks[1:])]
        begin = dice.uniform(0, max(0.0, span - after[-1]))
        found += [_request("multi-turn", begin + later, ask, f"s{number}") for later, ask in zip(after, asks, strict=True)]
    yield from sorted(found, key=lambda one: one.at)


MIX: Mapping[str, float] = {"steady": 0.25, "bursty": 0.25, "multi-turn": 0.25, "adversarial": 0.15, "long-context": 0.1}
"""What mixed traffic is made of, as shares of the requests."""


def _mixed(wanted: Wanted, dice: random.Random) -> Iterator[Request]:
    found: list[Request] = []
    for kind, share in MIX.items():
        count = round(wanted.requests * share) or 1
        part = wanted._replace(requests=count, rate=wanted.rate * share)
        found += islice(GENERATORS[kind].make(part, random.Random(dice.random())), count)
    found += islice(GENERATORS["steady"].make(wanted, dice), max(0, wanted.requests - len(found)))
    yield from sorted(found, key=lambda one: one.at)


GENERATORS: Mapping[str, Generator] = {
    "steady": Generator(partial(_single, "steady", questions, poisson), "questions at random, all the time as many (Poisson)"),
    "bursty": Generator(
        partial(_single, "bursty", questions, bursts),
        "questions in quiet times and bursts of three times the rate (Markov-modulated Poisson)",
    ),
    "long-context": Generator(_long_context, "prompts from 256 tokens to --longest with facts to find or to sum up"),
    "multi-turn": Generator(_multi_turn, "conversations of 3 to 8 turns with pauses, of which later ones refer to earlier ones"),
    "adversarial": Generator(
        partial(_single, "adversarial", attacks, poisson),
        "users who try to break format, language or rules, or to have the instructions told",
    ),
    "mixed": Generator(_mixed, "all of these at once"),
}
"""By name, which is the kind of each request."""
