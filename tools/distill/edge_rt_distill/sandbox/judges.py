"""Judges: grades for free answers by a model, beside the checks, for what no rule can see.

The built-in judge asks a model for a grade of 1 to 5 and takes the mean of the grades by their likelihoods (G-Eval, Liu et al. 2023,
arXiv:2303.16634): the same answer gets the same value, and close answers differ. A judge has the taste and the mistakes of its model: it is
worth what ``validate`` says, the share of the items whose crafted good answers it grades above the bad ones. It is shown what was written,
and not whether the model ended there by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from edge_rt.hooks import OptionError
from edge_rt_distill.data.answers import Answer
from edge_rt_distill.named import find
from edge_rt_distill.progress import Told, quiet
from edge_rt_distill.sandbox.engines import Engine, open_engine
from edge_rt_distill.sandbox.items import Item
from edge_rt_distill.sandbox.metrics import METRICS
from edge_rt_distill.sandbox.running import Outcome, Results
from edge_rt_distill.sandbox.suites import Suite

GRADES = ("1", "2", "3", "4", "5")
_PROMPT = """You grade an answer to a user. What counts: {what}

{question}

The answer to grade:
{answer}

Give a grade from 1 (useless) to 5 (perfect) as a single digit."""


class Judge(Protocol):
    """Grades answers to an item."""

    @property
    def name(self) -> str:
        """Kept with what it graded."""
        ...

    def grade(self, item: Item, answers: Sequence[Answer]) -> float:
        """0 to 1, of one answer, or of one to each turn. The same for the same answers."""
        ...


class ByLikelihood:
    """See the module. ``engine`` gives likelihoods."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        facts = engine.facts
        self.name = f"{facts.model} in {facts.engine}"

    def grade(self, item: Item, answers: Sequence[Answer]) -> float:
        """See Judge. The mean of all turns."""
        grades = [self._grade(item, question, answer.text) for question, answer in zip(_questions(item, answers), answers, strict=True)]
        return sum(grades) / len(grades)

    def _grade(self, item: Item, question: str, answer: str) -> float:
        asked = _PROMPT.format(what=METRICS[item.metric].what, question=question, answer=answer)
        nats = self._engine.likelihoods([{"role": "user", "content": asked}], GRADES)
        shares = [math.exp(one - max(nats)) for one in nats]
        return sum(at * share for at, share in enumerate(shares)) / sum(shares) / (len(GRADES) - 1)


def _questions(item: Item, answers: Sequence[Answer]) -> list[str]:
    """What each answer answers, with what was said before."""
    said = [f"{message['role']}: {message['content']}" for message in item.messages]
    found = []
    for turn, answer in zip(item.turns, answers, strict=False):
        said.append(f"user: {turn.content}")
        found.append("\n".join(said))
        said.append(f"assistant: {answer.text}")
    return found or ["\n".join(said)]


@contextmanager
def opened(name: str) -> Iterator[Judge]:
    """The judge of a name: a model as ``open_engine`` takes it, or ``MODULE:ATTRIBUTE``, a Judge or a class that makes one.

    Raises OptionError if there is none, or the model gives no likelihoods.
    """
    if ":" in name and "/" not in name and not Path(name).exists():
        found = find(name, "judge", "a model, or MODULE:ATTRIBUTE")
        yield found() if isinstance(found, type) else found
        return
    with closing(open_engine(name)) as engine:
        if not engine.scores:
            raise OptionError(f"{name} gives no likelihoods, by which it would grade; name a GGUF, or an edge-rt daemon")
        yield ByLikelihood(engine)


def judged(results: Results, suites: Sequence[Suite], judge: Judge, told: Told = quiet) -> Results:
    """Results whose free answers are worth what a judge says. Choices stay as they are."""
    items = {(suite.name, item.id): item for suite in suites for item in suite.items}
    found: list[Outcome] = []
    for done, one in enumerate(results.outcomes, 1):
        item = items[one.domain, one.item]
        if not item.options:
            one = one._replace(value=judge.grade(item, [Answer(str(said), True) for said in one.said]))
        found.append(one)
        told(done, len(results.outcomes))
    return results._replace(outcomes=tuple(found), judge=judge.name)


class Agreement(NamedTuple):
    """``apart``: of ``items`` so many whose every good example a judge grades above every bad one."""

    apart: int
    items: int


def validate(suites: Sequence[Suite], judge: Judge, told: Told = quiet) -> Agreement:
    """How far a judge can be believed."""
    known = [item for suite in suites for item in suite.items if item.good]
    apart = 0
    for done, item in enumerate(known, 1):
        good, bad = ([judge.grade(item, one) for one in some] for some in (item.good, item.bad))
        apart += min(good) > max(bad)
        told(done, len(known))
    return Agreement(apart, len(known))
