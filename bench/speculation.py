"""Speculation by n-grams: an answer that takes its text from the prompt, with and without."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import edge_rt
from bench import models
from bench.results import OURS, Bound, Result, Settings, compare
from bench.timing import interleave
from edge_rt.types import Delta, Done, Notice

_PLAIN = "no speculation"
_DRAFT = 8
TEXT = (
    "Order 4471: Alice Johnson, 12 Baker Street, London, bought 3 red lamps for 45.90 EUR on 2024-03-01. "
    "Order 4472: Bob Smith, 99 Elm Avenue, Dublin, bought 1 oak table for 310.00 EUR on 2024-03-02. "
    "Order 4473: Carol Jones, 7 Hill Road, Leeds, bought 12 blue chairs for 1200.00 EUR on 2024-03-05."
)
_MESSAGES = [{"role": "user", "content": f"Repeat the following text word for word.\n{TEXT}"}]


def run(settings: Settings) -> list[Result]:
    """Q4_0, Q8_0 and Q4_1, greedy."""
    return [_run(settings, kind) for kind in ("Q4_0", "Q8_0", "Q4_1")]


def _run(settings: Settings, kind: str) -> Result:
    tokens: dict[int, list[int]] = {}
    notes: set[str] = set()
    limit = settings.pick(140, 24)

    with edge_rt.open(models.smollm2(settings, kind), context=1024) as model:

        def rate(draft: int) -> float:
            """Tokens a second after the first."""
            with model.session() as session:
                answer: list[int] = []
                for event in session.generate(_MESSAGES, max_tokens=limit, temperature=0, speculate=draft):
                    if isinstance(event, Delta):
                        answer += event.tokens
                    elif isinstance(event, Notice):
                        notes.add(event.message)
                    elif isinstance(event, Done):
                        done = event
            tokens[draft] = answer
            if draft:
                used = done.usage
                notes.add(f"{len(answer)} tokens, {used.accepted_tokens} of {used.drafted_tokens} drafts accepted")
            return (len(answer) - 1) / done.timings.decode

        rounds = settings.pick(9, 2)
        samples = interleave(
            {OURS: partial(rate, _DRAFT), _PLAIN: partial(rate, 0)},
            rounds=rounds,
            most=settings.pick(20, 2),
            deadline=settings.deadline,
        )
    same = tokens[_DRAFT] == tokens[0]
    notes.add("output identical" if same else "OUTPUT DIFFERS")
    result = compare(f"n-gram speculation, {kind}", "tokens/s", samples, [Bound(_PLAIN, "at least", 1.4)], sorted(notes))
    return result if same else replace(result, ok=False)  # speed is worth nothing if the output differs
