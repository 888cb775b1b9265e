"""A fact at the head of a conversation five times longer than the window, asked for at the end.

With methods that read what is left of it as if the rest had never been there, and with sessions that hold it turn by turn. Seeds are
those for reporting: what recalls was chosen on others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from statistics import fmean
from typing import NamedTuple

import edge_rt
from bench import models
from bench.context.conversations import TONGUES, Conversation, Tongue, conversation
from bench.context.methods import METHODS, UNBOUNDED
from bench.context.prompt import of_conversation
from bench.context.reader import Reader
from bench.context.retrieval import CONTEXT, MODEL
from bench.context.runner import Score, by_method, in_rounds, table, versus
from bench.context.score import any_found, interval
from bench.context.sessions import POLICIES, RECALLING, Asked, converse
from bench.context.tasks import REPORTING
from bench.results import Result, Settings
from edge_rt.runtime import Model

WINDOW, TIMES = 256, 5
_LIMIT = 12  # tokens of an answer
_OURS, _RIVALS = "graded", ("newest", "random")


class Held(NamedTuple):
    """What became of a conversation in a session."""

    method: str
    tongue: Tongue
    seed: int
    asked: Asked


def run(settings: Settings) -> list[Result]:
    """Fifty conversations, or ``settings.items``, in English, Chinese and mixed in turn."""
    seeds, held = REPORTING[: settings.items or settings.pick(51, 3)], list[Held]()
    path = models.smollm2(settings, MODEL)
    with ExitStack() as stack:
        policies = {name: stack.enter_context(edge_rt.open(path, context=CONTEXT, policy=policy)) for name, policy in POLICIES.items()}
        reader = stack.enter_context(Reader(policies[RECALLING]))
        scores = in_rounds((_round(reader, policies, seed, held) for seed in seeds), settings.deadline)
    groups = by_method(scores, 1 / TIMES)
    asked = [t for t in TONGUES if any(score.kind == t for score in scores)]
    by_tongue = [table(f"conversations, {t}", by_method((s for s in scores if s.kind == t), 1 / TIMES), _OURS) for t in asked]
    compared = [versus(f"conversations, grading against {rival}", groups, _OURS, rival) for rival in _RIVALS]
    compared += [versus(f"conversations, recall against {rival}", groups, RECALLING, rival) for rival in ("slide (session)", "full")]
    return [*by_tongue, table("conversations, all", groups, _OURS), *compared, *(_became(name, held) for name in POLICIES)]


def _round(reader: Reader, policies: Mapping[str, Model], seed: int, held: list[Held]) -> Iterator[Score]:
    """One conversation with every method. The window holds the question and the answer too."""
    tongue = TONGUES[seed % len(TONGUES)]
    one = conversation(seed, tongue, TIMES * WINDOW, reader.count)
    for name, answer in _answers(reader, policies, one, held):
        share = 1.0 if name in UNBOUNDED else 1 / TIMES
        yield Score(name, share, tongue, TIMES * WINDOW, seed, any_found(answer, one.accepted), answer)


def _answers(reader: Reader, policies: Mapping[str, Model], one: Conversation, held: list[Held]) -> Iterator[tuple[str, str]]:
    """Every method's answer; ``held`` gets what became of the conversation in sessions."""
    prompt = of_conversation(reader, one, _LIMIT)
    for name, method in METHODS.items():
        yield name, method(reader, prompt, WINDOW - len(prompt.question) - _LIMIT)
    for name, model in policies.items():
        held.append(Held(name, one.tongue, one.seed, converse(model, one, WINDOW, _LIMIT)))
        yield name, held[-1].asked.answer


def _became(method: str, held: Sequence[Held]) -> Result:
    """How often the fact was in the window when it was asked for, whatever the model made of it then."""
    ours = [one for one in held if one.method == method]
    there = {one.seed: [float(one.asked.there)] for one in ours}
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
