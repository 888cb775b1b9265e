"""A composite score of a student, 0 to 1, by which levels are stopped and their best weights chosen; an evaluator can be the user's own.

The built-in ``quick`` is the mean of up to five parts, weighted by WEIGHTS; parts that nothing is known of are left out:

- ``fidelity``: exp(-KL(teacher||student)), KL in nats a token on held-out sequences;
- ``agreement``: share of their positions at which both find the same token likeliest;
- ``perplexity``: the teacher's perplexity on them by the student's, at most 1;
- ``stop``: of the prompts whose answer the teacher ends by itself, the share at which the student does so too, with an answer of no more
  than twice the other's tokens (and 8);
- ``reward``: the mean reward of the student's answers by that of the teacher's, at most 1, on prompts whose answers can be verified.

Answers are greedy, so that the same weights have the same score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from edge_rt.hooks import OptionError
from edge_rt_distill.evaluate.measures import divergence
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.generate import Rollout, generate
from edge_rt_distill.model.rows import TokenSequence
from edge_rt_distill.model.tokens import Tokeniser
from edge_rt_distill.named import find
from edge_rt_distill.stages.teachers import CachingTeacher, TeacherView

WEIGHTS: Mapping[str, float] = {"fidelity": 0.3, "agreement": 0.2, "perplexity": 0.2, "stop": 0.1, "reward": 0.2}
SLACK = 8
"""Tokens by which the lengths of two short answers may differ, whatever their ratio."""


class Score(NamedTuple):
    """``value`` 0 to 1, more is better, and what it was made of."""

    value: float
    parts: Mapping[str, float]


class Task(NamedTuple):
    """A prompt, as tokens that end where the answer begins. ``reward``: (text of an answer, it ended by itself) -> 0 to 1, or None."""

    prompt: Sequence[int]
    reward: Callable[[str, bool], float] | None = None


@dataclass(frozen=True)
class Context:
    """What students are scored on: ``sequences`` that were held out, ``tasks`` likewise. ``tokens``: of an answer at most.

    ``end``: the token that ends an answer. ``decode``: tokens -> text. ``batch_tokens``: computed together. ``seen``: what is known of the
    teacher, worth sharing; None: found out from the model. ``tokeniser``: of both models, for evaluators that ask in words.
    """

    sequences: Sequence[TokenSequence]
    tasks: Sequence[Task] = ()
    tokens: int = 96
    end: int | None = None
    decode: Callable[[list[int]], str] = str
    batch_tokens: int = 2048
    seen: TeacherView | None = None
    tokeniser: Tokeniser | None = None


@runtime_checkable
class Evaluator(Protocol):
    """Scores students."""

    def score(self, student: Decoder, teacher: Decoder, context: Context) -> Score:
        """The same for the same weights. Leaves both models as they are."""
        ...


@dataclass
class Quick:
    """The built-in evaluator. It remembers what the teacher said, its states and its answers."""

    weights: Mapping[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    _view: CachingTeacher | None = field(default=None, repr=False)
    _answers: list[tuple[Decoder, Context, list[Rollout]]] = field(default_factory=list, repr=False)

    def score(self, student: Decoder, teacher: Decoder, context: Context) -> Score:
        """See the module. Raises as ``divergence`` and ``generate`` do."""
        measures = divergence(student, context.seen or self._of(teacher), context.sequences, batch_tokens=context.batch_tokens)
        parts = {
            "fidelity": math.exp(-max(0.0, measures.kl)),
            "agreement": measures.top1,
            "perplexity": min(1.0, 1 / measures.perplexity_ratio),
        }
        if context.tasks:
            parts |= _answered(_answer(student, context), self._teachers(teacher, context), context)
        total = sum(self.weights[name] for name in parts)
        if total <= 0:
            raise OptionError(f"no part that can be measured has a weight; give some to {', '.join(parts)}")
        return Score(sum(self.weights[name] * value for name, value in parts.items()) / total, parts)

    def _of(self, teacher: Decoder) -> CachingTeacher:
        if self._view is None or self._view.model is not teacher:
            self._view = CachingTeacher(teacher, kept_as=torch.float32)
        return self._view

    def _teachers(self, teacher: Decoder, context: Context) -> list[Rollout]:
        for model, asked, answers in self._answers:
            if model is teacher and asked is context:
                return answers
        answers = _answer(teacher, context)
        self._answers.append((teacher, context, answers))
        return answers


def _answer(model: Decoder, context: Context) -> list[Rollout]:
    return generate(model, [task.prompt for task in context.tasks], tokens=context.tokens, temperature=0.0, end=context.end)


def _answered(ours: Sequence[Rollout], theirs: Sequence[Rollout], context: Context) -> dict[str, float]:
    """The parts that answers tell of."""
    parts = {}
    ended = [(mine, other) for mine, other in zip(ours, theirs, strict=True) if other.ended]
    if ended:
        parts["stop"] = sum(mine.ended and _as_long(len(mine.tokens), len(other.tokens)) for mine, other in ended) / len(ended)
    rewards = [
        (task.reward(context.decode(mine.tokens), mine.ended), task.reward(context.decode(other.tokens), other.ended))
        for task, mine, other in zip(context.tasks, ours, theirs, strict=True)
        if task.reward is not None
    ]
    reached = sum(other for _, other in rewards)
    if reached > 0:
        parts["reward"] = min(1.0, sum(mine for mine, _ in rewards) / reached)
    return parts


def _as_long(one: int, other: int) -> bool:
    return max(one, other) <= 2 * min(one, other) + SLACK


NAMES: Mapping[str, str] = {
    "": f"{__name__}:Quick", "quick": f"{__name__}:Quick", "sandbox": "edge_rt_distill.sandbox.evaluator:Sandbox",
}  # fmt: skip
"""Evaluators that ship with the tool."""


def load_evaluator(name: str) -> Evaluator:
    """``quick``, ``sandbox``, or what ``MODULE:ATTRIBUTE`` names: an object with a method ``score``, or a class that makes one.

    Raises OptionError if there is none.
    """
    found = find(NAMES.get(name, name), "evaluator", "quick, sandbox, or MODULE:ATTRIBUTE")
    made = found() if isinstance(found, type) else found
    if not isinstance(made, Evaluator):
        raise OptionError(f"the evaluator {name} has no method score; see edge_rt_distill.evaluate.evaluator.Evaluator")
    return made


def scorer(evaluator: Evaluator, teacher: Decoder, context: Context, name: str = "quick") -> Callable[[Decoder], Score]:
    """What ``stages.trainer.train`` takes. The score is checked: OptionError if it is no number from 0 to 1."""

    def scored(student: Decoder) -> Score:
        found = evaluator.score(student, teacher, context)
        if not isinstance(found.value, (int, float)) or not 0 <= found.value <= 1:
            raise OptionError(f"the evaluator {name} gave {found.value!r}; a score is a number from 0 to 1")
        return found

    return scored
