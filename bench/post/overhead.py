"""What post-processing costs in the decode loop, and how long it holds text back."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import edge_rt
from bench import models
from bench.post.clean import clean
from bench.post.rules import ALL, REDACTION, TERMS, terms
from bench.post.texts import sample
from bench.results import OURS, Bound, Result, Settings, compare
from bench.timing import interleave, spread
from edge_rt.core.generate.output import Detokeniser
from edge_rt.model import Model
from edge_rt.postprocess.pipeline import Pipeline
from edge_rt.postprocess.rules import Ruleset
from edge_rt.types import Delta, Done

PROMPT = [{"role": "user", "content": "Write about the sea, first in English, then in Chinese. 先用英文，再用中文，写一写大海。"}]
MOST_SHARE, MOST_MICROSECONDS = 1.03, 20.0
_OFF = "no post-processing"
_TOKENS = (256, 16)
"""Tokens decoded; the second for a quick run."""
_BILINGUAL = "bilingual text with secrets"


def rules() -> dict[str, Mapping[str, Any]]:
    """All four post-processors, with 5,000 terms, in the order of the pipeline."""
    return {"punctuation": {}, "terminology": {"terms": terms()}, **REDACTION, "language_tags": {}}


def run(settings: Settings) -> list[Result]:
    """SmolLM2 in Q4_0 with and without, then the same tokens and bilingual text through the pipeline alone."""
    with edge_rt.open(models.smollm2(settings, "Q4_0"), context=1024, threads=settings.threads) as model:
        ruleset = Ruleset(rules(), model.registry)
        tokens = _generated(model, settings.pick(*_TOKENS))
        decoding = _decoding(model, ruleset, settings)
        streams = {
            "the model's own tokens": _spoken(model, [tokens] * 20),
            _BILINGUAL: _spoken(model, _bilingual(model, settings.pick(600, 60))),
        }
    costs = [_cost(what, pieces, ruleset, settings) for what, pieces in streams.items()]
    return [*decoding, *costs, *(_delay(names, streams[_BILINGUAL], ruleset) for names in (*((name,) for name in ALL), ALL))]


# ---- decoding --------------------------------------------------------------------------------------------------------


class _Clocked:
    """A pipeline that adds up the seconds its thread works in it; those in which another program has the CPU do not count."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self.seconds = pipeline, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def feed(self, text: str) -> str:
        started = time.thread_time()
        result = self._pipeline.feed(text)
        self.seconds += time.thread_time() - started
        return result


class _Clock:
    """Rules whose pipelines are clocked; stands in for a ruleset."""

    def __init__(self, ruleset: Ruleset) -> None:
        self._ruleset = ruleset
        self.last = _Clocked(ruleset.pipeline())

    @property
    def current(self) -> _Clock:
        return self

    def pipeline(self, names: Sequence[str]) -> _Clocked:
        self.last = _Clocked(self._ruleset.pipeline(names))
        return self.last


def _decoding(model: Model, ruleset: Ruleset, settings: Settings) -> list[Result]:
    """Seconds of decoding as many tokens, all post-processors on and off, and those worked in the pipeline by its own clock."""
    count, rounds = settings.pick(*_TOKENS), settings.pick(15, 2)
    clock = _Clock(ruleset)
    own: list[float] = []

    def seconds(post: bool) -> float:
        with model.session() as session:
            options: dict[str, Any] = {"post": ALL, "rules": clock} if post else {}
            *_, done = session.generate(PROMPT, max_tokens=count, temperature=0, ignore_eos=True, **options)
        assert isinstance(done, Done), "the last event of every generation"
        if post:
            own.append(clock.last.seconds)
        return done.timings.decode

    contenders = {OURS: lambda: seconds(True), _OFF: lambda: seconds(False)}
    samples = interleave(contenders, rounds=rounds, most=3 * rounds, deadline=settings.deadline, wide=0.02)
    token = spread(samples[_OFF]).median / count
    name = f"decoding {count} tokens with all four and {TERMS:,} terms, Q4_0"
    whole = compare(name, "s", samples, (Bound(_OFF, "at most", MOST_SHARE),), [f"{1 / token:.0f} tokens/s without"])
    shares = [mine / off for mine, off in zip(own[1:], samples[_OFF], strict=True)]  # the first round does not count
    share, each = spread(shares).median, spread(own[1:]).median / count * 1e6
    shown = f"{share:.2%} of decoding, {each:.0f} µs a token: after each step of the model the CPU's caches are cold"
    name = "all four, in the decode loop by their own clock"
    return [whole, Result(name, f"≤ {MOST_SHARE - 1:.0%} of decoding", "of decoding", shares, ok=share <= MOST_SHARE - 1, shown=shown)]


def _generated(model: Model, count: int) -> list[int]:
    """Token ids of the answer that decoding is measured with."""
    found: list[int] = []
    with model.session() as session:
        for event in session.generate(PROMPT, max_tokens=count, temperature=0, ignore_eos=True):
            if isinstance(event, Delta):
                found += event.tokens
    return found


def _bilingual(model: Model, count: int) -> list[list[int]]:
    """Token ids of generated texts, four without a secret for one with, twenty to an answer."""
    texts = [clean(f"overhead {i}").text if i % 5 else sample(f"overhead {i}").text for i in range(count)]
    random.Random("overhead").shuffle(texts)
    return [model.tokenize("\n\n".join(texts[i : i + 20])) for i in range(0, len(texts), 20)]


def _spoken(model: Model, answers: Iterable[Sequence[int]]) -> list[list[str]]:
    """For each answer the text of each token, empty where a character is not complete."""
    found = []
    for tokens in answers:
        detokeniser = Detokeniser(model.vocab)
        found.append([detokeniser.feed(token) for token in tokens])
    return found


# ---- the pipeline alone ----------------------------------------------------------------------------------------------


def _cost(what: str, answers: Sequence[Sequence[str]], ruleset: Ruleset, settings: Settings) -> Result:
    """Microseconds a token of each post-processor and of all; as in the decode loop, tokens without text are not passed on."""
    rounds = settings.pick(9, 2)
    count = sum(map(len, answers))

    def once(names: Sequence[str]) -> float:
        took = 0.0
        for answer in answers:
            pipeline = ruleset.pipeline(names)
            started = time.perf_counter()
            for text in answer:
                if text:
                    pipeline.feed(text)
            pipeline.flush()
            took += time.perf_counter() - started
        return took / count * 1e6

    once(ALL)
    each = {name: spread([once((name,)) for _ in range(rounds)]).median for name in ALL}
    together = [once(ALL) for _ in range(rounds)]
    shown = f"{spread(together).median:.1f} µs a token: " + ", ".join(f"{name} {value:.1f}" for name, value in each.items())
    characters = sum(len(text) for answer in answers for text in answer)
    median = spread(together).median
    notes = [f"{count:,} tokens, {characters / count:.1f} characters each"]
    ok = median <= MOST_MICROSECONDS
    return Result(f"all four, {what}", f"≤ {MOST_MICROSECONDS:g} µs a token", "µs a token", together, ok=ok, shown=shown, notes=notes)


def _delay(names: Sequence[str], answers: Sequence[Sequence[str]], ruleset: Ruleset) -> Result:
    """By how many characters and tokens text is late."""
    characters: list[int] = []
    tokens: list[int] = []
    for answer in answers:
        delays = list(delayed(ruleset.pipeline(names), answer))
        characters += [delay for delay, _ in delays]
        tokens += [delay for _, delay in delays]
    (p50, late, most), (tokens50, tokens99, tokens_most) = (
        [percentile(values, share) for share in (0.5, 0.99, 1.0)] for values in (characters, tokens)
    )
    shown = f"p50 {p50} characters, {tokens50} tokens; p99 {late} and {tokens99}; most {most} and {tokens_most}"
    name = names[0] if len(names) == 1 else "all four"
    return Result(f"text held back by {name}", "", "characters", [float(late)], shown=shown, notes=[f"{len(characters):,} characters"])


def delayed(pipeline: Pipeline, pieces: Iterable[str]) -> list[tuple[int, int]]:
    """For each character fed, how many characters and how many pieces were fed after it until it had come through.

    Goes by what the post-processors say they hold; what one holds of text that another has changed counts as characters as well.
    """
    waiting: deque[tuple[int, int]] = deque()
    found: list[tuple[int, int]] = []
    fed = number = 0
    for number, piece in enumerate(pieces):
        if piece:
            pipeline.feed(piece)
        waiting.extend((fed + i + 1, number) for i in range(len(piece)))
        fed += len(piece)
        held = sum(count or 0 for _, count in pipeline.held)
        while len(waiting) > held:
            place, since = waiting.popleft()
            found.append((fed - place, number - since))
    found += [(fed - place, number - since) for place, since in waiting]
    return found


def percentile(values: Sequence[int], share: float) -> int:
    """The smallest value that so large a share of the values does not exceed. Raises ValueError for no values."""
    if not values:
        raise ValueError("there is no percentile of nothing")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
