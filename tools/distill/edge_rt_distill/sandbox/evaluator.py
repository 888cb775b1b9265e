"""The sandbox as the score by which distillation stops and chooses weights: what a student keeps of its teacher in items that may steer.

Half of the score is the built-in evaluator's (evaluate/evaluator.py), which is exact on held-out text; half is what was kept of the
sandbox: the sum of the student's values by the teacher's, at most 1, over the items at which the teacher is above chance. Items are
a fixed choice, as many of every metric as there is room for, so the same weights have the same score. Sealed items are never among them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, zip_longest

import torch

from edge_rt.hooks import OptionError
from edge_rt_distill.data.answers import Answer
from edge_rt_distill.evaluate.evaluator import Context, Quick, Score
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.generate import generate
from edge_rt_distill.model.tokens import Tokeniser
from edge_rt_distill.sandbox.engines import Facts
from edge_rt_distill.sandbox.items import Message
from edge_rt_distill.sandbox.running import run
from edge_rt_distill.sandbox.scores import scaled
from edge_rt_distill.sandbox.suites import Suite, built_in
from edge_rt_distill.sandbox.torch_scores import option_nats

CHOICES, ANSWERS = 96, 32
"""Items that compare options, which are quick, and that are answered freely, which take most of the time."""


class InTraining:
    """A model in torch as an ``Engine``."""

    scores = True

    def __init__(self, model: Decoder, tokeniser: Tokeniser) -> None:
        self._model, self._tokeniser = model, tokeniser
        self.facts = Facts("in training", "torch", "")

    def answer(self, messages: Sequence[Message], tokens: int) -> Answer:
        """See Engine."""
        prompt, end = self._tokeniser.chat(messages, answer=True), self._tokeniser.end
        (found,) = generate(self._model, [prompt], tokens=tokens, temperature=0.0, end=end)
        return Answer(self._tokeniser.decode(found.tokens), found.ended)

    @torch.no_grad()
    def likelihoods(self, before: str | Sequence[Message], options: Sequence[str]) -> list[float]:
        """See Engine."""
        tokeniser = self._tokeniser
        return option_nats(
            before, options, chat=lambda messages: tokeniser.chat(messages, answer=True),
            tokens=lambda text: tokeniser.vocab.tokenize(text, bos=False), start=tokeniser.encode("") or tokeniser.encode("\n"),
            logits=lambda row, first: self._model.logits(self._model(torch.tensor([row])).hidden[0, first:]),
        )  # fmt: skip

    def close(self) -> None:
        """It is not ours to let go of."""


class Sandbox:
    """See the module. The teacher is asked once. Name it ``sandbox`` in a run's file."""

    def __init__(self, choices: int = CHOICES, answers: int = ANSWERS, suites: Sequence[Suite] | None = None) -> None:
        self._quick = Quick()
        self._suites = _chosen(built_in() if suites is None else suites, choices, answers)
        self._items = {(suite.name, item.id): item for suite in self._suites for item in suite.items}
        self._known: dict[Decoder, dict[tuple[str, str], float]] = {}

    def score(self, student: Decoder, teacher: Decoder, context: Context) -> Score:
        """See Evaluator. Raises OptionError without a tokeniser, or if the teacher is above chance nowhere."""
        if context.tokeniser is None:
            raise OptionError("the sandbox asks in words and was given no tokeniser; name another evaluator")
        if teacher not in self._known:
            self._known = {teacher: self._values(teacher, context.tokeniser)}
        known = {place: value for place, value in self._known[teacher].items() if value > 0}
        if not known:
            raise OptionError("the teacher is above chance in no item of the sandbox, so it cannot steer; name another evaluator")
        found = self._values(student, context.tokeniser)
        kept = sum(found[place] for place in known) / sum(known.values())
        quick = self._quick.score(student, teacher, context)
        parts = {**quick.parts, "sandbox": min(1.0, max(0.0, kept))}
        return Score((quick.value + parts["sandbox"]) / 2, parts)

    def _values(self, model: Decoder, tokeniser: Tokeniser) -> dict[tuple[str, str], float]:
        results = run(InTraining(model, tokeniser), self._suites)
        return {(one.domain, one.item): scaled(self._items[one.domain, one.item], one.value) for one in results.outcomes}


def _chosen(suites: Sequence[Suite], choices: int, answers: int) -> list[Suite]:
    """The suites with some of their items, metrics in turn."""
    chosen: set[tuple[str, str]] = set()
    for most, wanted in ((choices, True), (answers, False)):
        by_metric: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for suite in suites:
            for item in suite.items:
                if item.split == "steer" and bool(item.options) == wanted:
                    by_metric[item.metric].append((suite.name, item.id))
        ordered = [sorted(some, key=_order) for some in by_metric.values()]
        chosen.update([one for one in chain(*zip_longest(*ordered)) if one is not None][:most])
    found = [suite._replace(items=tuple(item for item in suite.items if (suite.name, item.id) in chosen)) for suite in suites]
    return [suite for suite in found if suite.items]


def _order(place: tuple[str, str]) -> str:
    """An order that has nothing to do with how the suites were written."""
    return hashlib.sha256("/".join(place).encode()).hexdigest()
