"""Perplexity of real text that goes on after a long context, of which half is kept."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence

import edge_rt
from bench import models
from bench.context.methods import LOSSES
from bench.context.prompt import Prompt
from bench.context.reader import Reader
from bench.context.retrieval import CONTEXT, MODEL
from bench.context.score import Groups, difference
from bench.context.text import run_of_prose
from bench.results import Result, Settings
from edge_rt.core.context.history import segments

BEFORE, AFTER = 2048, 256
"""Tokens of context, and tokens after it whose perplexity is measured."""
SHARE = 0.5


def run(settings: Settings) -> list[Result]:
    """``settings.items`` texts: every method's perplexity, and how much above that of the whole context it is."""
    found: dict[str, dict[Hashable, list[float]]] = {name: {} for name in LOSSES}
    with edge_rt.open(models.smollm2(settings, MODEL), context=CONTEXT) as model, Reader(model) as reader:
        for prompt in texts(reader, range(settings.items or settings.pick(20, 2)), settings.pick(BEFORE, 512)):
            if len(found["full"]) >= 2 and time.monotonic() > settings.deadline:
                break
            for name, losses in LOSSES.items():
                found[name][prompt.seed] = losses(reader, prompt, int(SHARE * len(prompt.context)))
    return [_compared(name, found) for name in LOSSES if name != "full"]


def texts(reader: Reader, seeds: Sequence[int], before: int) -> Iterator[Prompt]:
    """Prose from a random place for each seed: about ``before`` tokens in paragraphs, then exactly ``AFTER``."""
    for seed in seeds:
        prose = run_of_prose(random.Random(f"perplexity {seed}"))
        paragraphs: list[str] = []
        while reader.count("\n\n".join(paragraphs)) < before:
            paragraphs.append(next(prose))
        after: list[int] = []
        while len(after) < AFTER:
            after += reader.tokens(f"{next(prose)}\n\n")
        found = segments([{"role": "user", "content": "\n\n".join(paragraphs) + "\n\n"}])
        yield Prompt([], found, [reader.tokens(segment.text) for segment in found], after[:AFTER], 0, seed)


def _compared(name: str, found: Mapping[str, Groups]) -> Result:
    """A method's perplexity, the geometric mean over the tokens, against the whole context's."""
    perplexities = [math.exp(sum(losses) / len(losses)) for losses in found[name].values()]
    whole = [math.exp(sum(losses) / len(losses)) for losses in found["full"].values()]
    mean, low, high, items, _ = difference(found[name], found["full"])
    shown = f"{math.expm1(mean):+.1%} [{math.expm1(low):+.1%}, {math.expm1(high):+.1%}] above the whole context"
    notes = [f"{items} tokens of {len(whole)} texts"]
    return Result(f"perplexity, {name}, {SHARE:.0%} kept", "", "perplexity", perplexities, {"full": whole}, shown=shown, notes=notes)
