"""A fact at the head of a conversation five times longer than the window, asked for at the end.

Sessions hold the conversations turn by turn; beside them stand ``full``, which has the whole conversation in its cache, and then methods
that read what is left of it as if the rest had never been there. Seeds are those for reporting: facts, their wording and what recalls
were chosen on others (``tasks.TUNING``).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

import edge_rt
from bench import models
from bench.context.conversations import TONGUES, Conversation, Tongue, conversation
from bench.context.methods import METHODS, RANKS, UNBOUNDED
from bench.context.prompt import of_conversation
from bench.context.reader import Reader
from bench.context.retrieval import CONTEXT, MODEL
from bench.context.runner import Score, by_method, in_rounds, table, versus
from bench.context.score import any_found, interval
from bench.context.sessions import POLICIES, RECALLING, SLIDING, Asked, converse
from bench.context.tasks import REPORTING
from bench.results import Result, Settings
from edge_rt.model import Model

WINDOW, TIMES = 256, 5
REQUIRED = 0.9
"""The share of the conversations in which a session that recalls answers right."""
_LIMIT = 12  # tokens of an answer
_OURS, _RIVALS = "graded", ("newest", "random")


class Held(NamedTuple):
    """What became of a conversation in a session."""

    method: str
    tongue: Tongue
    seed: int
    asked: Asked


def run(settings: Settings) -> list[Result]:
    """Fifty conversations, or ``settings.items``, in English, Chinese and mixed in turn: first what is required, then ranks alone."""
    seeds, held = REPORTING[: settings.items or settings.pick(51, 3)], list[Held]()
    path = models.smollm2(settings, MODEL)
    with ExitStack() as stack:
        policies = {name: stack.enter_context(edge_rt.open(path, context=CONTEXT, policy=policy)) for name, policy in POLICIES.items()}
        reader = stack.enter_context(Reader(policies[RECALLING]))
        scores = in_rounds((_held(reader, policies, seed, held) for seed in seeds), settings.deadline)
        ranked = in_rounds((_ranked(reader, seed) for seed in seeds[: len(held) // len(POLICIES)]), settings.deadline)
    return results(scores, ranked) + [_became(name, held) for name in POLICIES]


def results(scores: Sequence[Score], ranked: Sequence[Score]) -> list[Result]:
    """Whether the requirement is met, all together and by tongue; recall against its rivals; ranks of what is only read."""
    found = [required("conversations, all", scores)]
    found += [required(f"conversations, {t}", of) for t in TONGUES if (of := [score for score in scores if score.kind == t])]
    groups = by_method(scores, 1 / TIMES)
    found += [versus(f"conversations, recall against {rival}", groups, RECALLING, rival) for rival in (SLIDING, "full")]
    groups = by_method(ranked, 1 / TIMES)
    found.append(table("conversations, read once without recall", groups, _OURS))
    return found + [versus(f"conversations, grading against {rival}", groups, _OURS, rival) for rival in _RIVALS]


def required(name: str, scores: Iterable[Score]) -> Result:
    """All methods' scores on the same conversations, and whether sessions that recall answer as many right as is required."""
    found = table(name, by_method(scores, 1 / TIMES), RECALLING)
    return replace(found, requirement=f"{RECALLING} ≥ {REQUIRED:g}", ok=fmean(found.ours) >= REQUIRED)


def _held(reader: Reader, policies: Mapping[str, Model], seed: int, held: list[Held]) -> Iterator[Score]:
    """One conversation, whole and in sessions; ``held`` gets what became of it there."""
    one = _conversation(seed, reader)
    yield _score("full", one, METHODS["full"](reader, of_conversation(reader, one, _LIMIT), 0))
    for name, model in policies.items():
        held.append(Held(name, one.tongue, seed, converse(model, one, WINDOW, _LIMIT)))
        yield _score(name, one, held[-1].asked.answer)


def _ranked(reader: Reader, seed: int) -> Iterator[Score]:
    """One conversation, of which a window's worth is read: the question and the answer are in the window too."""
    one = _conversation(seed, reader)
    prompt = of_conversation(reader, one, _LIMIT)
    for name in RANKS:
        yield _score(name, one, METHODS[name](reader, prompt, WINDOW - len(prompt.question) - _LIMIT))


def _conversation(seed: int, reader: Reader) -> Conversation:
    return conversation(seed, TONGUES[seed % len(TONGUES)], TIMES * WINDOW, reader.count)


def _score(method: str, one: Conversation, answer: str) -> Score:
    share = 1.0 if method in UNBOUNDED else 1 / TIMES
    return Score(method, share, one.tongue, TIMES * WINDOW, one.seed, any_found(answer, one.accepted), answer)


def _became(method: str, held: Sequence[Held]) -> Result:
    """How often the fact was in the window when it was asked for, whatever the model made of it then."""
    ours = [one for one in held if one.method == method]
    there: dict[Hashable, list[float]] = {one.seed: [float(one.asked.there)] for one in ours}
    by_tongue = ", ".join(
        f"{t} {fmean(one.asked.there for one in ours if one.tongue == t):.2f}" for t in TONGUES if any(one.tongue == t for one in ours)
    )
    left = [one.asked for one in ours if one.asked.left]
    notes = [
        f"it had left before in {len(left)} of {len(ours)}, and came back in {sum(asked.there for asked in left)} of these",
        f"{fmean(one.asked.recalled for one in ours):.0f} tokens came back in the mean",
    ]
    return Result(
        f"{method}: fact in the window when asked",
        "",
        "share",
        [v for (v,) in there.values()],
        shown=f"{interval(there)}; {by_tongue}",
        notes=notes,
    )
