"""Three sessions decode, a fourth brings a long prompt: how long do the three wait for their tokens meanwhile?"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from bench import models
from bench.results import Result, Settings
from bench.serve.chats import prompt, talk
from bench.serve.served import quantile
from bench.serve.servers import PEER, Serving, line_up

MOST = 4.0
"""Times their median that 99 of 100 waits of ours may take."""
_WORDS, _TOKENS, _BEFORE, _ROUNDS = 1950, 512, 40, 5


class Waits(NamedTuple):
    """Milliseconds between the tokens of the three: before the fourth asked, and until it had its first token. ``first``: its own wait."""

    before: list[float]
    during: list[float]
    first: float
    prompt_tokens: int


def run(settings: Settings) -> list[Result]:
    """Rounds by turns; what counts is the 99th percentile while the prompt is read, over the median before it."""
    waits: dict[str, list[Waits]] = {}
    texts = itertools.count(1)
    with line_up(models.smollm2(settings, "Q4_1"), settings) as line:
        for number in range(settings.pick(_ROUNDS, 1)):
            if number >= 2 and time.monotonic() > settings.deadline:
                break
            order = list(line.servers) if number % 2 == 0 else list(line.servers)[::-1]
            for name in order:
                waits.setdefault(name, []).append(_measure(line.servers[name], next(texts), settings))
    return [_result(name, waits[name], line.notes if index == 0 else []) for index, name in enumerate(line.servers)]


def _measure(server: Serving, seed: int, settings: Settings) -> Waits:
    """The three go on until the fourth has its token: they are asked for more than they can get until then."""
    tokens = settings.pick(_TOKENS, 96)
    three = [server.ask(prompt(48, 1000 * seed + number), tokens) for number in range(3)]
    fourth = server.ask(prompt(settings.pick(_WORDS, 200), 1000 * seed + 9), 1)
    talk(three, late=fourth, after=_BEFORE)
    if not fourth.times:
        raise RuntimeError("the long prompt was answered with no text")
    before, during = [], []
    for chat in three:
        for earlier, later in itertools.pairwise(chat.times):
            if later < fourth.sent:
                before.append(1e3 * (later - earlier))
            elif earlier < fourth.times[0]:
                during.append(1e3 * (later - earlier))
    return Waits(before, during, fourth.times[0] - fourth.sent, fourth.prompt_tokens)


def _result(name: str, rounds: Sequence[Waits], notes: Sequence[str]) -> Result:
    """The median over the rounds of every figure."""
    ratios = [quantile(one.during, 0.99) / statistics.median(one.before) for one in rounds]
    figures = [statistics.median(statistics.median(one.before) for one in rounds)]
    figures += [statistics.median(quantile(one.during, share) for one in rounds) for share in (0.5, 0.99, 1.0)]
    first, ratio = statistics.median(one.first for one in rounds), statistics.median(ratios)
    shown = "median {:.1f} ms, while the prompt is read {:.1f}, 99 % within {:.1f}, longest {:.1f}".format(*figures)
    return Result(
        name=f"waits of three sessions beside a prompt of {rounds[0].prompt_tokens:,} tokens, {name}",
        requirement=f"99 % within {MOST:g} × the median" if name != PEER else "",
        unit="times the median",
        ours=ratios,
        ok=ratio <= MOST if name != PEER else None,
        shown=f"{ratio:.1f} × the median ({shown}); the fourth's first token after {first:.2f} s",
        notes=list(notes),
    )
