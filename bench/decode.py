"""Decoding: tokens a second at short context and at 4096 cells."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench import models
from bench.contenders import Contender, Ours, decode_seconds, random_prompt
from bench.peers import BEST, DEFAULT, line_up
from bench.results import OURS, Bound, Result, Settings, compare
from bench.timing import interleave
from edge_rt.types import Done

_UNIT = "tokens/s"


def short(settings: Settings) -> list[Result]:
    """50 tokens of prompt, 96 decoded."""
    bounds = (Bound(DEFAULT, "at least", 1.0), Bound(BEST, "at least", 1.0))
    results = [_run(settings, kind, 50, settings.pick(96, 8), settings.pick(15, 2), bounds) for kind in ("Q4_0", "Q4_1", "Q8_0")]
    return [*results, _session(settings)]


def long(settings: Settings) -> list[Result]:
    """At the end of a context of 4096 cells."""
    bounds = (Bound(DEFAULT, "at least", 3.0), Bound(BEST, "at least", 1.0))
    return [
        _run(settings, kind, settings.pick(4000, 600), settings.pick(24, 4), settings.pick(7, 2), bounds)
        for kind in settings.pick(("Q4_0", "Q8_0"), ("Q4_0",))
    ]


def _run(settings: Settings, kind: str, prompt: int, tokens: int, rounds: int, bounds: tuple[Bound, ...]) -> Result:
    path = models.smollm2(settings, kind)
    context = -(-(prompt + tokens + 3) // 256) * 256

    def rate(contender: Contender) -> float:
        return 1.0 / decode_seconds(contender, prompt, tokens)

    measure = partial(decode_seconds, start=prompt, tokens=min(tokens, 24))
    with line_up(path, settings, random_prompt(prompt), context, measure) as line:
        contenders: dict[str, Callable[[], float]] = {name: partial(rate, c) for name, c in line.contenders.items()}
        samples = interleave(contenders, rounds=rounds, most=settings.pick(3 * rounds, rounds), deadline=settings.deadline)
    return compare(f"decode at {prompt + tokens} cells, {kind}", _UNIT, samples, bounds, line.notes)


def _session(settings: Settings) -> Result:
    """What sampling, text and events cost on top: a whole session against the bare engine, both ours."""
    path, prompt, tokens = models.smollm2(settings, "Q4_0"), random_prompt(50), settings.pick(150, 8)
    ours = Ours(path, 512)
    try:
        ours.feed(prompt)
        text = ours.model.detokenize(prompt)

        def session() -> float:
            with ours.model.session() as opened:
                *_, done = opened.generate(text, max_tokens=tokens, temperature=0, ignore_eos=True)
            assert isinstance(done, Done), "the last event of every generation"
            return (tokens - 1) / done.timings.decode

        engine = partial(decode_seconds, ours, 50, tokens)
        rounds = settings.pick(9, 2)
        samples = interleave(
            {OURS: session, "its bare engine": lambda: 1.0 / engine()}, rounds=rounds, most=2 * rounds, deadline=settings.deadline
        )
    finally:
        ours.close()
    return compare("decode through a session (sampling, text, events), Q4_0", _UNIT, samples)
